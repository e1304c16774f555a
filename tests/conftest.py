import torch

# Tests start processes of their own; one thread each keeps two cores fair.
torch.set_num_threads(1)
