"""The capability `metrics`. Announce metrics in `configure`, once; observe them anywhere."""

from componentize_py_types import Err
from wit_world.imports import metrics as _host


class Metric:
    """A series of the plugin's own, shown as `shardmill_plugin_NAME`."""

    def __init__(self, kind: _host.Kind, name: str, help: str) -> None:
        try:
            self._number = _host.register(kind, name, help)
        except Err as refusal:
            raise ValueError(f"metric {name}: {refusal.value}") from None

    def observe(self, value: float) -> None:
        """Gives it a value."""
        _host.observe(self._number, float(value))


def counter(name: str, help: str = "") -> Metric:
    """A metric that adds up. The name is `[a-z][a-z0-9_]*`."""
    return Metric(_host.Kind.COUNTER, name, help)


def gauge(name: str, help: str = "") -> Metric:
    """A metric that keeps its last value."""
    return Metric(_host.Kind.GAUGE, name, help)


def histogram(name: str, help: str = "") -> Metric:
    """A metric that counts how values are distributed."""
    return Metric(_host.Kind.HISTOGRAM, name, help)
