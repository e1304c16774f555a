"""One method per file; this registry is the list of them."""

import dataclasses

from ..errors import ConfigError
from .base import LARGEST_DEPTH, LONGEST_SPEC, Compressor, Context, shown
from .casts import BF16, FP8, FP16, MXFP4
from .combine import Chain, Hybrid
from .eden import Eden
from .entropy import Entropy
from .lowrank import LowRank
from .mask import MaskSparse
from .natural import Natural
from .polar.method import Polar
from .qsgd import QSGD
from .quantize import Quantize
from .randomk import RandomK
from .shared import SharedScale
from .sign import OneBit, Sign
from .ternary import Ternary
from .threshold import Threshold
from .topk import TopK

REGISTRY = {
    cls.name: cls
    for cls in (
        BF16,
        Chain,
        Eden,
        Entropy,
        FP8,
        FP16,
        Hybrid,
        LowRank,
        MaskSparse,
        MXFP4,
        Natural,
        OneBit,
        Polar,
        QSGD,
        Quantize,
        RandomK,
        SharedScale,
        Sign,
        Ternary,
        Threshold,
        TopK,
    )
}


def from_dict(configuration):
    """The compressor behind `Compressor.to_dict()`; ConfigError if it is too deep or names what nobody knows."""
    if not isinstance(configuration, dict):
        raise ConfigError(f"compressor: got {shown(configuration)}, expected a dict")
    _check_depth(configuration)
    arguments = dict(configuration)
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in REGISTRY:
        raise ConfigError(f"compressor: got {shown(name)}, expected one of {', '.join(REGISTRY)}")
    known = [field.name for field in dataclasses.fields(REGISTRY[name])]
    unknown = [argument for argument in arguments if argument not in known]
    if unknown:
        raise ConfigError(f"{name}: got the argument {shown(unknown[0])}, expected some of {', '.join(known)}")
    return REGISTRY[name](**arguments)


def _check_depth(configuration):
    """ConfigError if dicts are too deep inside one another, found out level by level."""
    level = [configuration]
    for _ in range(LARGEST_DEPTH):
        # A dict that is met twice needs to be looked at once: identity keeps the walk linear.
        level = list({id(part): part for found in level for part in found.values() if isinstance(part, dict)}.values())
        if not level:
            return
    raise ConfigError(f"compressor: got dicts more than {LARGEST_DEPTH} deep, expected at most so many")


def from_spec(spec):
    """The compressor behind a spec such as "mask:sparsity=0.99,bits=2", its dict form, or itself.

    A spec has at most 1000 characters and compressors stand at most 8 deep in one another: ConfigError otherwise.
    """
    if isinstance(spec, Compressor):
        return spec
    if isinstance(spec, dict):
        return from_dict(spec)
    if not isinstance(spec, str):
        raise ConfigError(f'compressor: got {shown(spec)}, expected a spec such as "mask:sparsity=0.99,bits=2"')
    if len(spec) > LONGEST_SPEC:
        raise ConfigError(f"compressor: got {shown(spec)}, expected a spec of at most {LONGEST_SPEC} characters")
    name, _, rest = spec.strip().partition(":")
    arguments = {"name": name.strip()}
    parts = iter(getattr(REGISTRY.get(arguments["name"]), "parts", ()))
    for item in split_outside_parentheses(rest, spec):
        if item.startswith("("):
            key, equals, value = next(parts, ""), "=", item
        else:
            key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or key in arguments:
            raise ConfigError(f"compressor {spec!r}: got {item!r}, expected argument=value, each once")
        arguments[key] = value[1:-1] if value[:1] + value[-1:] == "()" else parse_value(value)
    return from_dict(arguments)


def split_outside_parentheses(text, spec):
    """The comma-separated items of a spec's arguments, where a compressor in parentheses is one item."""
    items, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if not 0 <= depth < LARGEST_DEPTH:
            break
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    if depth == LARGEST_DEPTH:
        raise ConfigError(f"compressor {spec!r}: its parentheses are {depth} deep, expected at most {depth - 1}")
    if depth != 0:
        raise ConfigError(f"compressor {spec!r}: its parentheses do not match")
    return [item.strip() for item in items if item.strip()]


def parse_value(text):
    """The bool, int, float or else str that an argument's text means."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


__all__ = ["REGISTRY", "Compressor", "Context", "from_dict", "from_spec", *(cls.__name__ for cls in REGISTRY.values())]
