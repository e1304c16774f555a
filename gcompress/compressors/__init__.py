"""One method per file; this registry is the list of them."""

import dataclasses

from ..errors import ConfigError
from .base import Compressor, Context
from .casts import BF16, FP8, FP16, MXFP4
from .eden import Eden
from .mask import MaskSparse
from .natural import Natural
from .qsgd import QSGD
from .quantize import Quantize
from .sign import OneBit, Sign
from .ternary import Ternary
from .topk import TopK

CLASSES = (BF16, FP8, FP16, MXFP4, QSGD, Eden, MaskSparse, Natural, OneBit, Quantize, Sign, Ternary, TopK)
REGISTRY = {cls.name: cls for cls in CLASSES}


def from_dict(configuration):
    """The compressor behind `Compressor.to_dict()`; ConfigError on an unknown name or argument."""
    arguments = dict(configuration)
    name = arguments.pop("name", None)
    if name not in REGISTRY:
        raise ConfigError(f"compressor: got {name!r}, expected one of {', '.join(REGISTRY)}")
    known = [field.name for field in dataclasses.fields(REGISTRY[name])]
    unknown = [argument for argument in arguments if argument not in known]
    if unknown:
        raise ConfigError(f"{name}: got the argument {unknown[0]!r}, expected some of {', '.join(known)}")
    return REGISTRY[name](**arguments)


def from_spec(spec):
    """The compressor behind a spec such as "mask:sparsity=0.99,bits=2", its dict form, or itself."""
    if isinstance(spec, Compressor):
        return spec
    if isinstance(spec, dict):
        return from_dict(spec)
    if not isinstance(spec, str):
        raise ConfigError(f'compressor: got {spec!r}, expected a spec such as "mask:sparsity=0.99,bits=2"')
    name, _, rest = spec.strip().partition(":")
    arguments = {"name": name.strip()}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or key in arguments:
            raise ConfigError(f"compressor {spec!r}: got {item!r}, expected argument=value, each once")
        arguments[key] = _parse_value(value)
    return from_dict(arguments)


def _parse_value(text):
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


__all__ = ["REGISTRY", "Compressor", "Context", "from_dict", "from_spec", *(cls.__name__ for cls in REGISTRY.values())]
