import torch

# Tests start processes of their own; one thread each keeps two cores fair.
torch.set_num_threads(1)

# Not modules of tests: importing them starts engines that may not be installed.
collect_ignore = ["byteps_workers.py", "mpi_ranks.py"]
