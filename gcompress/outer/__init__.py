"""Outer steps: every rank trains H steps alone, then the ranks exchange how far their weights have moved.

    engine = gcompress.plugins.horovod.engine()          # or of gcompress.plugins.ddp; with MPI the worker's Job
    outer = gcompress.OuterOptimizer(optimizer, model, engine, "polar:rate=0.25", every=30)
    for batch in batches:
        outer.zero_grad()
        loss(model, batch).backward()
        outer.step()                                     # the inner step and, every 30th, the exchange
    outer.finish()

outer_optimizer.py says what a round is. fragments.py cuts a model into parts that are exchanged in turns. means.py says
what outer steps need of an engine. demo.py has DeMo, which exchanges a little at every step.
"""

from .demo import DeMo
from .outer_optimizer import OuterOptimizer

__all__ = ["DeMo", "OuterOptimizer"]
