"""gcompress: gradient compression with real bytes on the wire.

Compressors are frozen values, `MaskSparse(sparsity=0.99, bits=2)`, with `compress`,
`decompress` and an exact `nbytes`. `gcompress.plugins.horovod` gives them to Horovod.
"""

from .compressors import (
    REGISTRY,
    Compressor,
    Context,
    MaskSparse,
    Quantize,
    RandomK,
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
    "Compressor",
    "ConfigError",
    "ConfigMismatchError",
    "Context",
    "ExchangeError",
    "GcompressError",
    "MaskSparse",
    "PayloadError",
    "Policy",
    "Quantize",
    "RandomK",
    "Rule",
    "Threshold",
    "TopK",
    "as_policy",
    "from_dict",
    "from_spec",
    "parameter_groups",
]
