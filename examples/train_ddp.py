#!/usr/bin/env python3
r"""Train the examples' CNN with torch's DistributedDataParallel, its gradients compressed by gcompress.

    torchrun --nproc-per-node 4 examples/train_ddp.py
    torchrun --nproc-per-node 4 examples/train_ddp.py --compressor quantize:bits=4 --exchange twophase
    torchrun --nproc-per-node 4 examples/train_ddp.py --compressor none

Initial weights and batches are those of train.py with the same seed and number of ranks, so that accuracies
compare. To take gcompress into a training script of your own, look for "gcompress" below: an import and one call.
"""

import dataclasses

import gcompress.plugins.ddp
import torch
import torch.distributed as dist

import gcompress
import image_data
import image_training
from gcompress.exchange.report import Report


def sum_over_ranks(values):
    totals = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(totals)
    return totals.tolist()


def main():
    parser = image_training.parser("train_ddp.py", __doc__)
    parser.add_argument(
        "--exchange", choices=gcompress.EXCHANGES, default="auto", help="how ranks come to the mean: %(default)s"
    )
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        image_data.download_if_missing("fashion-mnist", arguments.data)
    dist.barrier()

    def wrap(optimizer, model):
        model = torch.nn.parallel.DistributedDataParallel(model)
        policy = image_training.policy_of(arguments)
        if policy is None:
            return optimizer, model, Report()
        policy = dataclasses.replace(policy, exchange=arguments.exchange)
        state = gcompress.plugins.ddp.register(model, policy)  # in a checkpoint: state.state_dict(), one per rank
        if dist.get_rank() == 0:
            print(state.exchange.plan, flush=True)
        return optimizer, model, state.exchange.report

    image_training.train(
        image_training.Engine("DDP", dist.get_rank(), dist.get_world_size(), wrap, sum_over_ranks), arguments
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
