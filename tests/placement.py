"""Ranks of one host that are told that they are on several nodes, in the words of their launcher."""

import os


def place_for_torchrun(rank, local_size):
    node, local = divmod(rank, local_size)
    os.environ.update(GROUP_RANK=str(node), LOCAL_RANK=str(local), LOCAL_WORLD_SIZE=str(local_size))


def place_for_horovodrun(local_size):
    """Before hvd.init(): as ranks to whose hosts horovodrun comes by ssh."""
    node, local = divmod(int(os.environ["HOROVOD_RANK"]), local_size)
    nodes = int(os.environ["HOROVOD_SIZE"]) // local_size
    os.environ.update(HOROVOD_HOSTNAME=f"node-{node}", HOROVOD_LOCAL_RANK=str(local), HOROVOD_CROSS_RANK=str(node))
    os.environ.update(HOROVOD_LOCAL_SIZE=str(local_size), HOROVOD_CROSS_SIZE=str(nodes))
