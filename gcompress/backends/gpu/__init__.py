"""The kernels of the GPU (csrc/cuda/) through CuPy, and why they are not in use where they are not."""

from .launcher import kernels, status

__all__ = ["kernels", "status"]
