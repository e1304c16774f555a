#!/usr/bin/env python3
"""Does it still learn? The Fashion-MNIST network of examples/train.py with every registered method, in one table.

    python benchmarks/convergence.py                                  # every method, about a minute each
    python benchmarks/convergence.py --policies topk:sparsity=0.99 "topk:sparsity=0.999; momentum=0.9"

Several workers take turns in this process; each has its own batches and its own `GradientExchange` with its error
feedback, and what they exchange are the real payloads. Weights, batches and dropout depend on the seed alone, and sums
have one order, so that a row prints the same figures each time on one machine. Printed are the test accuracy after the
last step, its difference to uncompressed training in points, and the bytes that a worker hands over per step (its
mean, uncompressed small tensors included) and in the last step. Methods that need momentum correction or a warm-up have
it in their policy: see `Policy`.
"""

import argparse
import multiprocessing
import os
import pathlib
import sys

import torch
from torch.nn import functional

import gcompress
from gcompress.exchange.exchange import GradientExchange

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "examples"))
import image_data  # noqa: E402
from image_training import build_model, learning_rate  # noqa: E402

POLICIES = [
    "quantize:bits=4",
    "quantize:bits=4,rounding=stochastic",
    "mask:sparsity=0.99,bits=2",
    "topk:sparsity=0.99",
    "topk:sparsity=0.99; momentum=0.9",
    "topk:sparsity=0.999; momentum=0.9; warmup_steps=160",
    "topk:sparsity=0.999; momentum=0.9; warmup_steps=160; min_numel=1024, max_numel=10000 -> topk:sparsity=0.99",
    "threshold:threshold=0.01",
    "randomk:sparsity=0.5",
    "chain:(topk:sparsity=0.99),(quantize:bits=4); momentum=0.9",
    "hybrid:(topk:sparsity=0.999),(quantize:bits=2)",
    "entropy:(quantize:bits=2)",
    "shared:bits=4",
    "lowrank:rank=8",
    "lowrank:rank=4,exchanges=2",
    "bf16",
    "fp16",
    "fp8",
    "mxfp4",
    "sign:bucket=256; momentum=0.9",
    "onebit:bucket=64; momentum=0.9",
]
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4


class Meeting:
    """The engines of several workers in one process: an operation is ready when all have started it."""

    def __init__(self, workers):
        self.workers, self._given = workers, {}

    def put(self, rank, name, tensor):
        self._given.setdefault(name, {})[rank] = tensor.clone()

    def ready(self, name):
        return len(self._given[name]) >= self.workers

    def take(self, name):
        """What all gave, in rank order; forgotten once each has taken it."""
        given = self._given[name]
        given["taken"] = given.get("taken", 0) + 1
        if given["taken"] == self.workers:
            del self._given[name]
        return [given[rank] for rank in range(self.workers)]


class MeetingEngine:
    """One worker's side of a Meeting; see gcompress/exchange/engine.py for what an engine has."""

    in_order = False

    def __init__(self, meeting, rank):
        self._meeting, self._rank = meeting, rank

    def world_size(self):
        return self._meeting.workers

    def rank(self):
        return self._rank

    def allgather(self, name, lane, payload, sizes):
        return self._start(name, payload, torch.cat)

    def allreduce(self, name, lane, tensor, op):
        stacked = {"sum": summed, "max": lambda parts: torch.stack(parts).amax(0)}[op]
        return self._start(name, tensor, stacked)

    def alltoall(self, name, lane, payload, to, back):
        return self._start(name, payload, lambda parts: torch.cat([part.split(to)[self._rank] for part in parts]))

    def _start(self, name, tensor, combine):
        self._meeting.put(self._rank, name, tensor)
        return MeetingOperation(self._meeting, name, combine)


class MeetingOperation:
    def __init__(self, meeting, name, combine):
        self._meeting, self._name, self._combine = meeting, name, combine

    def ready(self):
        return self._meeting.ready(self._name)

    def wait(self):
        return self._combine(self._meeting.take(self._name))


def summed(parts):
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


class Training:
    """Several workers that train one network, and so hold the same weights."""

    def __init__(self, policy, data, arguments):
        self.data, self.arguments = data, arguments
        torch.manual_seed(arguments.seed)
        self.model = build_model("cnn", data)
        meeting = Meeting(arguments.workers)
        engines = [MeetingEngine(meeting, rank) for rank in range(arguments.workers)]
        self.exchanges = [GradientExchange(policy, engine) for engine in engines]
        for exchange in self.exchanges if policy else ():
            exchange.prepare({name: parameter.shape for name, parameter in self.model.named_parameters()})
        self.step, self.steps = 0, arguments.epochs * (len(data.train_images) // self.global_batch)
        named = list(self.model.named_parameters())
        groups = gcompress.parameter_groups(named, policy, weight_decay=WEIGHT_DECAY) if policy else None
        parameters = groups or [{"params": [parameter for _, parameter in named], "weight_decay": WEIGHT_DECAY}]
        self.optimizer = torch.optim.SGD(parameters, lr=arguments.lr, momentum=MOMENTUM)
        # Dropout is the same whatever the policy, though some compressors draw random numbers of torch's.
        self.rng = [torch.Generator().manual_seed(1000 + rank).get_state() for rank in range(arguments.workers)]

    @property
    def global_batch(self):
        return self.arguments.batch_size * self.arguments.workers

    def train(self):
        self.model.train()
        for epoch in range(self.arguments.epochs):
            generator = torch.Generator().manual_seed(self.arguments.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.data.train_images), generator=generator)
            mirrored = torch.rand(len(order), generator=generator) < 0.5
            for index in order[: len(order) // self.global_batch * self.global_batch].split(self.global_batch):
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(self.step, self.steps, self.arguments.lr)
                self.train_step(index.split(self.arguments.batch_size), mirrored)
                self.step += 1

    def train_step(self, batches, mirrored):
        """One gradient of each worker, their exchange, one step of the optimizer they share."""
        waiting, totals = [], {}
        for rank, (exchange, index) in enumerate(zip(self.exchanges, batches, strict=True)):
            for name, gradient in self.gradients(rank, index, mirrored).items():
                if exchange.compressor_for(name, gradient.numel()) is None:
                    exchange.report.add_all_reduce(gradient.numel(), 4 * gradient.numel(), len(batches))
                    totals[name] = totals[name] + gradient if name in totals else gradient
                else:
                    waiting.append((name, exchange.start(name, gradient)))
        while sum([exchange.advance() for exchange in self.exchanges]):
            pass  # not a wait: each call moves what all workers have started
        means = {name: total / len(batches) for name, total in totals.items()}
        means.update({name: finish() for name, finish in waiting})
        for name, parameter in self.model.named_parameters():
            parameter.grad = means[name]
        self.optimizer.step()
        for exchange in self.exchanges:
            exchange.end_step()

    def gradients(self, rank, index, mirrored):
        images = self.data.train_images[index]
        images[mirrored[index]] = images[mirrored[index]].flip(3)
        torch.set_rng_state(self.rng[rank])
        self.model.zero_grad()
        functional.cross_entropy(self.model(self.data.normalised(images)), self.data.train_labels[index]).backward()
        self.rng[rank] = torch.get_rng_state()
        return {name: parameter.grad for name, parameter in self.model.named_parameters()}

    @torch.inference_mode()
    def accuracy(self):
        """Percent of the test images that are classified correctly."""
        self.model.eval()
        parts = zip(self.data.test_images.split(500), self.data.test_labels.split(500), strict=True)
        right = sum((self.model(self.data.normalised(x)).argmax(1) == y).sum().item() for x, y in parts)
        return 100 * right / len(self.data.test_labels)


def methods_of(policy):
    """The names of all methods that a policy uses."""
    found, ahead = set(), [each.compressor for each in (*policy.rules, policy) if each.compressor]
    while ahead:
        compressor = ahead.pop()
        found.add(compressor.name)
        ahead += [getattr(compressor, part) for part in compressor.parts]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=POLICIES, metavar="POLICY", help="what to train with")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64, help="images per worker and step (default 64)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings side by side, each on one core")
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate (default 0.1)")
    parser.add_argument("--seed", type=int, default=1, help="of weights, batches and dropout (default 1)")
    parser.add_argument("--data", help="folder of Fashion-MNIST")
    parser.add_argument("--baseline", type=float, help="the accuracy of uncompressed training, if it is known")
    arguments = parser.parse_args()
    policies = [gcompress.as_policy(policy) for policy in arguments.policies]
    if arguments.policies is POLICIES:  # a method that none of them uses is trained with its defaults
        missing = set(gcompress.methods()) - set().union(*map(methods_of, policies))
        policies += map(gcompress.as_policy, sorted(missing))
    print("| policy | test accuracy | to uncompressed | bytes per step | in the last |")
    print("|---|---|---|---|---|", flush=True)
    baseline = arguments.baseline
    jobs = [(policy, arguments) for policy in ([None] if baseline is None else []) + policies]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, maxtasksperchild=1) as pool:
        for (policy, _), (accuracy, report) in zip(jobs, pool.imap(trained, jobs), strict=True):
            baseline = accuracy if baseline is None else baseline
            name = f"`{policy}`" if policy else "uncompressed"
            mean = report.sent_bytes // report.steps
            print(
                f"| {name} | {accuracy:.2f} % | {accuracy - baseline:+.2f} | {mean:,} | {report.last_step_bytes:,} |",
                flush=True,
            )


def trained(job):
    """(test accuracy, report) of one policy."""
    policy, arguments = job
    torch.set_num_threads(1)
    training = Training(policy, image_data.load("fashion-mnist", arguments.data), arguments)
    training.train()
    return training.accuracy(), training.exchanges[0].report


if __name__ == "__main__":
    main()
