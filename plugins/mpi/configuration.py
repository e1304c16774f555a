"""What workers and servers cannot do together, refused on all of them once they have agreed on it."""

from gcompress.errors import ConfigError
from gcompress.exchange.parameter_server import check_for_servers
from gcompress.policy import as_policy


def check_configuration(agreed: dict) -> None:
    """ConfigError on every rank alike: a worker that refused alone would leave its servers waiting.

    Args:
        agreed: what `agree` has compared: "compression" (a policy's dict or None), "staleness", "momentum" and
            "on_failure".
    """
    policy = as_policy(agreed["compression"]) if agreed["compression"] else None
    check_for_servers(policy)
    others = agreed["staleness"] or agreed["momentum"] or agreed["on_failure"] != "end"
    if policy and policy.error_feedback == "ef21" and others:
        raise ConfigError(
            "error_feedback: got 'ef21', which needs the same means on all workers, without staleness or momentum "
            "on the servers, and workers that all stay"
        )
