"""Whether two nestings of dicts and lists, of tensors and plain values, are the same to the last bit."""

import torch


def difference(one, other, where="state", but=()):
    """The place of a difference, or None if there is none; the values of keys in `but` may differ."""
    places = iter([where])
    if torch.is_tensor(one) and torch.is_tensor(other):
        places = () if same_bits(one, other) else places
    elif isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        places = (difference(one[key], other[key], f"{where}[{key!r}]", but) for key in one if key not in but)
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        places = (difference(*pair, f"{where}[{number}]", but) for number, pair in pairs)
    elif not (torch.is_tensor(one) or torch.is_tensor(other)) and one == other:
        places = ()
    return next(filter(None, places), None)


def same_bits(one, other):
    """Whether two tensors have the same type, shape and bits."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(each.detach().reshape(-1).contiguous().view(torch.uint8) for each in (one, other)))


def same(one, other):
    return difference(one, other) is None


def assert_same(one, other, where="state", but=()):
    place = difference(one, other, where, but)
    assert place is None, place
