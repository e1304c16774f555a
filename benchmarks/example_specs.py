"""What the benchmarks measure unless they are told otherwise."""

from gcompress import methods


def with_every_method(specs):
    """These specs, or SPEC@EXCHANGE, and the first example of each method that none of them is of."""
    found = methods()
    missing = set(found) - {spec.partition("@")[0].partition(":")[0] for spec in specs}
    return [*specs, *(found[name].examples[0] for name in sorted(missing) if found[name].examples)]
