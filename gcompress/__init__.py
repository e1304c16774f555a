"""gcompress: gradient compression with real bytes on the wire.

Compressors are frozen values, `MaskSparse(sparsity=0.99, bits=2)`, with `compress`,
`decompress` and an exact `nbytes`. `gcompress.plugins.horovod` gives them to Horovod.
"""

from .compressors import Compressor, Context, from_dict, from_spec, methods
from .compressors.binmean import BinMeans
from .compressors.casts import BF16, FP8, FP16, MXFP4
from .compressors.combine import Chain, Hybrid
from .compressors.dct import Dct
from .compressors.eden import Eden
from .compressors.entropy import Entropy
from .compressors.lowrank import LowRank
from .compressors.mask import MaskSparse
from .compressors.natural import Natural
from .compressors.polar import Polar
from .compressors.qsgd import QSGD
from .compressors.quantize import Quantize
from .compressors.randomk import RandomK
from .compressors.shared import SharedScale
from .compressors.sign import OneBit, Sign
from .compressors.ternary import Ternary
from .compressors.threshold import Threshold
from .compressors.topk import TopK
from .errors import (
    ConfigError,
    ConfigMismatchError,
    ExchangeError,
    GcompressError,
    LinkError,
    NotFiniteError,
    PayloadError,
    RefusedError,
    RolledBack,
    ServerError,
)
from .exchange.saved_state import merge_states
from .outer import DeMo, OuterOptimizer
from .policy import EXCHANGES, Policy, Rule, as_policy, parameter_groups

__version__ = "0.1.0"
__all__ = [
    "BF16",
    "EXCHANGES",
    "FP16",
    "FP8",
    "MXFP4",
    "QSGD",
    "BinMeans",
    "Chain",
    "Compressor",
    "ConfigError",
    "ConfigMismatchError",
    "Context",
    "Dct",
    "DeMo",
    "Entropy",
    "Eden",
    "ExchangeError",
    "GcompressError",
    "Hybrid",
    "LowRank",
    "LinkError",
    "MaskSparse",
    "Natural",
    "NotFiniteError",
    "OneBit",
    "OuterOptimizer",
    "Polar",
    "PayloadError",
    "Policy",
    "Quantize",
    "RandomK",
    "Rule",
    "SharedScale",
    "Sign",
    "Threshold",
    "RefusedError",
    "RolledBack",
    "ServerError",
    "Ternary",
    "TopK",
    "as_policy",
    "from_dict",
    "from_spec",
    "merge_states",
    "methods",
    "parameter_groups",
]
