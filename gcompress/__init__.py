"""gcompress: gradient compression with real bytes on the wire.

Compressors are frozen values, `MaskSparse(sparsity=0.99, bits=2)`, with `compress`,
`decompress` and an exact `nbytes`. `gcompress.plugins.horovod` gives them to Horovod.
"""

from .compressors import (
    BF16,
    FP8,
    FP16,
    MXFP4,
    REGISTRY,
    Compressor,
    Context,
    Eden,
    MaskSparse,
    OneBit,
    Quantize,
    Sign,
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
    "REGISTRY",
    "Compressor",
    "ConfigError",
    "ConfigMismatchError",
    "Context",
    "Eden",
    "ExchangeError",
    "GcompressError",
    "MaskSparse",
    "OneBit",
    "PayloadError",
    "Policy",
    "Quantize",
    "Sign",
    "TopK",
    "as_policy",
    "from_dict",
    "from_spec",
]
