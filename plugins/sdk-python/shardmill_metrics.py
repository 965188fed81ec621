"""The capability `metrics`. Register metrics once, in `configure`; observe values anywhere."""

from componentize_py_types import Err
from wit_world.imports import metrics as _host


class Metric:
    """Time series that the plugin defines, exported as `shardmill_plugin_NAME`."""

    def __init__(self, kind: _host.Kind, name: str, help: str) -> None:
        try:
            self._number = _host.register(kind, name, help)
        except Err as refusal:
            raise ValueError(f"metric {name}: {refusal.value}") from None

    def observe(self, value: float) -> None:
        """Records a value: a counter adds it, a gauge keeps it, a histogram counts it."""
        _host.observe(self._number, float(value))


def counter(name: str, help: str = "") -> Metric:
    """Registers a metric that adds up its values. The name must match `[a-z][a-z0-9_]*`."""
    return Metric(_host.Kind.COUNTER, name, help)


def gauge(name: str, help: str = "") -> Metric:
    """Registers a metric that keeps its last value."""
    return Metric(_host.Kind.GAUGE, name, help)


def histogram(name: str, help: str = "") -> Metric:
    """Registers a metric that counts the distribution of its values."""
    return Metric(_host.Kind.HISTOGRAM, name, help)
