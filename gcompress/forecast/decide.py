"""What `compression="auto"` becomes: one choice, made by rank 0 of what all ranks measured, before the first exchange.

The ranks run the candidates' encoders and decoders at the same time, so that what they take from each other's cores
counts. If no rate is given they send each other a few payloads and take what came of it for the link. What is chosen
takes the place of "auto" in the policy: plans, the comparison of configurations and saved states have that.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from ..auto import Auto
from ..errors import ConfigError
from ..exchange.engine import Ranks, agree, result
from ..policy import Policy
from ..units import duration, in_bits, in_seconds, link_rate
from .advice import TRUSTED, Bench, Forecast, Situation, forecast_of, truest
from .network import Network
from .timeline import Computing

# From the truest on. None sums float32; bf16 is a compressor here, since a policy names compressors.
CANDIDATES = ("none", "bf16", *TRUSTED)
SAMPLE_ENTRIES = 2 << 20  # of the model, on which they are measured
SMALLEST_PROBE, LARGEST_PROBE, FACTOR = 1 << 15, 1 << 22, 4  # bytes of a payload
LONG_ENOUGH = 0.1  # seconds of an operation from which its rate can be told
REPEAT = 3

log = logging.getLogger(__name__)


def decide(
    policy: Policy,
    ranks: Ranks,
    shapes: dict[str, torch.Size],
    device: torch.device | None = None,
    bench: Any = None,
) -> Policy:
    """The policy with a compressor in place of "auto", the same on all ranks; all must call it.

    Logs on rank 0 what was chosen and why.

    Args:
        policy: a Policy; one that is decided is returned as it is.
        ranks: the engine. If it has no collective operations, the policy must name the link's rate.
        shapes: {name: shape} of the model, the same on all ranks.
        device: where gradients lie; None: the processor.
        bench: what measures, see `Bench`; None: this machine is measured.

    Raises:
        ConfigError: the rate is not known and cannot be measured, or ranks come and go.
        ConfigMismatchError: another rank's configuration differs.
    """
    auto = policy.compressor
    if not isinstance(auto, Auto):
        return policy
    if getattr(ranks, "elastic", False):
        raise ConfigError(f"compression: got {auto} in an elastic job, whose ranks begin at different times: {ADVICE}")
    measurable = hasattr(ranks, "allgather")
    if auto.link is None and not measurable:
        raise ConfigError(
            f"compression: got {auto} on an engine of parameter servers, over which a link cannot be measured: "
            "expected its rate, such as auto:link=1gbit"
        )
    agree(ranks, {"compression": policy.to_dict(), "shapes": [[name, list(shape)] for name, shape in shapes.items()]})
    if ranks.world_size() == 1:
        log.info("auto: none, since there is one rank")
        return dataclasses.replace(policy, compressor=None)
    bench = bench or Bench(shapes, ranks.world_size(), device, sample=SAMPLE_ENTRIES, beside_others=True)
    network = _given(auto) if auto.link else measure_link(ranks, device)
    topology = getattr(ranks, "topology", None)
    if topology is not None and not network.shared:
        network = dataclasses.replace(network, local=topology.local_size)
    step = Computing(duration(auto.step))
    found = candidates(policy, Situation(dict(shapes), ranks.world_size(), network, step), bench)
    return _told(policy, ranks, found, network)


ADVICE = "expected the compressor that `gcompress plan` advises"


def candidates(policy: Policy, situation: Situation, bench: Any) -> list[Forecast]:
    """A Forecast of each of CANDIDATES in the policy."""
    return [forecast_of(name, _with(policy, name), situation, bench) for name in CANDIDATES]


def _with(policy, name):
    """The policy with a compressor of this name in place of "auto"."""
    return dataclasses.replace(policy, compressor=name)


def _given(auto):
    return Network(link_rate(auto.link), latency=duration(auto.latency), shared=auto.shared)


def _told(policy, ranks, found, network):
    """Rank 0 chooses by the slowest rank's steps and tells the others."""
    texts = ranks.gather_texts(json.dumps({each.method: each.seconds for each in found}))
    chosen = "-"
    if ranks.rank() == 0:
        seconds = [json.loads(text) for text in texts]
        slowest = [each._replace(seconds=max(rank[each.method] for rank in seconds)) for each in found]
        chosen = truest(slowest, CANDIDATES).method
        log.info("%s", explained(chosen, slowest, network))
    return _with(policy, ranks.gather_texts(chosen)[0])


def explained(chosen: str, forecasts: Sequence[Forecast], network: Network) -> str:
    """A sentence: what was chosen, on what link, against what."""
    steps = ", ".join(f"{each.method} {in_seconds(each.seconds)}" for each in forecasts)
    which = "that all share" if network.shared else "for each rank"
    return (
        f"auto: {chosen}, for a link of {in_bits(network.rate)} {which}, {in_seconds(network.latency)} one way; "
        f"expected of a step: {steps}. To have the same again: compression={chosen!r}"
    )


def measure_link(engine: Any, device: torch.device | None = None) -> Network:
    """The link that a rank has while all send: from all-gathers of payloads that grow until one takes LONG_ENOUGH.

    Args:
        engine: see exchange/engine.py; all ranks must call it.
        device: where payloads lie; None: the processor.
    """
    ranks = engine.world_size()
    counter = iter(range(1000))

    def slowest(nbytes):
        """Seconds of the slowest rank for an all-gather of that many bytes from each."""
        payload = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        meet = torch.zeros(1, device=device)
        what = "measuring the link"
        result(engine.allreduce(f"auto.{next(counter)}", 0, meet, "max"), what)  # all begin together
        start = time.perf_counter()
        result(engine.allgather(f"auto.{next(counter)}", 0, payload, [nbytes] * ranks), what)
        seconds = torch.full((1,), time.perf_counter() - start, device=device)
        return float(result(engine.allreduce(f"auto.{next(counter)}", 0, seconds, "max"), what))

    empty = statistics.median(slowest(1) for _ in range(2 * REPEAT + 1))
    nbytes = SMALLEST_PROBE
    while slowest(nbytes) < LONG_ENOUGH and nbytes < LARGEST_PROBE:
        nbytes *= FACTOR
    seconds = statistics.median(slowest(nbytes) for _ in range(REPEAT))
    rate = 8 * (ranks - 1) * nbytes / max(seconds - empty, 1e-6)
    return Network(rate, latency=empty / max(1, ranks - 1), efficiency=1)
