"""gcompress for stock Horovod (0.28.1, PyTorch): importing this module activates it.

    import horovod.torch as hvd
    import gcompress.plugins.horovod
    from gcompress import MaskSparse

    optimizer = hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), compression=MaskSparse(sparsity=0.99, bits=2)
    )

`compression` may be a compressor, its spec, a `gcompress.Policy`, or one of Horovod's own.
No file of Horovod is changed: its optimizer class gets methods that start named exchanges
of packed bytes (see gcompress/exchange/ways.py) as soon as a gradient, or the last one of a
bucket, is ready and give `synchronize` a function to wait with, which Horovod supports.
Tensors below the policy's size take Horovod's all-reduce. Waiting for gradients sleeps
instead of spinning, in all its optimizers. `hvd.elastic.TorchState` hands residuals on when
ranks come or go (see elastic.py).

`exchange(optimizer)` gives this rank's `GradientExchange`: `.report` counts bytes,
`.state_dict()` holds the error feedback of this rank. Save it per rank; Horovod's
`broadcast_optimizer_state` does not touch it.

`engine()` is Horovod for `gcompress.OuterOptimizer`, which takes a plain optimizer.
"""

try:
    import horovod.torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"{error}; gcompress.plugins.horovod needs Horovod 0.28.1: pip install 'gcompress[horovod]', then gcompress "
        "install horovod"
    ) from None

from gcompress.exchange.results import exchange

from .patch import activate, engine

activate()

__all__ = ["engine", "exchange"]
