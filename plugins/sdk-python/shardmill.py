"""What shardmill plugins in Python are written with: records in, outputs by the names of routes.

    from shardmill import Out, Record, plugin

    @plugin(name="upper", version="0.1.0", routes={"out": "text/plain"})
    def upper(record: Record, out: Out) -> None:
        out.emit("out", record.text().upper())

With state or a configuration, decorate a class that has `record` and `configure`; see `plugin`.

What becomes of a record:

| what the plugin does                     | what becomes of it                           |
|------------------------------------------|----------------------------------------------|
| emits or passes it, once or more often   | delivered on the routes named                |
| nothing                                  | filtered: dropped on purpose, and counted    |
| rejects it, or raises an exception       | dead-lettered alone, with the reason         |
| raises `Retry`                           | tried again with its batch, after a pause    |

Modules are loaded when the plugin is built, and only then: import at the top of a file. There are no
files, no network and no threads. So that a replay gives the same, the time is when the record under way
arrived, and random numbers are seeded by it, in `time`, `datetime` and `random` too.
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
        """An error that goes to the host."""

        def __init__(self, value: Any) -> None:
            super().__init__(value)
            self.value = value


__all__ = ["Context", "Out", "Record", "Reject", "Retry", "Upstream", "plugin"]

# A batch is one arena of bytes and ten words a record: see `wit/0.1.0/plugin.wit`.
_INPUT_WORDS = 10
_NONE = 0xFFFF_FFFF


class Reject(Exception):
    """Raised by a plugin: the record cannot be processed, for this reason. As any exception does, but the
    reason is shown without the exception's name."""


class Retry(Exception):
    """Raised by a plugin: the whole batch is tried again after a pause."""


def _failed(failure: Any) -> Exception:
    """What a capability's failure is to a plugin."""
    given = failure.value
    return Retry(given.message) if given.retryable else Reject(given.message)


@dataclass(frozen=True, slots=True)
class Upstream:
    """A route that leads to this plugin."""

    name: str
    #: The media type of its payloads; empty where it is not known.
    format: str


@dataclass(frozen=True, slots=True)
class Context:
    """Where the plugin is used. The same for all calls of an instance."""

    stream_name: str
    shard_id: str
    upstream: tuple[Upstream, ...]
    #: Names and values that later versions of the host add.
    extra: Mapping[str, str]


class _Batch:
    """What the records of a batch share."""

    __slots__ = ("arena", "inputs", "upstream")

    def __init__(self, arena: bytes, inputs: Sequence[int], upstream: Sequence[str]) -> None:
        self.arena = arena
        self.inputs = inputs
        self.upstream = upstream


class Record:
    """A record on its way in. Its parts are copied and decoded when they are asked for."""

    __slots__ = ("_batch", "_at", "index")

    #: Its place in the batch, from 0.
    index: int

    def __init__(self, batch: _Batch, index: int) -> None:
        self._batch = batch
        self._at = _INPUT_WORDS * index
        self.index = index

    def bytes(self) -> bytes:
        """The payload."""
        return self._span(2)

    def text(self) -> str:
        """The payload as text. Raises `Reject` where it is not UTF-8."""
        try:
            return str(self._span(2), "utf-8")
        except UnicodeDecodeError as error:
            raise Reject(f"the payload is not UTF-8: {error.reason} at byte {error.start}") from None

    def json(self) -> Any:
        """The payload as a JSON value. Raises `Reject` where it is none."""
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
        """The name of the route that it came by."""
        return self._batch.upstream[self._batch.inputs[self._at + 7]]

    @property
    def arrived_ms(self) -> int:
        """When the stream took it, in milliseconds since the Unix epoch."""
        inputs, at = self._batch.inputs, self._at
        return inputs[at + 8] | inputs[at + 9] << 32

    @property
    def arrived(self) -> _datetime.datetime:
        """When the stream took it, in UTC."""
        return _EPOCH + _datetime.timedelta(milliseconds=self.arrived_ms)

    def _span(self, word: int) -> bytes:
        inputs, at = self._batch.inputs, self._at + word
        start = inputs[at]
        return self._batch.arena[start : start + inputs[at + 1]]


class Out:
    """Takes what becomes of records."""

    __slots__ = ("_routes", "_words", "_parts", "_used", "_rejects", "_rejected", "_input", "_mark")

    def __init__(self, routes: Mapping[str, int]) -> None:
        self._routes = routes
        self._begin()

    def emit(self, route: str, value: Any, key: str | None = None) -> None:
        """Delivers a payload on a route, under the key that came in or another.

        A `str` goes as UTF-8, `bytes`, `bytearray` and `memoryview` as they are, anything else as JSON
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
        """Delivers the record on a route as it came in, under its key or another. Nothing is copied."""
        number = self._routes.get(route)
        if number is None or self._input < 0:
            raise self._misplaced(route)
        if key is None:
            self._words += (self._input, number, _NONE, 0, _NONE, 0)
        else:
            self._words += (self._input, number, *self._keep(key), _NONE, 0)

    def reject(self, reason: str) -> None:
        """Dead-letters the record. What was emitted for it is taken back."""
        self._rejected = str(reason)

    def at(self, record: Record) -> Out:
        """In `batch`: what follows belongs to this record. Records are due in their order."""
        if record.index < self._input:
            raise ValueError("outputs must be in the order of the records")
        self._begin_record(record.index)
        return self

    def _misplaced(self, route: str) -> Exception:
        if self._input < 0:
            return RuntimeError(
                "no record is under way: in `batch`, call out.at(record) first; after a call nothing can be emitted"
            )
        return ValueError(f"there is no route {route!r}: the plugin declares {', '.join(self._routes)}")

    def _keep(self, text: str) -> tuple[int, int]:
        """Adds a text to the arena, and gives its span."""
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
        """What comes next belongs to another record."""
        if self._rejected is not None:
            # Its bytes stay in the arena, unused: a reject is rare.
            del self._words[self._mark :]
            self._rejects += (self._input, *self._keep(self._rejected))
            self._rejected = None
        if index != self._input:
            self._input = index
            self._mark = len(self._words)

    def _has_outcome(self) -> bool:
        """Whether the record under way was given an output, or was rejected."""
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

    `record(self, record, out)`: what becomes of one record.

    `batch(self, records, out)`: sees a whole batch before its records, to ask the host for what they need
    at once; or, without `record`, says what becomes of all: `out.at(record).emit(...)`. Batches are cut by
    size and time and differ in a replay.

    `configure(self, config, context)`: optional; called once, before the first record, with the TOML table
    `[stage.config]` as a dict. It may return a dict of what is given here (`routes`, `accepts`, ...), where
    that depends on the configuration. An exception refuses the configuration.

    `routes` are the ways out: `{"out": "application/json"}`, or with the columns of the rows
    `{"out": ("application/json", {"id": "bigint", "note": "text?"})}`; the types are PostgreSQL's, a
    column whose type ends with `?` may be null. `accepts` are the media types that can be processed; none:
    any. `needs_columns` are those that the rows must have that come in.
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
            raise TypeError("one component is one plugin: `@plugin` was used twice")
        _stage = _Stage(given, record, batch, configure)
        return target

    return decorate


class _Stage:
    """What the host calls."""

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
        # What is loaded stays: the collector need not look at it again and again.
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


# A plugin's call has ended when its function returns. A coroutine that nobody awaits and a generator that
# nobody reads do nothing, and a value that is returned goes nowhere: without these checks each record would
# be filtered in silence.


def _asynchronous(name: str) -> str:
    return (
        f"`{name}` is asynchronous, but nothing awaits it: make it a plain function without async and await, "
        "and call out.emit before it returns"
    )


def _generator(name: str) -> str:
    return f"`{name}` is a generator, but what it yields goes nowhere: make it a plain function that calls out.emit"


def _check_function(name: str, function: Any) -> None:
    """Refuses a function that can be seen not to be a plain one."""
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
    """Refuses what a function has returned in place of calling `out.emit`.

    `None` and `False` are fine: they come of `condition and out.emit(...)`. So is any plain value where the
    record has an outcome already, and a mapping that `configure` returns.
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


#: Bits of `co_flags`, by `inspect`, which is not loaded for them alone.
_GENERATOR, _COROUTINE, _ASYNC_GENERATOR = 0x20, 0x80, 0x200

_stage: _Stage | None = None


def _registered() -> _Stage:
    """The plugin of this component."""
    if _stage is None:
        raise TypeError("there is no plugin: decorate a function or a class with `@plugin(...)`")
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
    """An exception for a human: its text, and for those that were not raised for it, their kind and place."""
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
    """What JSON has no type for."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if type(value).__name__ in ("Decimal", "UUID"):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


_parse = json.JSONDecoder().decode
_serialise = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_as_json
).encode


# What differs between two runs of the same record would make a replay differ: time and chance come from
# the record. The real ones are capabilities: `shardmill_clock` and `shardmill_random`.


class _RecordTime:
    """The record under way, and what follows from it."""

    def __init__(self) -> None:
        self.record: Record | None = None
        self.shard = ""

    def now_ms(self) -> int:
        """When the record under way arrived; before the first one, 1970 began."""
        return 0 if self.record is None else self.record.arrived_ms


class _RecordRandom(_random.Random):
    """Seeded by the shard and the record under way, when it is first used for that record."""

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
    """Where printed lines go without the capability `log`: `shardmill_log` puts another in place."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


class _Late:
    """Refuses modules that were not loaded when the plugin was built: their files are not there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        raise ModuleNotFoundError(
            f"module {name} was not loaded when the plugin was built: import it at the top of a file",
            name=name,
        )


def _take_over() -> None:
    """Puts the record's time and chance in the places of the real ones. Only in a component."""
    # What the standard library loads late.
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
    # A stopwatch that stands still: how long something takes is nothing that a record decides.
    _time.monotonic = _time.perf_counter = _time.process_time = lambda: 0.0
    _time.monotonic_ns = _time.perf_counter_ns = _time.process_time_ns = lambda: 0
    _datetime.datetime = _DateTime  # type: ignore[misc]
    _datetime.date = _Date  # type: ignore[misc]
    sys.stdout = sys.stderr = _Dropped()  # type: ignore[assignment]
