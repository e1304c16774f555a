"""Which compressor for which tensor, and by which exchange."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable

import torch

from .auto import Auto
from .checks import check_choice, check_integer, shown
from .compressors import Compressor, from_spec
from .compressors.spec import parse_value
from .errors import ConfigError
from .feedback import eased
from .residual_types import PACKED, RESIDUALS

EXCHANGES = ("auto", "allgather", "twophase", "summed", "turns")
ROLES = ("gradient", "activation")


@dataclasses.dataclass(frozen=True)
class Rule:
    """A compressor for the tensors that meet all of its conditions.

    Args:
        compressor: a Compressor, its spec or its dict; None or "none": send them as they are.
        name: the tensor's name, a pattern as of file names: `*`, `?`, `[abc]`.
        role: "gradient", "activation", or None for both.
        min_numel, max_numel: fewest and most entries; None: any number.
    """

    compressor: Compressor | None
    name: str = "*"
    role: str | None = None
    min_numel: int = 0
    max_numel: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "compressor", _compressor_or_none(self.compressor))
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"name: got {self.name!r}, expected a pattern such as 'classifier.*'")
        check_choice("role", self.role, (None, *ROLES))
        check_integer("min_numel", self.min_numel, 0)
        if self.max_numel is not None:
            check_integer("max_numel", self.max_numel, self.min_numel)

    def matches(self, name: str, numel: int, role: str) -> bool:
        """Whether a tensor meets all conditions."""
        return (
            self.min_numel <= numel <= (math.inf if self.max_numel is None else self.max_numel)
            and self.role in (None, role)
            and fnmatch.fnmatchcase(name or "", self.name)
        )

    def to_dict(self) -> dict:
        return {**_shallow(self), "compressor": self.compressor.to_dict() if self.compressor else None}

    def __str__(self):
        conditions = _assignments(self, skip=("compressor",)) or ["name=*"]
        return f"{', '.join(conditions)} -> {self.compressor or 'none'}"


@dataclasses.dataclass(frozen=True)
class Policy:
    """One compressor for every tensor that is large enough to be worth it, and rules for the others.

    Args:
        compressor: a Compressor, its spec or its dict; None or "none": nothing but what rules say. "auto" or
            "auto:link=1gbit": the ranks choose one when they first meet (see gcompress/auto.py and docs/PLANNING.md).
        min_numel: tensors with fewer entries (biases, norms) are sent uncompressed.
        error_feedback: True, False, or None: on for compressors that are not unbiased. "ef21": for these, too, but
            what is remembered is an estimate of the gradient (see feedback.EstimateFeedback).
        feedback_decay: what is left of a residual when the next gradient comes, 0 < feedback_decay <= 1; None: all,
            and between outer steps 0.9 (see gcompress/outer/).
        mean: what sums over ranks are divided by: "ranks", or, entry by entry, the "senders" that sent it, as
            SparseLoCo's published code does. That is for sparse compressors, in an all-gather.
        residual: how what is remembered is kept between steps (see gcompress/residual_types.py): "float32"; "bf16" and
            "int8", 2 and 1.02 bytes an entry; "cpu", in the host's memory while gradients are on a GPU.
        exchange: how ranks come to the mean (see gcompress/exchange/ways.py): "allgather", "twophase",
            "summed" (for `summable` compressors), or "auto", by traits, size and number of ranks. "turns" is for
            outer steps: each piece of a tensor comes from one rank, in every round from another.
        bucket_bytes: float32 bytes of gradients that travel together in a two-phase exchange, where
            the engine does not form buckets itself.
        local_size: ranks of a node, which share its link to others: what they send is summed within the node first (see
            docs/NODES.md; Horovod and DDP). "auto": as the launcher has placed them; 1: every rank for itself.
        rules: Rules or their dicts; the first that matches decides, before `compressor` and
            `min_numel`.
        momentum, clip: of momentum correction (see gcompress/feedback.py); 0 and None: none.
        warmup_steps: in that many first steps, sparse compressors keep more (feedback.eased).

    A policy can be written as one string, which `as_policy` reads: the compressor, then options
    and rules in any order.

    >>> policy = as_policy("topk:sparsity=0.999; warmup_steps=400; name=*.bias -> none; role=activation -> mask")
    >>> policy.compressor_for("layer.bias", 5000), str(policy.compressor_for("layer.weight", 5000))
    (None, 'topk:sparsity=0.999')
    >>> as_policy(str(policy)) == policy == as_policy(policy.to_dict())
    True
    """

    compressor: Compressor | Auto | None
    min_numel: int = 1024
    error_feedback: bool | str | None = None
    exchange: str = "auto"
    bucket_bytes: int = 8 << 20
    rules: tuple = ()
    momentum: float = 0.0
    clip: float | None = None
    warmup_steps: int = 0
    feedback_decay: float | None = None
    mean: str = "ranks"
    residual: str = "float32"
    local_size: int | str = "auto"

    def __post_init__(self):
        object.__setattr__(self, "compressor", Auto.read(self.compressor) or _compressor_or_none(self.compressor))
        check_integer("min_numel", self.min_numel, 0)
        check_choice("error_feedback", self.error_feedback, (None, True, False, "ef21"))
        check_choice("exchange", self.exchange, EXCHANGES)
        check_choice("mean", self.mean, ("ranks", "senders"))
        check_choice("residual", self.residual, RESIDUALS)
        check_integer("bucket_bytes", self.bucket_bytes, 1)
        if self.local_size != "auto":
            if isinstance(self.local_size, str):
                raise ConfigError(f"local_size: got {self.local_size!r}, expected 'auto' or a number of ranks")
            check_integer("local_size", self.local_size, 1)
        if not isinstance(self.rules, (tuple, list)) or not all(isinstance(rule, (Rule, dict)) for rule in self.rules):
            raise ConfigError(f"rules: got {self.rules!r}, expected a list of gcompress.Rule")
        object.__setattr__(self, "rules", tuple(r if isinstance(r, Rule) else _made(Rule, r) for r in self.rules))
        _check_number("momentum", self.momentum, 0 <= _number(self.momentum) < 1, "0 <= momentum < 1")
        if self.clip is not None:
            _check_number("clip", self.clip, 0 < _number(self.clip) < math.inf, "a positive norm or None")
        check_integer("warmup_steps", self.warmup_steps, 0)
        if self.feedback_decay is not None:
            fine = 0 < _number(self.feedback_decay) <= 1
            _check_number("feedback_decay", self.feedback_decay, fine, "0 < feedback_decay <= 1 or None")
        self._check_exchange_and_feedback()

    def _check_exchange_and_feedback(self):
        for compressor in self._compressors() if self.exchange == "summed" else ():
            if not compressor.summable:
                raise ConfigError(f"exchange: got 'summed', expected another one: payloads of {compressor} do not add")
        for compressor in self._compressors() if self.mean == "senders" else ():
            if not compressor.sparse or self.exchange not in ("auto", "allgather") or self.error_feedback == "ef21":
                raise ConfigError(
                    f"mean: got 'senders' with {compressor}, exchange={self.exchange}, error_feedback="
                    f"{self.error_feedback}, expected sparse compressors, an all-gather and residuals"
                )
        if self.exchange == "turns" and (self.error_feedback == "ef21" or self.momentum or self.clip is not None):
            raise ConfigError("exchange: got 'turns', which remembers a residual alone: no ef21, momentum or clip")
        if self.residual != "float32" and self.error_feedback is False:
            raise ConfigError(f"residual: got {self.residual!r} with error_feedback=False: there is nothing to keep")
        if self.residual in PACKED and self.error_feedback == "ef21":
            raise ConfigError(
                f"residual: got {self.residual!r} with error_feedback=ef21, expected 'float32' or 'cpu': an estimate "
                "must stay what the other ranks know of it"
            )
        if self.error_feedback in (False, "ef21"):
            for what in ("momentum", "clip", "feedback_decay"):
                if getattr(self, what):
                    raise ConfigError(
                        f"{what}: got {getattr(self, what)}, which needs error feedback with a residual: "
                        f"got error_feedback={self.error_feedback}"
                    )
        self._check_undecided()

    def _check_undecided(self):
        for option in ("error_feedback", "momentum", "clip", "mean") if self.undecided else ():
            default = type(self).__dataclass_fields__[option].default
            if getattr(self, option) != default:
                got = shown(getattr(self, option))
                raise ConfigError(f"{option}: got {got} with {self.compressor}, which decides it: expected {default!r}")
        if self.undecided and self.exchange not in ("auto", "allgather", "twophase"):
            raise ConfigError(
                f"exchange: got {self.exchange!r} with {self.compressor}, expected auto, allgather or twophase"
            )

    def _compressors(self):
        return [each.compressor for each in (*self.rules, self) if isinstance(each.compressor, Compressor)]

    @property
    def undecided(self) -> bool:
        """Whether its compressor is yet to be chosen, by `GradientExchange.prepare` or `forecast.decide`."""
        return isinstance(self.compressor, Auto)

    def compressor_for(
        self, name: str, numel: int, *, role: str = "gradient", step: int | None = None
    ) -> Compressor | None:
        """The compressor for a tensor, or None to send it as it is.

        Args:
            name: of the parameter or the activation.
            numel: its entries.
            role: "gradient" or "activation".
            step: steps taken so far, for the warm-up; None: none is due.
        """
        compressor = self._found(name, numel, role)
        if isinstance(compressor, Auto):
            raise ConfigError(
                f"compression: got {compressor}, of which the ranks have not chosen a compressor yet: expected a call "
                "after register, DistributedOptimizer or GradientExchange.prepare"
            )
        if compressor is None or step is None or step >= self.warmup_steps:
            return compressor
        return eased(compressor, step, self.warmup_steps)

    def _found(self, name, numel, role):
        for rule in self.rules:
            if rule.matches(name, numel, role):
                return rule.compressor if numel else None
        return self.compressor if numel >= max(1, self.min_numel) else None

    def takes(self, name: str, numel: int) -> bool:
        """Whether a gradient is compressed, or may be once "auto" is decided."""
        return self._found(name, numel, "gradient") is not None

    @property
    def uses_feedback(self) -> bool:
        """Whether what is lost is remembered, for any tensor."""
        return any(map(self.feedback_for, self._compressors()))

    def feedback_for(self, compressor: Compressor) -> bool:
        """Whether what this compressor loses is remembered."""
        if self.error_feedback == "ef21":
            return not compressor.unbiased
        if self.error_feedback is None:
            return bool(self.momentum or self.clip is not None or not compressor.unbiased)
        return bool(self.error_feedback)

    @property
    def decay(self) -> float:
        """What is left of a residual when the next gradient comes."""
        return 1.0 if self.feedback_decay is None else self.feedback_decay

    def to_dict(self) -> dict:
        """The configuration as a JSON-able dict; `as_policy` reads it."""
        return {
            **_shallow(self),
            "compressor": self.compressor.to_dict() if self.compressor else None,
            "rules": [rule.to_dict() for rule in self.rules],
        }

    def __str__(self):
        items = [str(self.compressor or "none"), *_assignments(self, skip=("compressor", "rules"))]
        return "; ".join([*items, *map(str, self.rules)])


def as_policy(value: Policy | Compressor | str | dict) -> Policy:
    """A Policy from one, its dict or string, a compressor, a compressor's dict or a spec string, or "auto"."""
    if isinstance(value, Policy):
        return value
    if isinstance(value, dict) and "compressor" in value:
        return _made(Policy, value)
    if isinstance(value, str) and ";" in value:
        return _parsed(value)
    return Policy(Auto.read(value) or _compressor_or_none(value))


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    policy: Policy | Compressor | str | dict,
    *,
    weight_decay: float = 0.0,
) -> list[dict]:
    """Parameter groups for a torch optimizer whose momentum a policy takes over.

    Momentum correction belongs to the compressed parameters only: they get an optimizer's
    momentum of 0, the others the policy's. Weight decay that passes through no momentum is
    1 / (1 - momentum) times weaker; it is made up for.

    Args:
        named_parameters: (name, parameter) pairs, as of `model.named_parameters()`.
        policy: what `as_policy` takes.
        weight_decay: as for the optimizer.

    Returns:
        A list of at most two dicts, to be given to, e.g., torch.optim.SGD.
    """
    policy = as_policy(policy)
    named_parameters = list(named_parameters)
    if not policy.momentum:
        return [{"params": [parameter for _, parameter in named_parameters], "weight_decay": weight_decay}]
    compressed: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in named_parameters:
        (compressed if policy.compressor_for(name, parameter.numel()) else others).append(parameter)
    groups = [
        {"params": compressed, "momentum": 0.0, "weight_decay": weight_decay / (1 - policy.momentum)},
        {"params": others, "momentum": policy.momentum, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


def check_decided(policy: Policy, what: str) -> None:
    """ConfigError if the policy is "auto" where nothing decides it; what: that takes it."""
    if policy.undecided:
        raise ConfigError(
            f"compression: got {policy.compressor} for {what}, expected a compressor: what gradients of every step "
            "bear is not what changes of many steps do"
        )


def check_types(policy: Policy, parameters: dict[str, torch.nn.Parameter]) -> None:
    """ConfigError if the policy has a compressor for a parameter of a type that none takes.

    Args:
        policy: a Policy.
        parameters: {name: parameter}.
    """
    for name, parameter in parameters.items():
        if not parameter.is_floating_point() and policy.takes(name, parameter.numel()):
            raise ConfigError(
                f"parameter {name!r}: got {parameter.dtype}, which no compressor takes, expected a rule that leaves "
                f"it alone, such as 'name={name} -> none'"
            )


def check_momentum(policy: Policy, param_groups: list[dict], names: dict[torch.nn.Parameter, str]) -> None:
    """ConfigError if an optimizer applies momentum to parameters that have the policy's already.

    Args:
        policy: a Policy.
        param_groups: of a torch optimizer.
        names: {parameter: name}.
    """
    for group in param_groups if policy.momentum else ():
        for parameter in group["params"]:
            name = names.get(parameter)
            if name is not None and group.get("momentum") and policy.compressor_for(name, parameter.numel()):
                raise ConfigError(
                    f"momentum: got {group['momentum']} in the optimizer and {policy.momentum} in the policy for "
                    f"{name!r}, expected one of them: make the optimizer from gcompress.parameter_groups(…)"
                )


def _parsed(text):
    """The policy behind its string; see Policy."""
    first, *items = (item.strip() for item in text.split(";"))
    arguments, rules = {"compressor": first}, []
    for item in filter(None, items):
        conditions, arrow, compressor = item.partition("->")
        target = {"compressor": compressor.strip()} if arrow else arguments
        for assignment in conditions.split(",") if arrow else [item]:
            key, equals, value = (part.strip() for part in assignment.partition("="))
            if not equals or not key or key in target:
                raise ConfigError(f"policy {text!r}: got {item!r}, expected option=value or conditions -> compressor")
            target[key] = value if key == "name" else parse_value(value)
        if arrow:
            rules.append(_made(Rule, target))
    return _made(Policy, {**arguments, "rules": rules})


def _made(kind, arguments):
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise ConfigError(f"{kind.__name__.lower()}: got {unknown[0]!r}, expected some of {', '.join(known)}")
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{kind.__name__.lower()}: {error}") from None


def _compressor_or_none(value):
    return None if value in (None, "none") else from_spec(value)


def _shallow(value):
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _assignments(value, skip):
    """As "field=value": every field that is not at its default."""
    fields = [field for field in dataclasses.fields(value) if field.name not in skip]
    changed = [
        (field.name, getattr(value, field.name)) for field in fields if getattr(value, field.name) != field.default
    ]
    return [f"{name}={str(found).lower() if isinstance(found, bool) else found}" for name, found in changed]


def _number(value):
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _check_number(argument, value, fine, expected):
    if not fine:
        raise ConfigError(f"{argument}: got {shown(value)}, expected {expected}")
