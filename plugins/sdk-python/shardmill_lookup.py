"""The capability `lookup`: rows of reference tables."""

import json
from typing import Any, Iterable

from componentize_py_types import Err
from shardmill import _failed
from wit_world.imports import lookup as _host

_NONE = 0xFFFF_FFFF


def lookup(name: str, keys: Iterable[object]) -> list[dict[str, Any] | None]:
    """Returns the rows of the table `name` in the order of the keys; None for a key without a row. Look up
    all keys of a batch at once."""
    texts = [str(key).encode() for key in keys]
    words: list[int] = []
    used = 0
    for text in texts:
        words += (used, len(text))
        used += len(text)
    try:
        found = _host.get(name, b"".join(texts), words)
    except Err as failure:
        raise _failed(failure) from None
    spans = zip(found.rows[::2], found.rows[1::2])
    return [
        None if start == _NONE else json.loads(found.arena[start : start + length])
        for start, length in spans
    ]
