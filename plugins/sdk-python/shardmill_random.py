"""The capability `random`. `random.random()` and its like stay with the numbers of the record."""

from wit_world.imports import random as _host


def next_u64() -> int:
    """64 bits that nobody can predict."""
    return _host.next_u64()


def random() -> float:
    """A number from 0 to below 1 that nobody can predict."""
    return (next_u64() >> 11) / (1 << 53)
