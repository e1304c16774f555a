"""Horovod's own wait spins: with more ranks than cores it takes these from the ranks that are waited for."""

from gcompress.plugins.horovod.collectives import patient_synchronize
from horovod.torch import mpi_ops


def wait_patiently():
    """Let `hvd.allgather` and the like sleep while they wait, in this process."""
    mpi_ops.synchronize = patient_synchronize
