"""gcompress inside BytePS (0.2.5.post15, PyTorch): its workers and servers run our compressors.

    import byteps.torch as bps
    import gcompress.plugins.byteps as gcompress_bps
    from gcompress import MaskSparse

    gcompress_bps.init()
    optimizer = gcompress_bps.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), compression=MaskSparse(sparsity=0.99, bits=2)
    )
    bps.broadcast_parameters(model.state_dict(), root_rank=0)

    python -m gcompress.plugins.byteps.launch -np 2 --servers 1 python train.py

Each tensor's compressor follows from the policy, per tensor; workers push payloads, servers
decode, add and encode the sum again, both with error feedback, and workers pull payloads. Every
compressor of fixed size will do: those that are one kernel run in C++ alone (methods.py lists
them), others are called in Python from BytePS's threads. What the policy leaves alone goes as
BytePS sends it. `tools/build_byteps.py` builds BytePS (it is not built for CPUs or today's
torch as released) and the libraries with our compressors.

`Compression` is the other way in, for compressors whose payloads add up without being decoded
(`summable`): BytePS then sums the payloads and knows nothing of them.

`exchange(optimizer)` has the `.report` of bytes. Residuals live in BytePS's C++ objects and are
not saved: after a restart, what was not sent in the last step is lost.
"""

from gcompress.exchange.results import exchange

from .payload_sums import Compression
from .push_pull import DistributedOptimizer
from .workers import init

__all__ = ["Compression", "DistributedOptimizer", "exchange", "init"]
