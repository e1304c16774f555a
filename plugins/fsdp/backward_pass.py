"""Exchanges that begin in a backward pass and are waited for at its end."""

import functools
import weakref
from collections.abc import Callable

import torch

from gcompress.exchange.exchange import GradientExchange


class PassToken:
    """One backward pass. It lives until the pass ends, also if that is by an error."""


class BackwardPass:
    """What the hooks of all modules of a model have under way.

    Args:
        exchange: the GradientExchange.
        first: called before the first exchange of a pass.
        failed: called once a pass has ended with an error.
    """

    def __init__(self, exchange: GradientExchange, first: Callable[[], None], failed: Callable[[], None]):
        self._exchange, self._first, self._failed = exchange, first, failed
        self._token: weakref.ref[PassToken] | None = None  # a weak reference to the pass that is under way
        self._pending: list[tuple] = []  # (Bucket, {name: where its result goes}, factor of that)

    def begin(self) -> None:
        """To be called by every hook before it exchanges anything."""
        if self._token is not None and self._token() is not None:
            return
        if self._token is not None:  # the last pass ended with an error
            pending, self._pending = self._pending, []
            for bucket, _, _ in pending:  # whose later rounds other ranks may have begun
                bucket()
            self._exchange.abandon_step()
            self._failed()
        token = PassToken()
        self._token = weakref.ref(token)
        # The engine drops its callbacks when the pass ends, and what they hold, even if it does not call them.
        torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._end, token))
        self._first()

    def add(self, bucket, places: dict[str, torch.Tensor], *, at_once: bool, factor: float = 1.0) -> None:
        """Have the results of a Bucket in {name: place}, times a factor: at once, or when the pass ends."""
        if at_once:
            _deliver(bucket, places, factor)
        else:
            self._pending.append((bucket, places, factor))

    def _end(self, token):
        """All hooks have run, also those of modules whose inputs need no gradient."""
        self._token = None
        pending, self._pending = self._pending, []
        try:
            for each in pending:
                _deliver(*each)
        except BaseException:
            self._exchange.abandon_step()
            raise
        self._exchange.end_step()


def _deliver(bucket, places, factor):
    for name, result in bucket().items():
        place = places[name]
        if result.data_ptr() != place.data_ptr():  # else it was decoded to its place
            place.copy_(result)
        if factor != 1.0:
            place.mul_(factor)
