"""An example for each framework: `torchrun --nproc-per-node 2 examples/frameworks/NAME.py`."""
