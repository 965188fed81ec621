"""The capability `random`. The module `random` of Python is still seeded by the record."""

from wit_world.imports import random as _host


def next_u64() -> int:
    """Returns 64 unpredictable bits."""
    return _host.next_u64()


def random() -> float:
    """Returns an unpredictable number, at least 0 and less than 1."""
    return (next_u64() >> 11) / (1 << 53)
