"""gcompress for torch's DistributedDataParallel, on Gloo or NCCL.

    model = torch.nn.parallel.DistributedDataParallel(model)
    state = gcompress.plugins.ddp.register(model, "mask:sparsity=0.99,bits=2")

`exchange(state)`, or `state.exchange`, is this rank's `GradientExchange`: `.report` counts bytes, `.plan` says how
the gradients travel. `state.state_dict()` holds the error feedback of this rank: save it per
rank. It is kept by parameter, so that DDP may rebuild its buckets, which it does after the
first step. What the policy leaves uncompressed is all-reduced, all of a bucket in one tensor.

`engine()` is torch.distributed for `gcompress.OuterOptimizer`, which takes the plain model.
"""

from gcompress.exchange.results import exchange

from .hook import GradientState, compress, register
from .process_group import engine

__all__ = ["GradientState", "compress", "engine", "exchange", "register"]
