"""Compressors that are more than one kernel, called from BytePS's threads on workers and servers.

serve.py imports this as a file, without the package, whose imports are a worker's; a server
loads torch and gcompress only when the first such payload comes.
"""

import ctypes
import functools
import traceback

CODEC = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int64,
    ctypes.c_uint32,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int64,
)


@functools.cache
def compressor_of(spec):
    """The compressor behind a spec in bytes."""
    import gcompress

    return gcompress.from_spec(spec.decode())


def tensor_at(address, kind, count, dtype):
    """A tensor of `count` entries that lie at an address."""
    import torch

    return torch.frombuffer((kind * count).from_address(address), dtype=dtype)


@CODEC
def codec(spec, numel, seed, decode, values, payload, nbytes):
    """Encode float32 values to their payload or, with `decode`, the other way round; 0 if it went well."""
    try:
        import torch

        compressor = compressor_of(spec)
        values = tensor_at(values, ctypes.c_float, numel, torch.float32)
        payload = tensor_at(payload, ctypes.c_uint8, nbytes, torch.uint8)
        if decode:
            compressor.decode_into(payload, values)
        else:
            payload.copy_(compressor.compress(values, seed=seed)[0])
    except Exception:  # an exception cannot pass through BytePS, which ends the process instead
        traceback.print_exc()
        return 1
    return 0
