/**
 * SDK for shardmill plugins in JavaScript. Plugins take records and emit outputs on routes by name,
 * without offsets. `shardmill.d.ts` has the types and their documentation.
 *
 *     import { plugin } from "shardmill";
 *
 *     export const stage = plugin({
 *       name: "upper",
 *       version: "0.1.0",
 *       routes: { out: "text/plain" },
 *       record(record, out) {
 *         out.emit("out", record.text().toUpperCase());
 *       },
 *     });
 *
 * The engine is QuickJS: it has ECMAScript modules and the standard library of the language, but no web
 * or Node APIs. There are no timers, and a promise cannot outlive a call.
 */

// A batch is one arena of bytes and ten words per record: see `wit/0.1.0/plugin.wit`.
const INPUT_WORDS = 10;
/** 2^32 - 1 as a signed number: the engine passes words as 32 signed bits. */
const NONE = -1;

/** Error that a plugin throws to have the whole batch retried after a backoff. */
export class Retry extends Error {}
Retry.prototype.name = "Retry";

/** Makes the export `stage` of a plugin. See `Plugin` in `shardmill.d.ts`. */
export function plugin(definition) {
  const { record, batch } = definition;
  const out = new Out();
  let upstream = [];

  function configure(context) {
    try {
      checkFunctions(definition);
      upstream = context.upstream.map((route) => route.name);
      where = context.shardId;
      const given = {
        streamName: context.streamName,
        shardId: context.shardId,
        upstream: context.upstream,
        extra: Object.fromEntries(context.extra),
      };
      const changed = definition.configure?.(JSON.parse(context.config), given) ?? {};
      if (typeof changed.then === "function") throw new TypeError(ASYNC("configure"));
      const descriptor = describe({ ...definition, ...changed });
      out._declare(descriptor.routes);
      return descriptor;
    } catch (error) {
      throw reason(error);
    }
  }

  function process({ arena, inputs }) {
    const shared = { arena, inputs, upstream, text: undefined, isAscii: false };
    const count = inputs.length / INPUT_WORDS;
    out._begin(count);
    promised = false;
    try {
      let records;
      if (batch !== undefined) {
        records = new Array(count);
        for (let index = 0; index < count; index++) records[index] = new Record(shared, index);
        current = records[0];
        checkReturned("batch", batch(records, out), true);
        if (promised) throw new Error(PROMISED("batch"));
      }
      if (record !== undefined) {
        for (let index = 0; index < count; index++) {
          current = records === undefined ? new Record(shared, index) : records[index];
          random = undefined;
          promised = false;
          out._input(index);
          try {
            const returned = record(current, out);
            // Almost always undefined: this costs one comparison per record.
            if (returned !== undefined) checkReturned("record", returned, out._hasOutcome());
            if (promised) throw new Error(PROMISED("record"));
          } catch (error) {
            if (error instanceof Retry) throw error;
            out.reject(reason(error));
          }
        }
      }
      return out._finish();
    } catch (error) {
      throw { retryable: error instanceof Retry, input: null, message: reason(error) };
    } finally {
      current = undefined;
      out._end();
    }
  }

  return { configure, process };
}

// A plugin's call ends when its function returns. Outputs of a promise would come too late, and a
// returned value is ignored: without these checks, each record would be filtered silently.

const ASYNC = (name) =>
  `\`${name}\` is asynchronous or returns a promise, but there are no promises across calls: ` +
  "make it a plain function without async and await, and call out.emit before it returns";
const GENERATOR = (name) =>
  `\`${name}\` is a generator, but what it yields goes nowhere: make it a plain function that calls out.emit`;

const PROMISED = (name) =>
  `\`${name}\` started something asynchronous (await, then, or an async function in forEach) that would continue ` +
  "after the call, but there are no promises across calls: make it plain functions that call out.emit before " +
  "`" + name + "` returns";

// Code that waits for a promise never continues, because no job runs between calls. An async function
// whose promise is not returned would lose its outputs silently. So each start of a wait is recorded:
// `then`, `catch` and `finally`, and `await`, which reads the constructor of a promise.
let promised = false;
for (const name of ["then", "catch", "finally"]) {
  const original = Promise.prototype[name];
  Object.defineProperty(Promise.prototype, name, {
    configurable: true,
    writable: true,
    value(...given) {
      promised = true;
      return original.apply(this, given);
    },
  });
}
Object.defineProperty(Promise.prototype, "constructor", {
  configurable: true,
  get() {
    promised = true;
    return Promise;
  },
});

/** Refuses a definition whose functions are recognisably asynchronous or generators. */
function checkFunctions(definition) {
  if (definition.record === undefined && definition.batch === undefined) {
    throw new TypeError("a plugin needs `record` or `batch`");
  }
  for (const name of ["record", "batch", "configure"]) {
    const given = definition[name];
    if (given === undefined) continue;
    if (typeof given !== "function") {
      throw new TypeError(`\`${name}\` must be a function, not ${kindOf(given)}`);
    }
    const kind = Object.prototype.toString.call(given);
    if (kind === "[object AsyncFunction]" || kind === "[object AsyncGeneratorFunction]") {
      throw new TypeError(ASYNC(name));
    }
    if (kind === "[object GeneratorFunction]") throw new TypeError(GENERATOR(name));
  }
}

/**
 * Refuses a value that was returned instead of passed to `out.emit`. `null` and `false` are allowed: they
 * result from `condition && out.emit(...)`. Any plain value is allowed if the record already has an outcome.
 */
function checkReturned(name, returned, hasOutcome) {
  if (returned === undefined || returned === null || returned === false) return;
  if (typeof returned.then === "function") throw new Error(ASYNC(name));
  if (typeof returned.next === "function") throw new Error(GENERATOR(name));
  if (!hasOutcome) {
    throw new Error(
      `\`${name}\` returned ${kindOf(returned)}, which goes nowhere: call out.emit, out.pass or out.reject ` +
        "and return nothing; to filter the record, return nothing",
    );
  }
}

/** Describes the kind of a value for a message. */
function kindOf(value) {
  if (value === null) return "null";
  if (typeof value === "object") return `an object (${value.constructor?.name ?? "without a class"})`;
  return `a ${typeof value}`;
}

/** Whether a value can be written to the arena as bytes. */
function isBytes(value) {
  return ArrayBuffer.isView(value) || value instanceof ArrayBuffer;
}

/** Serialises a value as JSON. Refuses values that JSON would silently turn into "{}". */
function toJson(value) {
  if (typeof value === "object" && value !== null && value.toJSON === undefined) {
    checkSerialisable(value, "the value");
    for (const name in value) {
      const member = value[name];
      if (typeof member === "object" && member !== null) checkSerialisable(member, `member "${name}"`);
    }
  }
  const text = JSON.stringify(value);
  if (text === undefined) throw new TypeError(`emit needs a text, bytes or a JSON value, not ${kindOf(value)}`);
  return text;
}

function checkSerialisable(value, place) {
  if (typeof value.then === "function") {
    throw new TypeError(`${place} is a promise: there are no promises across calls; emit its value`);
  }
  const isLost =
    value instanceof Map || value instanceof Set || (typeof value.next === "function" && value[Symbol.iterator]);
  if (isLost && value.toJSON === undefined) {
    throw new TypeError(`${place} is ${kindOf(value)}, which JSON cannot hold: make an array or a plain object of it`);
  }
}

/** An incoming record. Its text is decoded on demand. */
class Record {
  constructor(shared, index) {
    this._shared = shared;
    this._at = INPUT_WORDS * index;
    this.index = index;
  }

  get key() {
    return this._text(0);
  }

  get sequence() {
    return this._text(4);
  }

  get subSequence() {
    return this._shared.inputs[this._at + 6];
  }

  get route() {
    return this._shared.upstream[this._shared.inputs[this._at + 7]];
  }

  get arrivedMs() {
    const { inputs } = this._shared;
    return (inputs[this._at + 8] >>> 0) + inputs[this._at + 9] * 0x1_0000_0000;
  }

  bytes() {
    const { arena, inputs } = this._shared;
    const start = inputs[this._at + 2];
    return arena.subarray(start, start + inputs[this._at + 3]);
  }

  text() {
    return this._text(2);
  }

  json() {
    const text = this._text(2);
    try {
      return JSON.parse(text);
    } catch (error) {
      throw new Error(`the payload is not JSON: ${error.message}`);
    }
  }

  /** Returns the text whose span is in the words `word` and `word + 1`. */
  _text(word) {
    const shared = this._shared;
    const start = shared.inputs[this._at + word];
    const end = start + shared.inputs[this._at + word + 1];
    // Decode all bytes at once: decoding costs a call into the engine, slicing is cheap.
    if (shared.text === undefined) {
      shared.text = bytesAsCharacters(shared.arena);
      shared.isAscii = isAscii(shared.arena);
    }
    const text = shared.text.slice(start, end);
    if (shared.isAscii || isAscii(shared.arena.subarray(start, end))) return text;
    try {
      return decodeURIComponent(escape(text));
    } catch {
      throw new Error("the payload is not UTF-8");
    }
  }
}

/** Collects the outcomes of the records of a batch. One object serves all batches. */
class Out {
  constructor() {
    this._numbers = new Map();
    this._begin(0);
  }

  emit(route, value, key) {
    const number = this._number(route);
    if (typeof value !== "string" && !isBytes(value)) value = toJson(value);
    this._push(number, value, key);
  }

  pass(route, key) {
    this._push(this._number(route), undefined, key);
  }

  reject(why) {
    this._rejected = String(why);
  }

  at(record) {
    this._settle();
    if (record.index < this._at) {
      throw new Error("outputs must be in the order of the records");
    }
    if (record.index > this._at) this._input(record.index);
    return this;
  }

  /** Sets the numbers of the routes that `configure` has declared. */
  _declare(routes) {
    this._numbers = new Map(routes.map((route, index) => [route.name, index]));
  }

  _number(route) {
    const number = this._numbers.get(route);
    if (number === undefined) {
      const declared = [...this._numbers.keys()].join(", ");
      throw new Error(`unknown route "${route}": the plugin declares ${declared}`);
    }
    return number;
  }

  _push(number, value, key) {
    // Otherwise a promise that resolves after its call could write into another call's outputs.
    if (this._at < 0) {
      throw new Error("no current record: in `batch`, call out.at(record) first; nothing can be emitted after a call");
    }
    if (key !== undefined && typeof key !== "string" && !isBytes(key)) {
      throw new TypeError(`a partition key must be a text or bytes, not ${kindOf(key)}`);
    }
    this._outputs.push(this._at, number);
    this._values.push(key, value);
  }

  _begin(count) {
    this._count = count;
    this._at = -1;
    this._mark = 0;
    this._rejected = undefined;
    // Two numbers and two values per output; two values per reject.
    this._outputs = [];
    this._values = [];
    this._rejects = [];
  }

  /** Begins the outputs of another record. */
  _input(index) {
    this._settle();
    this._at = index;
    this._mark = this._outputs.length;
  }

  /** Whether the current record has an output or was rejected. */
  _hasOutcome() {
    return this._rejected !== undefined || this._outputs.length > this._mark;
  }

  /** Discards the outputs of a rejected record. */
  _settle() {
    if (this._rejected === undefined) return;
    this._outputs.length = this._mark;
    this._values.length = this._mark;
    this._rejects.push(this._at, this._rejected);
    this._rejected = undefined;
  }

  /** Joins the values in one arena and returns the result of the call. */
  _finish() {
    this._settle();
    const arena = new Arena();
    const { _outputs: pairs, _values: values, _rejects: refused } = this;
    const outputs = new Array(pairs.length * 3);
    for (let from = 0, to = 0; from < pairs.length; from += 2, to += 6) {
      outputs[to] = pairs[from];
      outputs[to + 1] = pairs[from + 1];
      arena.add(values[from], outputs, to + 2);
      arena.add(values[from + 1], outputs, to + 4);
    }
    const rejects = new Array((refused.length / 2) * 3);
    for (let from = 0, to = 0; from < refused.length; from += 2, to += 3) {
      rejects[to] = refused[from];
      arena.add(refused[from + 1], rejects, to + 1);
    }
    return { arena: arena.bytes(), outputs, rejects };
  }

  /** Releases all data of the batch. */
  _end() {
    this._begin(0);
  }
}

/** Collects texts and bytes. Consecutive texts are encoded together. */
class Arena {
  constructor() {
    this._bytes = undefined;
    this._used = 0;
    this._texts = "";
    this._waiting = [];
  }

  /** Adds a text, bytes, or nothing, and writes its span to `words`. */
  add(value, words, at) {
    if (value === undefined) {
      words[at] = NONE;
      words[at + 1] = 0;
    } else if (typeof value === "string") {
      // This span is right if all texts are ASCII; otherwise `_flush` corrects it.
      words[at] = this._used + this._texts.length;
      words[at + 1] = value.length;
      this._texts += value;
      this._waiting.push(words, at);
    } else {
      this._flush();
      const view = ArrayBuffer.isView(value)
        ? new Uint8Array(value.buffer, value.byteOffset, value.byteLength)
        : new Uint8Array(value);
      words[at] = this._used;
      words[at + 1] = view.length;
      this._append(view);
    }
  }

  /** Returns all bytes that were added. */
  bytes() {
    this._flush();
    return this._bytes === undefined ? new Uint8Array(0) : this._bytes.subarray(0, this._used);
  }

  _flush() {
    const { _texts: texts, _waiting: waiting } = this;
    if (texts.length === 0) return;
    this._texts = "";
    this._waiting = [];
    const encoded = encodeAscii(texts);
    if (encoded !== undefined) {
      this._append(encoded);
      return;
    }
    let start = 0;
    for (let index = 0; index < waiting.length; index += 2) {
      const words = waiting[index];
      const at = waiting[index + 1];
      const text = texts.slice(start, (start += words[at + 1]));
      const bytes = encodeText(text);
      words[at] = this._used;
      words[at + 1] = bytes.length;
      this._append(bytes);
    }
  }

  /** Appends bytes. The capacity doubles, so a byte is moved once or twice on average. */
  _append(bytes) {
    const due = this._used + bytes.length;
    if (this._bytes === undefined) {
      this._bytes = bytes;
    } else if (due > this._bytes.length) {
      const grown = new Uint8Array(Math.max(due, 2 * this._bytes.length, 1024));
      grown.set(this._bytes.subarray(0, this._used));
      this._bytes = grown;
    }
    if (this._bytes !== bytes) this._bytes.set(bytes, this._used);
    this._used = due;
  }
}

/** Makes the descriptor of a definition. */
function describe({ name, version, accepts = [], routes, needsColumns }) {
  const ways = Object.entries(routes ?? {}).map(([name, given]) => {
    const { format, columns } = typeof given === "string" ? { format: given } : given;
    return { name, format, columns: columnsOf(columns) };
  });
  const needed = columnsOf(needsColumns).map(({ name, dataType, nullable }) => {
    return { name, data_type: dataType, nullable };
  });
  const extra = needed.length === 0 ? [] : [["needs-columns", JSON.stringify(needed)]];
  return { name, version, accepts, routes: ways, extra };
}

/** Converts `{ name: "type" }` to columns; a type that ends with `?` is nullable. */
function columnsOf(columns) {
  return Object.entries(columns ?? {}).map(([name, type]) => {
    const nullable = type.endsWith("?");
    return { name, dataType: nullable ? type.slice(0, -1) : type, nullable };
  });
}

/** Text of an error for humans: its message, and for errors of the engine also their kind and place. */
function reason(error) {
  if (!(error instanceof Error)) return String(error);
  if (error.constructor === Error || error instanceof Retry) return error.message;
  const place = /\(?([^\s(]+:\d+)(:\d+)?\)?$/m.exec(error.stack ?? "");
  return `${error.name}: ${error.message}${place ? ` (${place[1]})` : ""}`;
}

/** For the capabilities: returns the host's answer, or throws its failure as an `Error` or `Retry`. */
export function answerOf(ask) {
  try {
    return ask();
  } catch (failure) {
    const given = failure?.payload ?? failure?.val ?? failure;
    if (typeof given?.retryable !== "boolean") throw failure;
    throw given.retryable ? new Retry(given.message) : new Error(given.message);
  }
}

/** Encodes a text as UTF-8. A lone surrogate becomes U+FFFD. */
export function encodeText(text) {
  return encodeAscii(text) ?? encode(text);
}

/** Decodes UTF-8. Throws if the bytes are not UTF-8. */
export function decodeText(bytes) {
  const text = bytesAsCharacters(bytes);
  return isAscii(bytes) ? text : decodeURIComponent(escape(text));
}

// The engine has no TextDecoder. Its base64 functions are native, so they convert between bytes and
// characters fast.

/** Makes one character of each byte. */
function bytesAsCharacters(bytes) {
  return atob(bytes.toBase64());
}

/** Encodes an ASCII text; returns undefined for other texts. */
function encodeAscii(text) {
  try {
    const bytes = Uint8Array.fromBase64(btoa(text));
    return isAscii(bytes) ? bytes : undefined;
  } catch {
    return undefined; // a character above 255
  }
}

/** Encodes any text as UTF-8. */
function encode(text) {
  return Uint8Array.fromBase64(btoa(unescape(encodeURIComponent(text.toWellFormed()))));
}

/** Whether all bytes are below 128. Checks 32 bytes at a time. */
function isAscii(bytes) {
  let index = 0;
  const length = bytes.length;
  const offset = bytes.byteOffset;
  while (index < length && ((offset + index) & 3) !== 0) {
    if (bytes[index++] >= 0x80) return false;
  }
  const words = new Int32Array(bytes.buffer, offset + index, (length - index) >> 2);
  const count = words.length;
  let word = 0;
  for (; word + 8 <= count; word += 8) {
    const all =
      words[word] | words[word + 1] | words[word + 2] | words[word + 3] |
      words[word + 4] | words[word + 5] | words[word + 6] | words[word + 7];
    if ((all & 0x8080_8080) !== 0) return false;
  }
  for (index += 4 * word; index < length; index++) {
    if (bytes[index] >= 0x80) return false;
  }
  return true;
}

// A replay must give the same result for the same record, so the time and random numbers are derived
// from the record. The real ones are capabilities: `clock.js` and `random.js`.

/** The current record, the shard, and the random state of that record. */
let current;
let where = "";
let random;

const EngineDate = Date;
/** Arrival time of the current record; before the first one, the Unix epoch. */
const nowMs = () => (current === undefined ? 0 : current.arrivedMs);
globalThis.Date = new Proxy(EngineDate, {
  apply: () => new EngineDate(nowMs()).toString(),
  construct: (_, given) => (given.length === 0 ? new EngineDate(nowMs()) : new EngineDate(...given)),
  get: (_, name) => (name === "now" ? nowMs : EngineDate[name]),
});
EngineDate.prototype.constructor = globalThis.Date;
Reflect.deleteProperty(globalThis, "performance");

/** xorshift128, seeded by the shard and the record. */
Math.random = () => {
  random ??= seeded(current === undefined ? where : `${where}/${current.sequence}/${current.subSequence}`);
  let turned = random[3];
  const first = random[0];
  random[3] = random[2];
  random[2] = random[1];
  random[1] = first;
  turned ^= turned << 11;
  turned ^= turned >>> 8;
  random[0] = turned ^ first ^ (first >>> 19);
  return (random[0] >>> 0) / 0x1_0000_0000;
};

/** Hashes a text to four words: FNV-1a with four initial values. */
function seeded(text) {
  const words = new Uint32Array([0x811c9dc5, 0x9e3779b9, 0x85ebca6b, 0xc2b2ae35]);
  for (let word = 0; word < 4; word++) {
    let hash = words[word];
    for (let index = 0; index < text.length; index++) {
      hash = Math.imul(hash ^ text.charCodeAt(index), 0x0100_0193);
    }
    words[word] = hash | 1; // never all zero
  }
  return words;
}

// Without the capability `log`, printed lines are dropped; `log.js` replaces the console.
const drop = () => {};
globalThis.console = { trace: drop, debug: drop, log: drop, info: drop, warn: drop, error: drop };
