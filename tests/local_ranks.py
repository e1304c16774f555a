"""Ranks as threads of one process, with an engine that checks what real ones only suffer from.

`ThreadEngine` is the shortest implementation of `gcompress.exchange.engine.Engine`: one to start from.
The arithmetic and the wire are those of real ranks but for the wire itself; completion is
delayed at random. tests/test_horovod.py and tests/test_ddp.py run the same on real engines.
"""

import random
import threading
import time

import torch

from gcompress.exchange.engine import wait_until
from gcompress.exchange.exchange import GradientExchange
from gcompress.exchange.node_engine import NodeEngine, Topology

TIMEOUT_SECONDS = 60


class World:
    """Where the operations of all ranks meet: by name, or (in_order) by their number in a lane."""

    def __init__(self, size, in_order=False, seed=0, delays=3):
        self.size, self.in_order, self.delays = size, in_order, delays
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.failed = False
        self.posted, self.counts, self.sent_bytes = {}, {}, [0] * size

    def post(self, rank, name, lane, kind, tensor, *arguments):
        with self.lock:
            key = name
            if self.in_order:
                key = (lane, self.counts.get((rank, lane), 0))
                self.counts[rank, lane] = key[1] + 1
            meeting = self.posted.setdefault(key, {})
            for other in meeting.values():
                assert other[:2] == (name, kind), f"rank {rank} brings {name, kind}, another one {other[:2]}"
            assert rank not in meeting, f"{name} was started twice"
            meeting[rank] = (name, kind, tensor.clone(), arguments)
            if len(meeting) == self.size:
                del self.posted[key]  # the name may be used again
            return ThreadOperation(self, meeting, rank, self.random.randint(0, self.delays))


class PartOfWorld(World):
    """Where some of the ranks meet; it fails with the world."""

    def __init__(self, world, size):
        self._world = world
        super().__init__(size, world.in_order, world.random.random(), world.delays)

    @property
    def failed(self):
        return self._world.failed

    @failed.setter
    def failed(self, value):
        self._world.failed = value


class ThreadOperation:
    """An operation under way; see `Operation`."""

    def __init__(self, world, meeting, rank, delay):
        self.world, self.meeting, self.rank, self.delay = world, meeting, rank, delay

    def ready(self):
        if self.world.failed:
            raise RuntimeError("another rank has failed")
        self.delay -= 1  # a few polls find nothing, as on a network
        return len(self.meeting) == self.world.size and self.delay < 0

    def tensors(self):
        """What the ranks gave, in their order."""
        return [self.meeting[rank][2] for rank in range(self.world.size)]

    def wait(self):
        assert len(self.meeting) == self.world.size
        _, kind, own, arguments = self.meeting[self.rank]
        tensors = self.tensors()
        sent = self.world.sent_bytes
        others = self.world.size - 1
        if kind == "allreduce":
            sent[self.rank] += 2 * others * own.numel() * own.element_size() // self.world.size
            stacked = torch.stack(tensors)
            return stacked.sum(0) if arguments[0] == "sum" else stacked.amax(0)
        if kind == "allgather":
            sent[self.rank] += others * own.numel()
            assert [tensor.numel() for tensor in tensors] == list(arguments[0])
            return torch.cat(tensors)
        to, back = arguments
        sent[self.rank] += own.numel() - to[self.rank]
        parts = [self.meeting[rank][2].split(self.meeting[rank][3][0])[self.rank] for rank in range(self.world.size)]
        assert [part.numel() for part in parts] == list(back)
        return torch.cat(parts)


class ThreadEngine:
    """One rank's engine; see `Engine`."""

    def __init__(self, world, rank):
        self.world, self._rank, self.in_order = world, rank, world.in_order

    def world_size(self):
        return self.world.size

    def rank(self):
        return self._rank

    def gather_texts(self, text):
        payload = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        operation = self.world.post(self._rank, "texts", 0, "texts", payload)
        wait_until(operation.ready, "the ranks' texts")
        return [bytes(each.tolist()).decode() for each in operation.tensors()]

    def allgather(self, name, lane, payload, sizes):
        return self.world.post(self._rank, name, lane, "allgather", payload, sizes)

    def alltoall(self, name, lane, payload, to, back):
        return self.world.post(self._rank, name, lane, "alltoall", payload, to, back)

    def allreduce(self, name, lane, tensor, op):
        return self.world.post(self._rank, name, lane, "allreduce", tensor, op)


def engines_of_nodes(world, local_size):
    """(A function that makes a rank's engine by nodes, [where peers meet]) of a world's ranks."""
    topology = Topology(world.size // local_size, local_size, "a test says so")
    nodes = [PartOfWorld(world, local_size) for _ in range(topology.nodes)]
    peers = [PartOfWorld(world, topology.nodes) for _ in range(local_size)]

    def make(world, rank):
        node, local = divmod(rank, local_size)
        own = ThreadEngine(nodes[node], local), ThreadEngine(peers[local], node)
        return NodeEngine(ThreadEngine(world, rank), *own, topology)

    return make, peers


def run_ranks(world, policy, function, make_engine=ThreadEngine):
    """[function(rank, exchange) of every rank], each in a thread; the first error of any rank is raised."""
    results, errors = [None] * world.size, []

    def run(rank):
        try:
            results[rank] = function(rank, GradientExchange(policy, make_engine(world, rank)))
        except BaseException as error:
            errors.append(error)
            world.failed = True  # which ends the others

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world.size)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + TIMEOUT_SECONDS
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
    if not errors and any(thread.is_alive() for thread in threads):
        world.failed = True
        raise AssertionError("the ranks hang")
    if errors:
        raise errors[0]
    return results
