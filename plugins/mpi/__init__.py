"""gcompress over MPI with dedicated parameter servers (mpi4py, `mpirun -np 6 python train.py`).

    import gcompress.plugins.mpi as servers

    job = servers.Job(servers=2)        # the last two ranks
    if job.is_server:
        job.serve()                     # until all workers have left
        sys.exit()
    optimizer = servers.DistributedOptimizer(
        optimizer, model.named_parameters(), job, compression="mask:sparsity=0.99,bits=2"
    )
    job.broadcast(model.state_dict())   # all workers start from worker 0's values

Then train as with one process: `optimizer.step()` applies the mean over all workers. Gradients
are cut into partitions, each pushed to its server as soon as it is ready and pulled back as the
server's re-encoded mean; both directions carry the compressor's payloads, both ends have error
feedback. `exchange(optimizer)` is this worker's `Worker`, with `push`, `pull`, `push_pull`,
`.report` and `.state_dict()`: one to be saved for each worker; worker 0's has the memory of the
servers too.

When a process dies: with `on_failure="end"` (the default) the launcher reports it and ends the
job, as MPI does; a rank that hangs instead is reported by name after GCOMPRESS_TIMEOUT seconds
(300) and the job ends. With `on_failure="continue"`, which needs `mpirun --with-ft ulfm` of
Open MPI 5, the servers report a worker that died, or that others have waited for so long, and
go on with the rest: a mean is over the workers that are left. If one of them only hung, the
launcher's exit code is 1 in the end. A server cannot be replaced: when one dies, all end.
"""

try:
    import mpi4py  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"{error}; gcompress.plugins.mpi needs mpi4py: pip install 'gcompress[mpi]', and gcompress install mpi where "
        "there is no mpirun"
    ) from None

from gcompress.exchange.results import exchange

from .job import Job
from .optimizer import DistributedOptimizer
from .worker import Worker, merge_states

__all__ = ["DistributedOptimizer", "Job", "Worker", "exchange", "merge_states"]
