"""gcompress: gradient compression with real bytes on the wire.

Compressors are frozen values, `MaskSparse(sparsity=0.99, bits=2)`, with `compress`,
`decompress` and an exact `nbytes`. `gcompress.plugins.horovod` gives them to Horovod.
"""

from .compressors import (
    REGISTRY,
    Chain,
    Compressor,
    Context,
    Entropy,
    Hybrid,
    LowRank,
    MaskSparse,
    Quantize,
    RandomK,
    SharedScale,
    Threshold,
    TopK,
    from_dict,
    from_spec,
)
from .errors import ConfigError, ConfigMismatchError, ExchangeError, GcompressError, PayloadError
from .policy import EXCHANGES, Policy, Rule, as_policy, parameter_groups

__version__ = "0.1.0"
__all__ = [
    "EXCHANGES",
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
    "PayloadError",
    "Policy",
    "Quantize",
    "RandomK",
    "Rule",
    "SharedScale",
    "Threshold",
    "TopK",
    "as_policy",
    "from_dict",
    "from_spec",
    "parameter_groups",
]
