"""What train.py and train_lm.py need of an engine, once for each: start, wrap the optimizer, add up, broadcast.

To take gcompress into a training script of your own, look at `wrap` of your engine, or at `outer` and its
`carrier`: an import and one call.
"""

import importlib
import itertools
import os

import torch

import gcompress


class Engine:
    """One worker's engine.

    Attributes:
        name: for people.
        install: how to get what it needs.
        lacks: options of train.py that it has no use for, and "outer" if it has no outer steps.
        rank, size: this worker and how many there are; local_rank, local_size: of those on this machine.
        exchange: this worker's side of the exchange, with `report`, `plan` and `state_dict`, once `wrap` or `outer`
            was called.
    """

    name, install = "", ""
    lacks: tuple[str, ...] = ()
    exchange = None

    def start(self, arguments):
        """Begin, once the options are known; on a rank that only serves: serve, and return False."""
        return True

    def wrap(self, optimizer, model, compression, arguments):
        """Let gradients be exchanged; returns the optimizer to step and the model to call."""
        raise NotImplementedError

    def outer(self, optimizer, model, compression, arguments):
        """Exchange the weights' change every H steps; returns the optimizer to step."""
        outer = gcompress.OuterOptimizer(
            optimizer,
            model,
            self.carrier(),
            compression=compression,
            every=arguments.every,
            lr=arguments.outer_learning_rate,
            momentum=arguments.outer_momentum,
            fragments=arguments.fragments,
            delay=arguments.delay,
        )
        self.exchange = outer.exchange
        return outer

    def carrier(self):
        """The engine that gcompress has for it, which carries what `outer` exchanges."""
        return self.plugin.engine()

    def sum(self, values):
        """The sums over the workers of a list of numbers."""
        raise NotImplementedError

    def broadcast(self, tensors):
        """Give all workers worker 0's tensors, a dict by name."""
        raise NotImplementedError

    def own_compression(self, name):
        """What the engine itself has under a name, or None."""
        return None

    def end(self):
        """Nothing more is sent."""

    def abort(self):
        """End this process with exit code 2 at once, without the interpreter's slow clean-up."""
        os._exit(2)


class Horovod(Engine):
    name, install = "Horovod", "make setup"
    lacks = ("servers", "staleness", "server_momentum", "on_failure")

    def __init__(self):
        self.plugin = importlib.import_module("gcompress.plugins.horovod")  # which makes Horovod take compressors
        self.hvd = importlib.import_module("horovod.torch")
        self.hvd.init()
        self.rank, self.size = self.hvd.rank(), self.hvd.size()
        self.local_rank, self.local_size = self.hvd.local_rank(), self.hvd.local_size()
        self._numbers = itertools.count()

    def wrap(self, optimizer, model, compression, arguments):
        optimizer = self.hvd.DistributedOptimizer(
            optimizer, named_parameters=model.named_parameters(), compression=compression
        )
        self.exchange = self.plugin.exchange(optimizer)
        return optimizer, model

    def own_compression(self, name):
        return getattr(self.hvd.Compression, name) if name in ("none", "fp16") else None

    def sum(self, values):
        name = f"sums.{next(self._numbers)}"
        return self.hvd.allreduce(torch.tensor(values, dtype=torch.float64), op=self.hvd.Sum, name=name).tolist()

    def broadcast(self, tensors):
        self.hvd.broadcast_parameters(tensors, root_rank=0)

    def abort(self):
        self.hvd.shutdown()
        super().abort()


class DistributedDataParallel(Engine):
    name, install = "DDP", "make setup"
    lacks = Horovod.lacks

    def __init__(self):
        self.plugin = importlib.import_module("gcompress.plugins.ddp")
        self.dist = importlib.import_module("torch.distributed")
        self.dist.init_process_group("gloo")
        self.rank, self.size = self.dist.get_rank(), self.dist.get_world_size()
        self.local_rank, self.local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])

    def wrap(self, optimizer, model, compression, arguments):
        network = torch.nn.parallel.DistributedDataParallel(model)
        # Without a compressor too: gcompress then counts what is all-reduced.
        self.exchange = self.plugin.register(network, compression or gcompress.Policy(None)).exchange
        return optimizer, network

    def sum(self, values):
        totals = torch.tensor(values, dtype=torch.float64)
        self.dist.all_reduce(totals)
        return totals.tolist()

    def broadcast(self, tensors):
        for tensor in tensors.values():
            self.dist.broadcast(tensor, 0)

    def end(self):
        self.dist.destroy_process_group()


class ParameterServers(Engine):
    name, install = "MPI", "make engines"
    lacks = ("exchange",)

    def __init__(self):
        self.plugin = importlib.import_module("gcompress.plugins.mpi")
        world = importlib.import_module("mpi4py.MPI").COMM_WORLD
        on_this_machine = world.Split_type(importlib.import_module("mpi4py.MPI").COMM_TYPE_SHARED)
        self.rank, self.size = world.rank, world.size  # of all ranks, until some serve
        self.local_rank, self.local_size = on_this_machine.rank, on_this_machine.size
        self._workers, self.job = world, None

    def start(self, arguments):
        self.job = self.plugin.Job(servers=arguments.servers or 1, on_failure=arguments.on_failure or "end")
        if self.job.is_server:
            received, sent = self.job.serve()
            print(f"server {self.job.rank}: received {received:,} bytes, sent {sent:,}", flush=True)
            return False
        self.rank, self.size, self._workers = self.job.rank, self.job.size, self.job.workers
        return True

    def wrap(self, optimizer, model, compression, arguments):
        optimizer = self.plugin.DistributedOptimizer(
            optimizer,
            model.named_parameters(),
            self.job,
            compression,
            staleness=arguments.staleness or 0,
            momentum=arguments.momentum if arguments.server_momentum else 0.0,
        )
        self.exchange = self.plugin.exchange(optimizer)
        return optimizer, model

    def carrier(self):
        return self.job

    def sum(self, values):
        if self.exchange is None:
            return [sum(numbers) for numbers in zip(*self._workers.allgather(values), strict=True)]
        return self.job.sum(values)  # which does without a worker that has died

    def broadcast(self, tensors):
        self.job.broadcast(tensors)


class BytePS(Engine):
    name, install = "BytePS", "make engines"
    lacks = (*Horovod.lacks, "exchange", "momentum_correction", "warmup_steps", "clip", "checkpoint", "outer")

    def __init__(self):
        self.plugin = importlib.import_module("gcompress.plugins.byteps")
        self.bps = importlib.import_module("byteps.torch")
        self.plugin.init()
        self.rank, self.size = self.bps.rank(), self.bps.size()
        self.local_rank, self.local_size = self.rank, self.size  # it does not tell which share a machine
        self._numbers = itertools.count()

    def wrap(self, optimizer, model, compression, arguments):
        optimizer = self.plugin.DistributedOptimizer(optimizer, model.named_parameters(), compression)
        self.exchange = self.plugin.exchange(optimizer)
        return optimizer, model

    def sum(self, values):
        name, tensor = f"sums.{next(self._numbers)}", torch.tensor(values, dtype=torch.float64)
        self.bps.declare(name)
        return self.bps.push_pull(tensor, average=False, name=name).tolist()

    def broadcast(self, tensors):
        self.bps.broadcast_parameters(tensors, root_rank=0)


ENGINES = {"horovod": Horovod, "ddp": DistributedDataParallel, "mpi": ParameterServers, "byteps": BytePS}
# Variables by which a launcher tells its ranks who they are.
LAUNCHED = {
    "HOROVOD_RANK": "horovod",
    "DMLC_ROLE": "byteps",
    "TORCHELASTIC_RUN_ID": "ddp",
    "OMPI_COMM_WORLD_RANK": "mpi",
    "PMI_RANK": "mpi",
}


def launched_by():
    """The name of the engine whose launcher started this process; Horovod's, which can be alone, without one."""
    return next((name for variable, name in LAUNCHED.items() if variable in os.environ), "horovod")
