"""How much memory a block of code asks for: tensors by a dispatch mode, arrays and objects by tracemalloc.

What C++ kernels write to is a tensor or an array that Python passes; they allocate nothing.
"""

import tracemalloc
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """Counts while it is entered; `peak` is the largest number of bytes that lived at one time."""

    def __init__(self):
        super().__init__()
        self.peak, self._living, self._tensors = 0, 0, {}

    def __enter__(self):
        tracemalloc.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._note()
        tracemalloc.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        # Of a view the storage is known; so is what was there before, which its own function did not make.
        known = {tensor.untyped_storage().data_ptr() for tensor in _tensors_in((arguments, keywords))}
        for tensor in _tensors_in(result):
            place = tensor.untyped_storage().data_ptr()
            if place in known and place not in self._tensors:
                continue
            self._tensors[place] = self._tensors.get(place, 0) + 1
            if self._tensors[place] == 1:
                self._living += tensor.untyped_storage().nbytes()
            weakref.finalize(tensor, self._forget, place, tensor.untyped_storage().nbytes())
        self._note()
        return result

    def _forget(self, place, nbytes):
        self._tensors[place] -= 1
        if not self._tensors[place]:
            del self._tensors[place]
            self._living -= nbytes

    def _note(self):
        self.peak = max(self.peak, self._living + tracemalloc.get_traced_memory()[1])


def _tensors_in(values):
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors_in(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors_in(value)


with Allocations():  # the first one imports a large part of torch
    torch.ones(1)
