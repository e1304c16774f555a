"""A compressor's text and dict: `from_spec` and `from_dict` read what `Compressor.spec` and `to_dict` write."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import logging

from ..checks import shown
from ..errors import ConfigError
from .base import LARGEST_DEPTH, LONGEST_SPEC, REGISTRY, Compressor

ENTRY_POINTS = "gcompress.compressors"  # the group by which other packages add methods: name = package.module:Class

log = logging.getLogger(__name__)


def methods() -> dict[str, type[Compressor]]:
    """{name: class} of all methods, those of other packages among them."""
    _load_entry_points()
    return dict(REGISTRY)


@functools.cache
def _load_entry_points():
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            method = point.load()
            if REGISTRY.get(point.name) is not method:
                raise ConfigError(f"got {method!r}, expected a Compressor of the name {point.name!r}")
        except Exception as error:  # whatever is wrong with another package, this one works
            log.warning("the compressor %r of %s is left out: %s", point.name, point.value, error)


def _method(name):
    """The class of a method, or None."""
    if name not in REGISTRY:
        _load_entry_points()
    return REGISTRY.get(name)


def from_dict(configuration: dict) -> Compressor:
    """The compressor that `Compressor.to_dict()` describes; ConfigError if it is too deep or names no known method."""
    if not isinstance(configuration, dict):
        raise ConfigError(f"compressor: got {shown(configuration)}, expected a dict")
    _check_depth(configuration)
    arguments = dict(configuration)
    name = arguments.pop("name", None)
    method = _method(name) if isinstance(name, str) else None
    if method is None:
        raise ConfigError(f"compressor: got {shown(name)}, expected one of {', '.join(sorted(methods()))}")
    known = [field.name for field in dataclasses.fields(method)]
    unknown = [argument for argument in arguments if argument not in known]
    if unknown:
        raise ConfigError(f"{name}: got the argument {shown(unknown[0])}, expected some of {', '.join(known)}")
    return method(**arguments)


def _check_depth(configuration):
    """ConfigError if dicts are nested too deep. Goes level by level, without recursion."""
    level = [configuration]
    for _ in range(LARGEST_DEPTH):
        # A dict that is met twice needs to be looked at once: identity keeps the walk linear.
        level = list({id(part): part for found in level for part in found.values() if isinstance(part, dict)}.values())
        if not level:
            return
    raise ConfigError(f"compressor: got dicts more than {LARGEST_DEPTH} deep, expected at most that many")


def from_spec(spec: Compressor | str | dict) -> Compressor:
    """The compressor of a spec such as "mask:sparsity=0.99,bits=2", or of its dict; a compressor is returned as it is.

    ConfigError if a spec has more than 1000 characters, or if compressors are nested more than 8 deep.
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
    arguments: dict[str, object] = {"name": name.strip()}
    parts = iter(getattr(_method(name.strip()), "parts", ()))
    for item in split_outside_parentheses(rest, spec):
        if item.startswith("("):
            key, equals, value = next(parts, ""), "=", item
        else:
            key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or key in arguments:
            raise ConfigError(f"compressor {spec!r}: got {item!r}, expected argument=value, each once")
        arguments[key] = value[1:-1] if value[:1] + value[-1:] == "()" else parse_value(value)
    return from_dict(arguments)


def split_outside_parentheses(text: str, spec: str) -> list[str]:
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


def parse_value(text: str) -> bool | int | float | str:
    """The bool, int, float or else str that an argument's text means."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def read_parts(compressor: Compressor) -> None:
    """Let a compressor's parts be specs or dicts (for its `__post_init__`); ConfigError if too deep or too long."""
    for part in compressor.parts:
        found = from_spec(getattr(compressor, part))
        if found.depth >= LARGEST_DEPTH:
            raise ConfigError(
                f"{part}: got compressors {found.depth} deep, expected at most {LARGEST_DEPTH - 1} "
                f"in {compressor.name!r}"
            )
        object.__setattr__(compressor, part, found)
    if len(compressor.spec) > LONGEST_SPEC:
        raise ConfigError(
            f"{compressor.name}: got parts whose spec has {len(compressor.spec)} characters, more than {LONGEST_SPEC}"
        )
