"""The capability `clock`: the time of day. `time` and `datetime` still use the time of the record."""

from datetime import datetime, timedelta, timezone

from wit_world.imports import clock as _host

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def now_ms() -> int:
    """Milliseconds since the Unix epoch."""
    return _host.now_ms()


def now() -> datetime:
    """The time of day, in UTC."""
    return _EPOCH + timedelta(milliseconds=now_ms())
