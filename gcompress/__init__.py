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
    Chain,
    Compressor,
    Context,
    Entropy,
    Hybrid,
    LowRank,
    MaskSparse,
    OneBit,
    Quantize,
    RandomK,
    SharedScale,
    Sign,
    Threshold,
    TopK,
    from_dict,
    from_spec,
)
from .errors import ConfigError, ConfigMismatchError, ExchangeError, GcompressError, PayloadError
from .policy import EXCHANGES, Policy, Rule, as_policy, parameter_groups

__version__ = "0.1.0"
__all__ = [
    "BF16",
    "EXCHANGES",
    "FP16",
    "FP8",
    "MXFP4",
    "REGISTRY",
    "Chain",
    "Compressor",
    "ConfigError",
    "ConfigMismatchError",
    "Context",
    "Entropy",
    "ExchangeError",
    "GcompressError",
    "Hybrid",
    "LowRank",
    "MaskSparse",
    "OneBit",
    "PayloadError",
    "Policy",
    "Quantize",
    "RandomK",
    "Rule",
    "SharedScale",
    "Sign",
    "Threshold",
    "TopK",
    "as_policy",
    "from_dict",
    "from_spec",
    "parameter_groups",
]
