#!/usr/bin/env python3
r"""Train an image classifier with MPI parameter servers, gradients compressed in both directions.

Four workers and two servers on this machine, Fashion-MNIST:

    mpirun -np 6 python examples/train_ps.py --servers 2

(`python tools/install_mpi.py` installs mpi4py, and Open MPI where there is none.) Another compressor, or none:

    mpirun -np 6 python examples/train_ps.py --servers 2 --compressor topk:sparsity=0.99
    mpirun -np 6 python examples/train_ps.py --servers 2 --compressor none

Workers that may be three rounds ahead of the slowest one, and momentum kept by the servers:

    mpirun -np 6 python examples/train_ps.py --servers 2 --staleness 3 --server-momentum

Go on with the rest when a worker dies:

    mpirun --with-ft ulfm -np 6 python examples/train_ps.py --servers 2 --on-failure continue
"""

import sys

import image_training
from image_training import Engine

try:
    import gcompress.plugins.mpi as mpi
except ImportError as error:
    sys.exit(f"train_ps.py: error: {error}; `python tools/install_mpi.py` installs what is needed")


def main():
    parser = image_training.parser("train_ps.py", __doc__)
    parser.add_argument("--servers", type=int, default=1, help="ranks that serve (%(default)s)")
    parser.add_argument("--staleness", type=int, default=0, help="rounds that workers may be ahead (%(default)s)")
    parser.add_argument("--server-momentum", action="store_true", help="the servers keep --momentum")
    parser.add_argument("--on-failure", choices=("end", "continue"), default="end", help="default: %(default)s")
    arguments = parser.parse_args()
    job = mpi.Job(servers=arguments.servers, on_failure=arguments.on_failure)
    if job.is_server:
        received, sent = job.serve()
        print(f"server {job.rank}: received {received:,} bytes, sent {sent:,}", flush=True)
        return

    def wrap(optimizer, model):
        job.broadcast(model.state_dict())
        optimizer = mpi.DistributedOptimizer(
            optimizer,
            model.named_parameters(),
            job,
            image_training.policy_of(arguments),
            staleness=arguments.staleness,
            momentum=arguments.momentum if arguments.server_momentum else 0.0,
        )
        return optimizer, model, mpi.exchange(optimizer).report

    engine = Engine("MPI servers", job.rank, job.size, wrap, job.sum)
    image_training.train(engine, arguments, optimizer_momentum=0.0 if arguments.server_momentum else None)


if __name__ == "__main__":
    main()
