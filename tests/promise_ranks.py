"""One rank of tests/test_promises.py: `promise_ranks.py ENGINE OUT [PROMISE…]` under the engine's launcher.

Every rank writes {promise: "ok" or its error} to OUT.RANK.
"""

import contextlib
import itertools
import json
import sys
import traceback

import torch

import gcompress
import tests.promises_of_auto  # noqa: F401 (adds to PROMISES)
import tests.promises_of_layers  # noqa: F401
import tests.promises_of_memory  # noqa: F401
import tests.promises_of_outer  # noqa: F401
import tests.promises_of_refusals  # noqa: F401
import tests.promises_of_times  # noqa: F401
from gcompress.feedback import EstimateFeedback
from tests.placement import place_for_horovodrun, place_for_torchrun
from tests.promises import PROMISES, Trainer, sgd

LOCAL_SIZE = 2


class Ddp(Trainer):
    engine = "ddp"

    def __init__(self, model, compression, make_optimizer=sgd, *, scaler=None, unused=False):
        from gcompress.plugins import ddp

        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.model = model
        options = {"bucket_cap_mb": 0.04, "find_unused_parameters": unused}
        self.parallel = torch.nn.parallel.DistributedDataParallel(model, **options)
        self.state = ddp.register(self.parallel, compression, scaler=scaler)
        self.exchange = ddp.exchange(self.state)
        self.optimizer = make_optimizer(list(model.parameters()))

    def call(self, x):
        return self.parallel(x)

    def gather(self, tensor):
        rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, tensor.contiguous())
        return rows

    @staticmethod
    @contextlib.contextmanager
    def outer_engine():
        from gcompress.plugins import ddp

        yield ddp.engine(), dist.get_rank(), dist.get_world_size()


class Horovod(Trainer):
    engine = "horovod"

    def __init__(self, model, compression, make_optimizer=sgd, *, scaler=None, unused=False):
        import gcompress.plugins.horovod as plugin

        self.rank, self.size, self.model = hvd.rank(), hvd.size(), model
        optimizer = make_optimizer(list(model.parameters()))
        self.optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=compression)
        self.exchange = plugin.exchange(self.optimizer)
        self.exchange.scaler = scaler

    def synchronize(self):
        self.optimizer.synchronize()

    def step(self, scaler=None):
        with self.optimizer.skip_synchronize():
            super().step(scaler)

    def gather(self, tensor):
        return list(hvd.allgather(tensor.unsqueeze(0).clone(), name="gathered").unbind(0))

    @staticmethod
    @contextlib.contextmanager
    def outer_engine():
        import gcompress.plugins.horovod as plugin

        yield plugin.engine(), hvd.rank(), hvd.size()


class ByNodes:
    """Four ranks that are told that they are on two nodes; what a rank remembers of its shares is shown as a whole."""

    local_size = LOCAL_SIZE

    def memory(self):
        found, feedback = super().memory(), self.exchange.feedback
        state = self.exchange.state_dict()
        if "shares" not in state:  # flat: of a policy whose exchange cannot be by nodes
            return found
        shares = state["shares"]
        sizes = {name: stop - start for name, (start, stop) in shares.items()}
        for kind, vectors in feedback.vectors_of(feedback.checked(state["feedback"], sizes)).items():
            for name, vector in vectors.items():
                key = f"feedback/{kind}/{name}" if f"feedback/{kind}/{name}" in found else f"feedback/{name}"
                # A node's mean was encoded, as if each of its ranks had had it.
                found[key] = torch.zeros(self.exchange.plan.entries[name].numel)
                found[key][slice(*shares[name])] = vector * self.local_size
        if isinstance(self.exchange.feedback, EstimateFeedback):
            for name, entry in self.exchange.plan.entries.items():
                if entry.compressor:  # a rank may have no share of it
                    for kind in ("residual", "delivered"):
                        found.setdefault(f"feedback/{kind}/{name}", torch.zeros(entry.numel))
                    # Each rank of a node has delivered its share.
                    found[f"feedback/delivered/{name}"] = self.mean(found[f"feedback/delivered/{name}"])
        return found


class DdpByNodes(ByNodes, Ddp):
    pass


class HorovodByNodes(ByNodes, Horovod):
    pass


class Mpi(Trainer):
    engine = "mpi"

    def __init__(self, model, compression, make_optimizer=sgd, *, unused=False, **options):
        world.bcast(True, root=0)  # the server makes its Job for this trainer
        self.job = servers.Job(1)
        self.rank, self.size, self.model = self.job.rank, self.job.size, model
        optimizer = make_optimizer(list(model.parameters()))
        self.optimizer = servers.DistributedOptimizer(
            optimizer, model.named_parameters(), self.job, compression, **options
        )
        self.exchange = servers.exchange(self.optimizer)

    def __exit__(self, *error):
        self.job.close()

    def synchronize(self):
        self.optimizer.synchronize()

    def gather(self, tensor):
        return self.job.workers.allgather(tensor)

    @staticmethod
    @contextlib.contextmanager
    def outer_engine():
        world.bcast(True, root=0)
        job = servers.Job(1)
        try:
            yield job, job.rank, job.size
        finally:
            job.close()

    def state_of_all(self):
        return servers.merge_states(self.job.workers.allgather(self.exchange.state_dict()))

    def residuals_of_servers(self, name, numel):
        residuals = torch.zeros(numel)
        for key, memory in self.exchange.state_dict()["servers"].items():
            part, head = self.exchange.partitions[key], memory[:24].clone().view(torch.int64)
            if part.name == name and head[1]:
                residual = memory[24 : 24 + 4 * part.numel].clone().view(torch.float32)
                residuals[part.start : part.start + part.numel] = residual
        return residuals


class Byteps(Trainer):
    engine, remembers, random = "byteps", False, False
    numbers = itertools.count()

    def __init__(self, model, compression, make_optimizer=sgd, *, scaler=None, unused=False):
        self.rank, self.size, self.model = bps.rank(), bps.size(), model
        number = next(self.numbers)  # BytePS keeps what it knows of a name for good
        if gcompress.as_policy(compression).exchange == "summed":  # nothing, and seeds are made of names
            number, compression = "summed", byteps_plugin.Compression(compression)
        named = [(f"{number}.{name}", p) for name, p in model.named_parameters()]
        optimizer = make_optimizer(list(model.parameters()))
        self.optimizer = byteps_plugin.DistributedOptimizer(optimizer, named, compression, scaler=scaler)
        self.exchange = byteps_plugin.exchange(self.optimizer)

    def synchronize(self):
        self.optimizer.synchronize()

    def step(self, scaler=None):
        with self.optimizer.skip_synchronize():
            super().step(scaler)

    def gather(self, tensor):
        table = torch.zeros(self.size, tensor.numel())
        table[self.rank] = tensor.reshape(-1)
        table = bps.push_pull(table, average=False, name=f"gathered.{next(self.numbers)}")
        return [row.view(tensor.shape) for row in table]


TRAINERS = {each.engine: each for each in (Ddp, Horovod, Mpi, Byteps)}
TRAINERS |= {"ddp_by_nodes": DdpByNodes, "horovod_by_nodes": HorovodByNodes}


def start(engine):
    """Start the engine; returns this rank, or None on a server that has served all trainers."""
    global dist, hvd, bps, byteps_plugin, servers, world
    if engine in ("ddp", "ddp_by_nodes"):
        import datetime

        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
        if engine == "ddp_by_nodes":
            place_for_torchrun(dist.get_rank(), LOCAL_SIZE)
        return dist.get_rank()
    if engine in ("horovod", "horovod_by_nodes"):
        import horovod.torch as hvd

        from tests.patience import wait_patiently

        if engine == "horovod_by_nodes":
            place_for_horovodrun(LOCAL_SIZE)
        hvd.init()
        wait_patiently()
        return hvd.rank()
    if engine == "byteps":
        import byteps.torch as bps
        import gcompress.plugins.byteps as byteps_plugin

        byteps_plugin.init()
        return bps.rank()
    import gcompress.plugins.mpi as servers

    world = servers.job.MPI.COMM_WORLD
    if world.rank < world.size - 1:
        return world.rank
    while world.bcast(None, root=0):
        try:
            servers.Job(1).serve()
        except (gcompress.ConfigMismatchError, gcompress.ConfigError):
            pass  # which the workers must be told, too
    return None


def main():
    engine, out, *names = sys.argv[1:]
    torch.set_num_threads(1)
    rank = start(engine)
    if rank is None:
        return
    trainer, results = TRAINERS[engine], {}

    def new(*arguments, **options):
        return trainer(*arguments, **options)

    new.trainer, new.rank = trainer, rank
    for name, (function, engines) in PROMISES.items():
        if (names and name not in names) or (engines and trainer.engine not in engines):
            continue
        try:
            function(new)
            results[name] = "ok"
        except Exception:
            results[name] = traceback.format_exc()
        with open(f"{out}.{rank}", "w") as file:
            json.dump(results, file)
    if engine == "mpi":
        world.bcast(False, root=0)
    if trainer.engine == "ddp":
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
