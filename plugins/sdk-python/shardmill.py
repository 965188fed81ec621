"""SDK for shardmill plugins in Python: plugins take records and emit outputs on routes by name.

    from shardmill import Out, Record, plugin

    @plugin(name="upper", version="0.1.0", routes={"out": "text/plain"})
    def upper(record: Record, out: Out) -> None:
        out.emit("out", record.text().upper())

For state or a configuration, decorate a class that has `record` and `configure`; see `plugin`.

Outcome of a record:

| what the plugin does                     | the record is                                |
|------------------------------------------|----------------------------------------------|
| emits or passes it, once or more often   | delivered on the routes named                |
| nothing                                  | filtered: dropped on purpose                 |
| rejects it, or raises an exception       | dead-lettered alone, with the reason         |
| raises `Retry`                           | retried with its batch, after a backoff      |

Modules are loaded only when the plugin is built: import at the top of a file. There are no files, no
network and no threads. A replay must give the same result, so the time is the arrival time of the current
record, and random numbers are seeded by it. `time`, `datetime` and `random` follow this too.
"""

from __future__ import annotations

import datetime as _datetime
import gc
import importlib
import json
import os
import random as _random
import sys
import time as _time
from dataclasses import dataclass
from typing import Any, Callable, Mapping, Sequence

try:
    from componentize_py_types import Err
except ImportError:  # outside of a component, as in an editor or a test

    class Err(Exception):  # type: ignore[no-redef]
        """Stand-in for the error of componentize-py that goes to the host."""

        def __init__(self, value: Any) -> None:
            super().__init__(value)
            self.value = value


__all__ = ["Context", "Out", "Record", "Reject", "Retry", "Upstream", "plugin"]

# A batch is one arena of bytes and ten words per record: see `wit/0.1.0/plugin.wit`.
_INPUT_WORDS = 10
_NONE = 0xFFFF_FFFF


class Reject(Exception):
    """Exception that a plugin raises to reject a record. Any exception rejects it, but the reason of this
    one is shown without the name of the exception."""


class Retry(Exception):
    """Exception that a plugin raises to have the whole batch retried after a backoff."""


def _failed(failure: Any) -> Exception:
    """Converts the failure of a capability to an exception for the plugin."""
    given = failure.value
    return Retry(given.message) if given.retryable else Reject(given.message)


@dataclass(frozen=True, slots=True)
class Upstream:
    """A route that leads to this plugin."""

    name: str
    #: Media type of its payloads; empty if it is unknown.
    format: str


@dataclass(frozen=True, slots=True)
class Context:
    """The stage that the plugin runs in. The same for all calls of an instance."""

    stream_name: str
    shard_id: str
    upstream: tuple[Upstream, ...]
    #: Names and values that later versions of the host add.
    extra: Mapping[str, str]


class _Batch:
    """Data that the records of a batch share."""

    __slots__ = ("arena", "inputs", "upstream")

    def __init__(self, arena: bytes, inputs: Sequence[int], upstream: Sequence[str]) -> None:
        self.arena = arena
        self.inputs = inputs
        self.upstream = upstream


class Record:
    """An incoming record. Its parts are copied and decoded on demand."""

    __slots__ = ("_batch", "_at", "index")

    #: Index in the batch, from 0.
    index: int

    def __init__(self, batch: _Batch, index: int) -> None:
        self._batch = batch
        self._at = _INPUT_WORDS * index
        self.index = index

    def bytes(self) -> bytes:
        """The payload."""
        return self._span(2)

    def text(self) -> str:
        """The payload as text. Raises `Reject` if it is not UTF-8."""
        try:
            return str(self._span(2), "utf-8")
        except UnicodeDecodeError as error:
            raise Reject(f"the payload is not UTF-8: {error.reason} at byte {error.start}") from None

    def json(self) -> Any:
        """The payload as a JSON value. Raises `Reject` if it is not JSON."""
        try:
            return _parse(str(self._span(2), "utf-8"))
        except ValueError as error:
            raise Reject(f"the payload is not JSON: {error}") from None

    @property
    def key(self) -> str:
        """The partition key."""
        return str(self._span(0), "utf-8")

    @property
    def sequence(self) -> str:
        """The sequence number in its shard, in digits."""
        return str(self._span(4), "ascii")

    @property
    def sub_sequence(self) -> int:
        """The position within an aggregated record, from 0."""
        return self._batch.inputs[self._at + 6]

    @property
    def route(self) -> str:
        """Name of the upstream route on which the record came."""
        return self._batch.upstream[self._batch.inputs[self._at + 7]]

    @property
    def arrived_ms(self) -> int:
        """Arrival time in the stream, in milliseconds since the Unix epoch."""
        inputs, at = self._batch.inputs, self._at
        return inputs[at + 8] | inputs[at + 9] << 32

    @property
    def arrived(self) -> _datetime.datetime:
        """Arrival time in the stream, in UTC."""
        return _EPOCH + _datetime.timedelta(milliseconds=self.arrived_ms)

    def _span(self, word: int) -> bytes:
        inputs, at = self._batch.inputs, self._at + word
        start = inputs[at]
        return self._batch.arena[start : start + inputs[at + 1]]


class Out:
    """Collects the outcomes of records."""

    __slots__ = ("_routes", "_words", "_parts", "_used", "_rejects", "_rejected", "_input", "_mark")

    def __init__(self, routes: Mapping[str, int]) -> None:
        self._routes = routes
        self._begin()

    def emit(self, route: str, value: Any, key: str | None = None) -> None:
        """Delivers a payload on a route, under the key of the record or another key.

        A `str` is sent as UTF-8, `bytes`, `bytearray` and `memoryview` unchanged, anything else as JSON
        (times in ISO 8601, decimals as texts).
        """
        number = self._routes.get(route)
        if number is None or self._input < 0:
            raise self._misplaced(route)
        kind = type(value)
        if kind is str:
            payload = value.encode()
        elif kind is bytes:
            payload = value
        elif isinstance(value, (bytes, bytearray, memoryview)):
            payload = bytes(value)
        else:
            payload = _serialise(value).encode()
        used = self._used
        if key is None:
            self._words += (self._input, number, _NONE, 0, used, len(payload))
        else:
            raw = key.encode()
            self._parts.append(raw)
            self._words += (self._input, number, used, len(raw), used + len(raw), len(payload))
            used += len(raw)
        self._parts.append(payload)
        self._used = used + len(payload)

    def pass_on(self, route: str, key: str | None = None) -> None:
        """Delivers the unchanged record on a route, under its key or another key. Nothing is copied."""
        number = self._routes.get(route)
        if number is None or self._input < 0:
            raise self._misplaced(route)
        if key is None:
            self._words += (self._input, number, _NONE, 0, _NONE, 0)
        else:
            self._words += (self._input, number, *self._keep(key), _NONE, 0)

    def reject(self, reason: str) -> None:
        """Dead-letters the record and discards its outputs."""
        self._rejected = str(reason)

    def at(self, record: Record) -> Out:
        """In `batch`: what follows belongs to this record. Call it for the records in their order."""
        if record.index < self._input:
            raise ValueError("outputs must be in the order of the records")
        self._begin_record(record.index)
        return self

    def _misplaced(self, route: str) -> Exception:
        if self._input < 0:
            return RuntimeError(
                "no current record: in `batch`, call out.at(record) first; nothing can be emitted after a call"
            )
        return ValueError(f"unknown route {route!r}: the plugin declares {', '.join(self._routes)}")

    def _keep(self, text: str) -> tuple[int, int]:
        """Adds a text to the arena and returns its span."""
        raw = text.encode(errors="replace")
        start = self._used
        self._parts.append(raw)
        self._used = start + len(raw)
        return start, len(raw)

    def _begin(self) -> None:
        self._words: list[int] = []
        self._parts: list[bytes] = []
        self._used = 0
        self._rejects: list[int] = []
        self._rejected: str | None = None
        self._input = -1
        self._mark = 0

    def _begin_record(self, index: int) -> None:
        """Begins the outputs of another record."""
        if self._rejected is not None:
            # The bytes of its outputs stay in the arena, unused: rejects are rare.
            del self._words[self._mark :]
            self._rejects += (self._input, *self._keep(self._rejected))
            self._rejected = None
        if index != self._input:
            self._input = index
            self._mark = len(self._words)

    def _has_outcome(self) -> bool:
        """Whether the current record has an output or was rejected."""
        return self._rejected is not None or len(self._words) > self._mark

    def _finish(self) -> _Outcome:
        self._begin_record(self._input)
        outcome = _Outcome(b"".join(self._parts), self._words, self._rejects)
        self._begin()
        return outcome


class _Outcome:
    __slots__ = ("arena", "outputs", "rejects")

    def __init__(self, arena: bytes, outputs: list[int], rejects: list[int]) -> None:
        self.arena = arena
        self.outputs = outputs
        self.rejects = rejects


@dataclass(slots=True)
class _Failure:
    retryable: bool
    input: int | None
    message: str


@dataclass(slots=True)
class _Column:
    name: str
    data_type: str
    nullable: bool


@dataclass(slots=True)
class _Route:
    name: str
    format: str
    columns: list[_Column]


@dataclass(slots=True)
class _Descriptor:
    name: str
    version: str
    accepts: list[str]
    routes: list[_Route]
    extra: list[tuple[str, str]]


#: A media type, or a media type and columns.
RouteGiven = str | tuple[str, Mapping[str, str]]


def plugin(
    *,
    name: str,
    version: str,
    routes: Mapping[str, RouteGiven],
    accepts: Sequence[str] = (),
    needs_columns: Mapping[str, str] | None = None,
) -> Callable[[Any], Any]:
    """Decorates the plugin: a function that takes a record and `Out`, or a class with these methods:

    `record(self, record, out)`: processes one record.

    `batch(self, records, out)`: sees a whole batch before its records, so that it can make one request to
    the host for all of them. Without `record`, it processes all records: `out.at(record).emit(...)`.
    Batches are cut by size and time, so a replay has different ones.

    `configure(self, config, context)`: optional; called once, before the first record, with the TOML table
    `[stage.config]` as a dict. It may return a dict with those arguments of this decorator (`routes`,
    `accepts`, ...) that depend on the configuration. If it raises, the configuration is refused.

    `routes` are the outputs: `{"out": "application/json"}`, or with the columns of the rows
    `{"out": ("application/json", {"id": "bigint", "note": "text?"})}`. The types are PostgreSQL types; a
    column whose type ends with `?` may be null. `accepts` are the accepted media types; if empty, all are
    accepted. `needs_columns` are the columns that the incoming rows must have.
    """
    given = {
        "name": name,
        "version": version,
        "routes": routes,
        "accepts": accepts,
        "needs_columns": needs_columns,
    }

    def decorate(target: Any) -> Any:
        if isinstance(target, type):
            instance = target()
            record = getattr(instance, "record", None)
            batch = getattr(instance, "batch", None)
            configure = getattr(instance, "configure", None)
        else:
            record, batch, configure = target, None, None
        if record is None and batch is None:
            raise TypeError("a plugin needs a method `record` or `batch`")
        global _stage
        if _stage is not None:
            raise TypeError("`@plugin` was used twice: a component can have only one plugin")
        _stage = _Stage(given, record, batch, configure)
        return target

    return decorate


class _Stage:
    """The exports that the host calls."""

    def __init__(
        self,
        given: Mapping[str, Any],
        record: Callable[[Record, Out], None] | None,
        batch: Callable[[list[Record], Out], None] | None,
        configure: Callable[[Any, Context], Mapping[str, Any] | None] | None,
    ) -> None:
        self.given = given
        self.record = record
        self.batch = batch
        self.on_configure = configure
        self.upstream: list[str] = []
        self.out = Out({})

    def configure(self, context: Any) -> _Descriptor:
        sys.meta_path[:] = [_Late()]
        self.upstream = [route.name for route in context.upstream]
        _record_time.shard = context.shard_id
        given = dict(self.given)
        try:
            for what, function in (("record", self.record), ("batch", self.batch), ("configure", self.on_configure)):
                _check_function(what, function)
            if self.on_configure is not None:
                upstream = tuple(Upstream(route.name, route.format) for route in context.upstream)
                place = Context(context.stream_name, context.shard_id, upstream, dict(context.extra))
                changed = self.on_configure(json.loads(context.config), place)
                _check_returned("configure", changed, True)
                given.update(changed or {})
            descriptor = _describe(**given)
        except Exception as error:
            raise Err(_reason(error)) from None
        self.out = Out({route.name: index for index, route in enumerate(descriptor.routes)})
        # The loaded objects stay, so the garbage collector need not scan them again.
        gc.collect()
        gc.freeze()
        return descriptor

    def process(self, given: Any) -> _Outcome:
        inputs = given.inputs
        batch = _Batch(given.arena, inputs, self.upstream)
        records = [Record(batch, index) for index in range(len(inputs) // _INPUT_WORDS)]
        out, on_record, under_way = self.out, self.record, _record_time
        try:
            if self.batch is not None:
                under_way.record = records[0]
                _check_returned("batch", self.batch(records, out), True)
            if on_record is not None:
                for record in records:
                    under_way.record = record
                    out._begin_record(record.index)
                    try:
                        returned = on_record(record, out)
                        if returned is not None:
                            _check_returned("record", returned, out._has_outcome())
                    except Retry:
                        raise
                    except Exception as error:
                        out._rejected = _reason(error)
            return out._finish()
        except Exception as error:
            out._begin()
            raise Err(_Failure(isinstance(error, Retry), None, _reason(error))) from None
        finally:
            under_way.record = None


# A plugin's call ends when its function returns. A coroutine that nobody awaits and a generator that
# nobody reads do nothing, and a returned value is ignored: without these checks, each record would be
# filtered silently.


def _asynchronous(name: str) -> str:
    return (
        f"`{name}` is asynchronous, but nothing awaits it: make it a plain function without async and await, "
        "and call out.emit before it returns"
    )


def _generator(name: str) -> str:
    return f"`{name}` is a generator, but what it yields goes nowhere: make it a plain function that calls out.emit"


def _check_function(name: str, function: Any) -> None:
    """Refuses a function that is recognisably asynchronous or a generator."""
    if function is None:
        return
    while type(function).__name__ == "partial":
        function = function.func
    call = function if hasattr(function, "__code__") else getattr(function, "__call__", function)
    flags = getattr(getattr(call, "__code__", None), "co_flags", 0)
    if flags & (_COROUTINE | _ASYNC_GENERATOR):
        raise TypeError(_asynchronous(name))
    if flags & _GENERATOR:
        raise TypeError(_generator(name))


def _check_returned(name: str, returned: Any, has_outcome: bool) -> None:
    """Refuses a value that was returned instead of passed to `out.emit`.

    `None` and `False` are allowed: they result from `condition and out.emit(...)`. Any plain value is allowed
    if the record already has an outcome, and so is a mapping that `configure` returns.
    """
    if returned is None or returned is False:
        return
    if hasattr(returned, "__await__") or hasattr(returned, "__aiter__"):
        if hasattr(returned, "close"):
            returned.close()
        raise TypeError(_asynchronous(name))
    if hasattr(returned, "__next__"):
        raise TypeError(_generator(name))
    if not has_outcome:
        raise TypeError(
            f"`{name}` returned a {type(returned).__name__}, which goes nowhere: call out.emit, out.pass_on or "
            "out.reject and return nothing; to filter the record, return nothing"
        )


#: Bits of `co_flags`, copied from `inspect` to avoid loading that module.
_GENERATOR, _COROUTINE, _ASYNC_GENERATOR = 0x20, 0x80, 0x200

_stage: _Stage | None = None


def _registered() -> _Stage:
    """Returns the plugin of this component."""
    if _stage is None:
        raise TypeError("no plugin is registered: decorate a function or a class with `@plugin(...)`")
    return _stage


def _describe(
    name: str,
    version: str,
    routes: Mapping[str, RouteGiven],
    accepts: Sequence[str],
    needs_columns: Mapping[str, str] | None,
) -> _Descriptor:
    ways = []
    for route, what in routes.items():
        format_, columns = (what, None) if isinstance(what, str) else what
        ways.append(_Route(route, format_, _columns(columns)))
    extra = []
    if needs_columns:
        needed = [
            {"name": column.name, "data_type": column.data_type, "nullable": column.nullable}
            for column in _columns(needs_columns)
        ]
        extra.append(("needs-columns", json.dumps(needed)))
    return _Descriptor(name, version, list(accepts), ways, extra)


def _columns(given: Mapping[str, str] | None) -> list[_Column]:
    return [
        _Column(name, kind.removesuffix("?"), kind.endswith("?"))
        for name, kind in (given or {}).items()
    ]


def _reason(error: Exception) -> str:
    """Text of an exception for humans: its message, and except for `Reject` and `Retry` its kind and place."""
    if isinstance(error, (Reject, Retry)):
        return str(error)
    place = ""
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file != __file__:
            place = f" ({file.rpartition('/')[2]}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}{place}"


def _as_json(value: Any) -> Any:
    """Converts a value for which JSON has no type."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if type(value).__name__ in ("Decimal", "UUID"):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


_parse = json.JSONDecoder().decode
_serialise = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_as_json
).encode


# A replay must give the same result for the same record, so the time and random numbers are derived from
# the record. The real ones are capabilities: `shardmill_clock` and `shardmill_random`.


class _RecordTime:
    """The current record, and the time derived from it."""

    def __init__(self) -> None:
        self.record: Record | None = None
        self.shard = ""

    def now_ms(self) -> int:
        """Arrival time of the current record; before the first one, the Unix epoch."""
        return 0 if self.record is None else self.record.arrived_ms


class _RecordRandom(_random.Random):
    """Random numbers seeded by the shard and the current record, at the first use for that record."""

    _seeded_by: Any = None

    def _renew(self) -> None:
        record = _record_time.record
        if record is not self._seeded_by:
            self._seeded_by = record
            if record is not None:
                self.seed(f"{_record_time.shard}/{record.sequence}/{record.sub_sequence}")

    def random(self) -> float:
        self._renew()
        return super().random()

    def getrandbits(self, k: int) -> int:
        self._renew()
        return super().getrandbits(k)


_record_time = _RecordTime()
_EPOCH = _datetime.datetime(1970, 1, 1, tzinfo=_datetime.timezone.utc)


class _DateTime(_datetime.datetime):
    """`datetime` with the record's time."""

    @classmethod
    def now(cls, tz: _datetime.tzinfo | None = None) -> Any:
        return cls.fromtimestamp(_record_time.now_ms() / 1000, tz or _datetime.timezone.utc).replace(tzinfo=tz)

    @classmethod
    def utcnow(cls) -> Any:
        return cls.now()

    @classmethod
    def today(cls) -> Any:
        return cls.now()


class _Date(_datetime.date):
    """`date` with the record's day."""

    @classmethod
    def today(cls) -> Any:
        now = _DateTime.now()
        return cls(now.year, now.month, now.day)


class _Dropped:
    """Output that drops printed lines. `shardmill_log` replaces it with the host's log."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


class _Late:
    """Refuses modules that were not loaded when the plugin was built: their files do not exist at run time."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        raise ModuleNotFoundError(
            f"module {name} was not loaded when the plugin was built: import it at the top of a file",
            name=name,
        )


def _take_over() -> None:
    """Replaces the clock and the random numbers with those of the record. Only in a component."""
    # Modules that the standard library loads lazily.
    for module in ("_strptime", "encodings.ascii", "encodings.cp1252", "encodings.latin_1", "traceback"):
        importlib.import_module(module)
    inst = _RecordRandom(0)
    names = (
        "betavariate binomialvariate choice choices expovariate gammavariate gauss getrandbits getstate "
        "lognormvariate normalvariate paretovariate randbytes randint random randrange sample seed "
        "setstate shuffle triangular uniform vonmisesvariate weibullvariate"
    )
    _random._inst = inst  # type: ignore[attr-defined]
    for name in names.split():
        if hasattr(_random, name):
            setattr(_random, name, getattr(inst, name))
    os.urandom = _random._urandom = inst.randbytes  # type: ignore[attr-defined]
    _time.time = lambda: _record_time.now_ms() / 1000
    _time.time_ns = lambda: _record_time.now_ms() * 1_000_000
    # A monotonic clock that stands still: a duration does not depend on the record.
    _time.monotonic = _time.perf_counter = _time.process_time = lambda: 0.0
    _time.monotonic_ns = _time.perf_counter_ns = _time.process_time_ns = lambda: 0
    _datetime.datetime = _DateTime  # type: ignore[misc]
    _datetime.date = _Date  # type: ignore[misc]
    sys.stdout = sys.stderr = _Dropped()  # type: ignore[assignment]
