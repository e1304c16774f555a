"""gcompress: gradient compression with real bytes on the wire.

Compressors are frozen values, `MaskSparse(sparsity=0.99, bits=2)`, with `compress`,
`decompress` and an exact `nbytes`. `gcompress.plugins.horovod` gives them to Horovod.
"""

from .compressors import REGISTRY, Compressor, Context, MaskSparse, Quantize, TopK, from_dict, from_spec
from .errors import (
    ConfigError,
    ConfigMismatchError,
    ExchangeError,
    GcompressError,
    LinkError,
    PayloadError,
    RefusedError,
    RolledBack,
)
from .policy import Policy, as_policy

__version__ = "0.1.0"
__all__ = [
    "REGISTRY",
    "Compressor",
    "ConfigError",
    "ConfigMismatchError",
    "Context",
    "ExchangeError",
    "GcompressError",
    "LinkError",
    "MaskSparse",
    "PayloadError",
    "Policy",
    "Quantize",
    "RefusedError",
    "RolledBack",
    "TopK",
    "as_policy",
    "from_dict",
    "from_spec",
]
