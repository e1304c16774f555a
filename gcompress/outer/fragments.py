"""A model cut into fragments, which are exchanged in turns: less is sent at a time (Streaming DiLoCo)."""

from __future__ import annotations

from ..errors import ConfigError


def fragments_of(sizes: dict[str, int], count: int) -> list[list[str]]:
    """Cut tensors into `count` fragments of whole layers.

    Layers that a model numbers ("blocks.3.attention.weight") are dealt out in turns, so that each fragment has some
    of the first and some of the last: strided fragments lose least (Douillard et al., arXiv 2501.18512). What is in
    no numbered layer follows, the largest first, each to the fragment that has the fewest entries.

    Args:
        sizes: {name: entries}, in the model's order.
        count: fragments, at least 1.

    Returns the names of each fragment, in the model's order.

    Raises:
        ConfigError: there are fewer tensors than fragments.
    """
    if count > len(sizes):
        raise ConfigError(f"fragments: got {count}, expected at most the model's {len(sizes)} tensors")
    layers: dict[tuple[str, ...], list[str]] = {}
    for name in sizes:
        layers.setdefault(_layer(name), []).append(name)
    if len(layers) < count:
        layers = {(name,): [name] for name in sizes}
    numbered = [layer for layer in layers if layer[-1].isdigit()]
    found: list[list[str]] = [[] for _ in range(count)]
    for number, layer in enumerate(numbered):
        found[number % count] += layers[layer]
    rest = [layer for layer in layers if layer not in numbered]
    for layer in sorted(rest, key=lambda layer: -sum(sizes[name] for name in layers[layer])):
        min(found, key=lambda names: sum(sizes[name] for name in names)).extend(layers[layer])
    order = {name: place for place, name in enumerate(sizes)}
    return [sorted(names, key=order.__getitem__) for names in found]


def _layer(name):
    """A tensor's module up to the first number in its path, or the whole of it."""
    parts = name.removeprefix("buffer/").split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return tuple(parts[: numbers[0] + 1] if numbers else parts[:-1] or parts)
