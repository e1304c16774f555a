"""The mean over ranks of compressed gradients, on any engine.

    .grad -> scaling (the true gradient) -> exchange (start, wait)  -> engine (the collective operations of a plugin)
                                              |  plan: how each parameter travels, in which pieces and buckets
                                              |  ways: all-gather, two-phase, summed; schedule: several at once
                                              |  pieces: one payload's parts, coded one by one; together: by one call
                                              |  report: bytes; times: seconds; trace: a file of what happened when
    .grad <- results: each open until applied.py sees whether an optimizer used it; then memory follows

With dedicated servers (MPI, BytePS) the exchange is theirs: partition (what goes to whom), parameter_server,
server_rounds. What ranks remember is saved by saved_state and goes to other ranks by hand_on.
"""

from .engine import Engine, agree, wait_until
from .exchange import GradientExchange
from .results import Results
from .saved_state import merge_states

__all__ = ["Engine", "GradientExchange", "Results", "agree", "merge_states", "wait_until"]
