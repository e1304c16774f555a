"""gcompress: gradient compression with real bytes on the wire.

Compressors are frozen values, `MaskSparse(sparsity=0.99, bits=2)`, with `compress`,
`decompress` and an exact `nbytes`. `gcompress.plugins.horovod` gives them to Horovod.
"""

from .compressors import (
    BF16,
    FP8,
    FP16,
    MXFP4,
    QSGD,
    REGISTRY,
    Compressor,
    Context,
    Eden,
    MaskSparse,
    Natural,
    OneBit,
    Quantize,
    Sign,
    Ternary,
    TopK,
    from_dict,
    from_spec,
)
from .errors import ConfigError, ConfigMismatchError, ExchangeError, GcompressError, PayloadError
from .policy import Policy, as_policy

__version__ = "0.1.0"
__all__ = [
    "BF16",
    "FP8",
    "FP16",
    "MXFP4",
    "QSGD",
    "REGISTRY",
    "Compressor",
    "ConfigError",
    "ConfigMismatchError",
    "Context",
    "Eden",
    "ExchangeError",
    "GcompressError",
    "MaskSparse",
    "Natural",
    "OneBit",
    "PayloadError",
    "Policy",
    "Quantize",
    "Sign",
    "Ternary",
    "TopK",
    "as_policy",
    "from_dict",
    "from_spec",
]
