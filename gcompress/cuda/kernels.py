"""The kernels of the GPU under the names and with the arguments of the C++ ones (csrc/gcompress.h).

`DeviceKernels` plans launches and leaves them to a launcher: CuPy's on a device (launcher.py), and in tests one
that runs the same sources and the same plans on the host. Addresses are integers, as torch's `data_ptr()`.

Nothing here waits for the device, and sizes and workspaces depend on arguments alone, except where a method's
docstring says that it reads a number back.
"""

import copy

TILE = 4096  # entries that a block takes to shared memory
THREADS = 256
FOUR = 4 * THREADS  # entries a block has at four a thread
STEP_ALL, STEP_REDUCE, STEP_CODE = range(3)
SCALE_BYTES, PARTIAL_BYTES = 16, 32
CAST_NAMES = ("fp16", "fp8", "mxfp4")


def ceil_div(a, b):
    return -(-a // b)


class DeviceKernels:
    """A table of kernels for one device.

    Args:
        launcher: has `launch(module, kernel, blocks, *arguments, shared=0)`, `empty(nbytes)` and `zeros(nbytes)`.
    """

    # Compressors that have kernels; others run the torch reference on the device.
    methods = frozenset({"quantize", "sign", "onebit", "fp16", "fp8", "mxfp4", "bf16"})
    # Those whose encoder keeps the new residual of error feedback as well.
    remembers = frozenset({"quantize", "sign", "onebit", "fp16", "fp8", "mxfp4", "bf16"})

    def __init__(self, launcher):
        self._launcher = launcher
        self._feedback = (0, 0, 0)

    def remembering(self, owed, fresh, poisoned):
        """These kernels with error feedback in the encoders: they encode x + owed and write what is lost.

        Args:
            owed: address of the residual, or 0 if there is none yet.
            fresh: address of the new residual, as many float32.
            poisoned: address of a uint32 that becomes 1 where the new residual is not finite.
        """
        other = copy.copy(self)
        other._feedback = (owed, fresh, poisoned)
        return other

    def feedback_restore(self, owed, n, poisoned, fresh):
        """Put the old residual in the place of a new one that is not finite."""
        self._launch("feedback", "feedback_restore", ceil_div(n, FOUR), owed, n, poisoned, fresh)

    def _launch(self, module, kernel, blocks, *arguments, shared=0):
        self._launcher.launch(module, kernel, blocks, *arguments, shared=shared)

    def _encode_buckets(self, module, name, x, n, bucket, payload, *extra, stages=1):
        """One launch if buckets lie within a tile; else partial results, their merging and the codes apart."""
        if bucket <= TILE:
            blocks = ceil_div(n, TILE // bucket * bucket)
            arguments = (x, *self._feedback, n, bucket, STEP_ALL, 0, 0, 0, payload, *extra)
            self._launch(module, f"{name}_encode", blocks, *arguments)
            return
        buckets = ceil_div(n, bucket)
        blocks = buckets * ceil_div(bucket, TILE)
        partials = self._launcher.empty(PARTIAL_BYTES * blocks)
        scales = self._launcher.empty(SCALE_BYTES * buckets)

        def launch(kernel, count, step, stage):
            places = partials.data_ptr(), scales.data_ptr(), payload
            self._launch(module, kernel, count, x, *self._feedback, n, bucket, step, stage, *places, *extra)

        for stage in range(stages):
            launch(f"{name}_encode", blocks, STEP_REDUCE, stage)
            launch(f"{name}_finish", buckets, STEP_REDUCE, stage)
        launch(f"{name}_encode", blocks, STEP_CODE, 0)

    def quantize_encode(self, x, n, bits, bucket, stochastic, seed, payload):
        stages = 2 if bits == 1 and not stochastic else 1
        self._encode_buckets("quantize", "quantize", x, n, bucket, payload, bits, stochastic, seed, stages=stages)

    def quantize_decode(self, payload, n, bits, bucket, add, out):
        self._launch("quantize", "quantize_decode", ceil_div(n, FOUR), payload, n, bits, bucket, add, out)

    def sign_encode(self, x, n, bucket, means, payload):
        self._encode_buckets("sign", "sign", x, n, bucket, payload, means)

    def sign_decode(self, payload, n, bucket, means, add, out):
        self._launch("sign", "sign_decode", ceil_div(n, FOUR), payload, n, bucket, means, add, out)

    def cast_encode(self, x, n, form, bucket, payload):
        self._encode_buckets("cast", CAST_NAMES[form], x, n, bucket, payload)

    def cast_decode(self, payload, n, form, bucket, add, out):
        self._launch("cast", f"{CAST_NAMES[form]}_decode", ceil_div(n, FOUR), payload, n, bucket, add, out)

    def bf16_encode(self, x, n, payload):
        self._launch("cast", "bf16_encode", ceil_div(n, FOUR), x, *self._feedback, n, payload)

    def bf16_decode(self, payload, n, add, out):
        self._launch("cast", "bf16_decode", ceil_div(n, FOUR), payload, n, add, out)
