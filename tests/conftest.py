import torch

# Tests start processes of their own; one thread each keeps two cores fair.
torch.set_num_threads(1)

# Not modules of tests: they are the ranks that tests start.
collect_ignore = ["byteps_workers.py", "elastic_ranks.py", "mpi_ranks.py"]
