#!/usr/bin/env python3
r"""Train an image classifier with BytePS, gradients compressed in both directions by its C++ workers and servers.

Four workers and two servers on this machine, Fashion-MNIST:

    python tools/build_byteps.py
    python -m gcompress.plugins.byteps.launch -np 4 --servers 2 python examples/train_byteps.py

Another compressor, or none:

    python -m gcompress.plugins.byteps.launch -np 4 --servers 2 \
        python examples/train_byteps.py --compressor topk:sparsity=0.99
"""

import itertools
import sys

import torch

import image_training
from image_training import Engine

try:
    import byteps.torch as bps
    import gcompress.plugins.byteps as gcompress_bps
except ImportError as error:
    sys.exit(f"train_byteps.py: error: {error}; `python tools/build_byteps.py` installs what is needed")

sums = itertools.count()


def main():
    arguments = image_training.parser("train_byteps.py", __doc__).parse_args()
    gcompress_bps.init()

    def wrap(optimizer, model):
        optimizer = gcompress_bps.DistributedOptimizer(
            optimizer, model.named_parameters(), image_training.policy_of(arguments)
        )
        bps.broadcast_parameters(model.state_dict(), root_rank=0)
        return optimizer, model, gcompress_bps.exchange(optimizer).report

    def sum_over_workers(values):
        tensor = torch.tensor(values, dtype=torch.float64)
        return bps.push_pull(tensor, average=False, name=f"sum.{next(sums)}").tolist()

    image_training.train(Engine("BytePS", bps.rank(), bps.size(), wrap, sum_over_workers), arguments)


if __name__ == "__main__":
    main()
