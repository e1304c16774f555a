"""Compressors as BytePS's C++ side knows them: the name of a row, and integers for its kernels.

`METHODS` is the whole mapping; compressor.cc has a row of each name that passes the integers
on. Any other compressor of fixed size, such as polar, whose encoder is more than one call of a
kernel, is called in Python from BytePS's threads, by its spec (callback.py).
"""

from gcompress import BF16, FP8, FP16, MXFP4, OneBit, Sign
from gcompress.compressors.base import Compressor, kept_count, selection_words
from gcompress.compressors.mask import MaskSparse
from gcompress.compressors.quantize import Quantize
from gcompress.compressors.randomk import RandomK
from gcompress.compressors.topk import FORMS, TopK
from gcompress.errors import ConfigError


def _quantize(compressor, numel):
    return compressor.bits, compressor._bucket(numel), compressor.unbiased


def _mask(compressor, numel):
    kept = kept_count(numel, compressor.sparsity)
    return kept, compressor.bits, compressor.signed, compressor.levels == "lloyd"


def _topk(compressor, numel):
    form, width, _ = compressor._layout(numel)
    k, of_chunk = compressor._kept(numel)
    return k, FORMS.index(form), width, compressor.chunk, of_chunk


def _randomk(compressor, numel):
    return kept_count(numel, compressor.sparsity), compressor.unbiased


def _sign(compressor, numel):
    return compressor._bucket(numel), compressor.means


def _cast(compressor, numel):
    return compressor.form, compressor._bucket(numel)


def _bf16(compressor, numel):
    return (compressor.unbiased,)


def _nothing(compressor, numel):
    return ()


# {class: (row, integers for a number of entries, in the order in which the kernel takes them)}
METHODS = {
    Quantize: ("quantize", _quantize),
    MaskSparse: ("mask", _mask),
    TopK: ("topk", _topk),
    RandomK: ("randomk", _randomk),
    Sign: ("sign", _sign),
    OneBit: ("sign", _sign),
    FP16: ("cast", _cast),
    FP8: ("cast", _cast),
    MXFP4: ("cast", _cast),
    BF16: ("bf16", _bf16),
}


def payload_bytes(compressor: Compressor, numel: int, feedback: bool) -> int:
    """The bytes of one partition's payload: with feedback, one says whether the last result was applied."""
    return compressor.nbytes(numel) + bool(feedback)


def parameters(number: int, compressor: Compressor, lengths: list[int], decay: float) -> dict:
    """What BytePS hands to our C++ compressor for one tensor, as {name: value} without spaces.

    Args:
        number: of the tensor, among this process's.
        compressor: a Compressor.
        lengths: the numbers of entries that the tensor's partitions have.
        decay: what is left, on both sides, of what was lost when the next gradient comes; 0: nothing is remembered.
    """
    if not compressor.fixed_size:
        raise ConfigError(f"compression: got {compressor}, expected one of fixed size, which BytePS's buffers need")
    row, integers_of = METHODS.get(type(compressor), ("python", _nothing))
    plans = []
    for numel in sorted(set(lengths)):
        if payload_bytes(compressor, numel, decay > 0) > 4 * numel:
            raise ConfigError(f"compression: {compressor} makes {numel} entries larger, which BytePS cannot send")
        integers = ",".join(str(int(value)) for value in integers_of(compressor, numel))
        plans.append(f"{numel}:{compressor.nbytes(numel)}:{workspace(compressor, numel)}:{integers}")
    return {
        "compressor_type": "gcompress",
        "gcompress_tensor": number,
        "gcompress_method": row,
        "gcompress_spec": str(compressor),
        "gcompress_plan": ";".join(plans),
        "gcompress_feedback": float(decay),
    }


def workspace(compressor: Compressor, numel: int) -> int:
    """Words of scratch memory that a selection of the largest takes."""
    if isinstance(compressor, TopK):
        return compressor._words(numel)
    if type(compressor) not in METHODS or not hasattr(compressor, "sparsity"):
        return 0
    return selection_words(numel, kept_count(numel, compressor.sparsity))
