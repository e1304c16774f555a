#!/usr/bin/env python3
r"""Train the examples' CNN with torch's DistributedDataParallel, its gradients compressed by gcompress.

    torchrun --nproc-per-node 4 examples/train_ddp.py
    torchrun --nproc-per-node 4 examples/train_ddp.py --compressor quantize:bits=4 --exchange twophase
    torchrun --nproc-per-node 4 examples/train_ddp.py --compressor none

Initial weights and batches are those of train.py with the same seed and number of ranks, so that accuracies
compare. To take gcompress into a training script of your own, look for "gcompress" below: an import and one call.
"""

import argparse
import json
import math
import os
import time

import torch
import torch.distributed as dist
from torch.nn import functional

import gcompress
import gcompress.plugins.ddp
import image_data
from small_cnn import SmallConvNet

WARMUP_FRACTION = 0.05


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--compressor", metavar="SPEC|none", default="mask:sparsity=0.99,bits=2", help="default: %(default)s")
    add("--exchange", choices=gcompress.EXCHANGES, default="auto", help="how ranks come to the mean: %(default)s")
    add("--min-numel", type=int, default=1024, help="smaller tensors go uncompressed (%(default)s)")
    add("--data", metavar="PATH", help="folder of Fashion-MNIST")
    add("--epochs", type=int, default=10, help="default: %(default)s")
    add("--batch-size", type=int, default=64, help="images per rank and step (%(default)s)")
    add("--lr", type=float, default=0.1, help="peak learning rate (%(default)s)")
    add("--seed", type=int, default=1, help="of initial weights and batches (%(default)s)")
    add("--limit-train", type=int, metavar="N", help="use the first N training images only")
    add("--limit-test", type=int, metavar="N", help="use the first N test images only")
    add("--log-file", metavar="FILE", help="write the last epoch's figures as JSON")
    return parser.parse_args()


def batches(data, epoch, steps, arguments):
    """This rank's batches: its share of one order that all ranks draw alike, and train.py as well."""
    generator = torch.Generator().manual_seed(arguments.seed * 1_000_003 + epoch)
    count, size, ranks = len(data.train_images), arguments.batch_size, dist.get_world_size()
    order = torch.randperm(count, generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    for index in order[: steps * size * ranks].view(steps, ranks, size)[:, dist.get_rank()]:
        images, mirror = data.train_images[index], mirrored[index]
        images[mirror] = images[mirror].flip(3)
        yield data.normalised(images), data.train_labels[index]


def learning_rate(step, total, peak):
    """A linear warm-up, then a cosine to zero."""
    warmup = max(1, round(WARMUP_FRACTION * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def test_accuracy(model, data):
    """The fraction of all test images classified correctly; each rank takes its share."""
    model.eval()
    share = slice(dist.get_rank(), None, dist.get_world_size())
    images, labels = data.test_images[share], data.test_labels[share]
    with torch.inference_mode():
        outputs = [model(data.normalised(part)).argmax(1) for part in images.split(500)]
    counts = torch.tensor([float((torch.cat(outputs) == labels).sum()), float(len(labels))], dtype=torch.float64)
    dist.all_reduce(counts)
    model.train()
    return float(counts[0] / counts[1])


def main():
    arguments = parse_arguments()
    dist.init_process_group("gloo")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    first = dist.get_rank() == 0
    if first:
        image_data.download_if_missing("fashion-mnist", arguments.data)
    dist.barrier()
    data = image_data.load("fashion-mnist", arguments.data, None, arguments.limit_train, arguments.limit_test)
    torch.manual_seed(arguments.seed)
    network = SmallConvNet(data.image_shape[0], data.classes)
    torch.manual_seed(arguments.seed * 1_000_003 + 1 + dist.get_rank())  # dropout differs between ranks
    model = torch.nn.parallel.DistributedDataParallel(network)
    state = None
    if arguments.compressor != "none":
        policy = gcompress.Policy(arguments.compressor, min_numel=arguments.min_numel, exchange=arguments.exchange)
        state = gcompress.plugins.ddp.register(model, policy)  # in a checkpoint: state.state_dict(), one per rank
        if first:
            print(state.exchange.plan, flush=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.lr, momentum=0.9, weight_decay=1e-4)
    steps = len(data.train_images) // (arguments.batch_size * dist.get_world_size())
    step, seconds, record = 0, 0.0, {}
    for epoch in range(arguments.epochs):
        started = time.perf_counter()
        for images, labels in batches(data, epoch, steps, arguments):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps * arguments.epochs, arguments.lr)
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            step += 1
        seconds += time.perf_counter() - started
        accuracy = test_accuracy(network, data)
        record = {"compressor": arguments.compressor, "epoch": epoch + 1, "step": step, "test_accuracy": accuracy}
        record |= {"seconds": seconds, **(state.exchange.report.as_dict() if state else {})}
        if first:
            print(
                f"epoch {epoch + 1:>2}  loss {loss.item():.4f}  test {100 * accuracy:.2f} %  {seconds:.1f} s",
                flush=True,
            )
    if first and state:
        print(state.exchange.report, flush=True)
    if first and arguments.log_file:
        with open(arguments.log_file, "w", encoding="utf-8") as file:
            json.dump({"world_size": dist.get_world_size(), **record}, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
