"""How an exchange learns what became of the gradients that it delivered.

`Watch` looks at the parameters. When a torch optimizer has stepped them, their gradients were
applied. When the next gradient is computed and no optimizer has, then either the last result
is gone from `.grad` (the step was skipped, or the gradient thrown away), or it is still there
and the next one is added to it. Weights that no torch optimizer has ever stepped are taken to
be updated by other code as soon as they change in place.
"""

import functools
import itertools
import logging
import weakref

from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..policy import check_momentum

log = logging.getLogger(__name__)

# So many exchanges in a row whose results nobody applied are worth a warning.
SUSPICIOUS_EXCHANGES = 10

_watches: weakref.WeakSet = weakref.WeakSet()
_stepping: weakref.WeakSet = (
    weakref.WeakSet()
)  # optimizers whose step is under way: a closure may compute gradients in it


class Watch:
    """Tells an exchange when its results were applied, thrown away, or added to.

    Args:
        exchange: the `gcompress.exchange.results.Results` to tell.
        parameters: {name: parameter}.
    """

    def __init__(self, exchange, parameters):
        self._exchange = weakref.ref(exchange)
        self._parameters = dict(parameters)
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._stepped = set()  # names that a torch optimizer has stepped
        self._versions = {}  # name: the parameter's version when its gradient was exchanged
        self._optimizers = weakref.WeakSet()  # those whose momentum was looked at
        self._news, self._thrown_away, self._warned = False, 0, False
        reference = weakref.ref(self)
        hooks = [
            parameter.register_hook(functools.partial(_computing, reference, name))
            for name, parameter in parameters.items()
            if parameter.requires_grad
        ]
        weakref.finalize(self, _remove, hooks)
        _look_at_optimizers()
        _watches.add(self)

    def opened(self, name):
        """The exchange of a parameter's gradient begins."""
        self._versions[name] = self._parameters[name]._version

    def exchanged(self):
        """All gradients of a step were exchanged."""
        self._news = True

    def settle(self, name):
        """A new gradient of a parameter is about to be computed or exchanged: what became of the last result?"""
        exchange, parameter = self._exchange(), self._parameters[name]
        by_others = name not in self._stepped or len(_stepping) > 0
        gone = parameter.grad is None or (name not in exchange.empty_results and holds_nothing(parameter.grad))
        if by_others and parameter._version != self._versions.get(name, parameter._version):
            exchange.applied([name])
        elif gone:
            exchange.discard([name])
            self._count_thrown_away()
        else:
            exchange.carry_on(name)

    def before_step(self, optimizer):
        exchange = self._exchange()
        if exchange is None or optimizer in self._optimizers:
            return
        if exchange.policy:
            check_momentum(exchange.policy, optimizer.param_groups, self._names)
        self._optimizers.add(optimizer)

    def after_step(self, optimizer):
        exchange = self._exchange()
        if exchange is None or not exchange.open_names:
            return
        parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
        stepped = [name for p in parameters if p.grad is not None and (name := self._names.get(p)) is not None]
        if stepped:
            self._stepped.update(stepped)
            self._thrown_away = 0
            exchange.applied(stepped)

    def _count_thrown_away(self):
        """Once for each exchange whose results were thrown away."""
        if not self._news:
            return
        self._news = False
        self._thrown_away += 1
        if self._thrown_away == SUSPICIOUS_EXCHANGES and not self._warned:
            self._warned = True
            log.warning(
                "the gradients of the last %d exchanges were never applied, so what they left over was forgotten: "
                "no torch optimizer stepped these parameters. After an update of your own, call applied() on the "
                "exchange",
                SUSPICIOUS_EXCHANGES,
            )


def holds_nothing(gradient):
    """Whether a `.grad` is None or zero everywhere."""
    if gradient is None:
        return True
    if hasattr(gradient, "to_local"):  # a DTensor, of which each rank looks at its own part
        gradient = gradient.to_local()
    return not bool((gradient._values() if gradient.is_sparse else gradient).any())


def _computing(reference, name, gradient):
    watch = reference()
    exchange = watch._exchange() if watch is not None else None
    if exchange is not None and name in exchange.open_names:
        watch.settle(name)


def _remove(hooks):
    for hook in hooks:
        hook.remove()


@functools.cache
def _look_at_optimizers():
    """Have every torch optimizer of this process tell when it steps; once."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer, arguments, keywords):
    for watch in list(_watches):
        watch.before_step(optimizer)
    _stepping.clear()  # of one whose step ended with an error
    _stepping.add(optimizer)


def _after_step(optimizer, arguments, keywords):
    _stepping.discard(optimizer)
    # A fused optimizer is called even if a scaler found that it must not step, and then changes nothing.
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None and bool(found_inf):
        return
    for watch in list(_watches):
        watch.after_step(optimizer)
