#!/usr/bin/env python3
r"""Train an image classifier with torch's DistributedDataParallel on Gloo, gradients compressed by gcompress's hook.

Four ranks on this machine, Fashion-MNIST:

    torchrun --nproc-per-node 4 examples/train_ddp.py
    torchrun --nproc-per-node 4 examples/train_ddp.py --compressor topk:sparsity=0.99
"""

import torch
import torch.distributed as dist

import gcompress.plugins.ddp as gcompress_ddp
import image_training
from gcompress.report import Report
from image_training import Engine


def main():
    arguments = image_training.parser("train_ddp.py", __doc__).parse_args()
    dist.init_process_group("gloo")

    def wrap(optimizer, model):
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        if arguments.compressor == "none":
            return optimizer, parallel, Report()
        state = gcompress_ddp.register(parallel, image_training.policy_of(arguments))
        return optimizer, parallel, state.exchange.report

    def sum_over_ranks(values):
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    image_training.train(Engine("DDP", dist.get_rank(), dist.get_world_size(), wrap, sum_over_ranks), arguments)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
