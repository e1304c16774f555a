"""Checks of arguments that a user gives: a ConfigError names the argument, what came and what was expected."""

import math

from .errors import ConfigError

LARGEST_INTEGER = 2**63 - 1  # what a kernel takes
LONGEST_SHOWN = 100  # characters of a value in an error


def shown(value):
    """How an error shows a value: its repr, of which a long one is cut."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no integer of that many digits, nor lists that deep
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}… ({len(text)} characters)"


def is_number(value):
    """Whether value is an int or float, NaN and infinity included, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_integer(argument, value, low, high=None):
    """ConfigError unless value is an int in [low, high]; without `high` it must fit 64 bits."""
    largest = LARGEST_INTEGER if high is None else high
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= largest:
        expected = f"an integer from {low} to {largest}"
        if high is None:
            expected = f"an integer of at least {low}" + (", below 2^63" if is_number(value) and value >= low else "")
        raise ConfigError(f"{argument}: got {shown(value)}, expected {expected}")


def check_number(argument, value, low, high):
    """ConfigError unless value is a number in [low, high]."""
    if not is_number(value) or not low <= value <= high:
        raise ConfigError(f"{argument}: got {shown(value)}, expected a number from {low} to {high}")


def check_positive(argument, value):
    """ConfigError unless value is a positive number, not infinite."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ConfigError(f"{argument}: got {shown(value)}, expected a positive number")


def check_sparsity(value):
    """ConfigError unless value is a number in [0, 1)."""
    if not is_number(value) or not 0 <= value < 1:
        raise ConfigError(f"sparsity: got {shown(value)}, expected the fraction set to zero, 0 <= sparsity < 1")


def check_bucket(value, multiple):
    """ConfigError unless value is a multiple of `multiple`, or 0."""
    check_integer("bucket", value, 0)
    if value % multiple:
        raise ConfigError(f"bucket: got {value!r}, expected a multiple of {multiple}, or 0 for the whole tensor")


def check_power_of_two(argument, value, low, high, zero=None):
    """ConfigError unless value is a power of two in [low, high], which are such; zero: what 0 is for, if allowed."""
    if type(value) is not int or not (low <= value <= high or (zero and value == 0)) or value & (value - 1):
        besides = f", or 0 for {zero}" if zero else ""
        raise ConfigError(f"{argument}: got {shown(value)}, expected a power of two from {low} to {high}{besides}")


def check_choice(argument, value, choices):
    """ConfigError unless value is one of choices, of the same type: 1 is not True, nor 32.0 32."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ConfigError(f"{argument}: got {shown(value)}, expected one of {', '.join(map(repr, choices))}")
