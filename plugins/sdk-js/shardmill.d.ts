/** What shardmill plugins in JavaScript are written with. */

/** A column's PostgreSQL type, such as `bigint`; with a `?` at its end it may be null: `text?`. */
export type Columns = { readonly [name: string]: string };

/** A way out: the media type of its payloads, and the columns of its rows where they are known. */
export type RouteDefinition = string | { readonly format: string; readonly columns?: Columns };

/** What may depend on the configuration. */
export interface Description {
  /** For error texts and metrics. */
  readonly name: string;
  /** The plugin's own version, such as `0.1.0`. */
  readonly version: string;
  /** The media types that can be processed. None: any. */
  readonly accepts?: readonly string[];
  /** The ways out, by name (`a-z`, `0-9`, `-`, `_`). */
  readonly routes: { readonly [name: string]: RouteDefinition };
  /** The columns that the rows must have that come in. */
  readonly needsColumns?: Columns;
}

/**
 * A plugin. `record` or `batch` is due.
 *
 * What becomes of a record:
 *
 * | what the plugin does                     | what becomes of it                           |
 * |------------------------------------------|----------------------------------------------|
 * | emits or passes it, once or more often   | delivered on the routes named                |
 * | nothing                                  | filtered: dropped on purpose, and counted    |
 * | rejects it, or throws                    | dead-lettered alone, with the reason         |
 * | throws `Retry`                           | tried again with its batch, after a pause    |
 *
 * It must depend on the record and the configuration alone, for a record may be replayed. So `Date`
 * without arguments is when the record arrived, and `Math.random` is seeded by the record.
 */
export interface Plugin extends Description {
  /**
   * Called once, before the first record, with the TOML table `[stage.config]`. It may return parts of
   * the description that depend on it. What it throws refuses the configuration.
   */
  configure?(config: any, context: Context): Partial<Description> | void;
  /** Says what becomes of one record. */
  record?(record: Record, out: Out): void;
  /**
   * Sees a whole batch before its records, to ask the host for what they need at once; or, without
   * `record`, says what becomes of all: `out.at(record).emit(…)`. What it throws fails the batch.
   * Batches are cut by size and time and differ in a replay.
   */
  batch?(records: readonly Record[], out: BatchOut): void;
}

/** Where the plugin is used. The same for all calls of an instance. */
export interface Context {
  readonly streamName: string;
  readonly shardId: string;
  /** The routes that lead here. */
  readonly upstream: readonly {
    readonly name: string;
    readonly format: string;
    readonly columns: readonly { name: string; dataType: string; nullable: boolean }[];
  }[];
  /** Names and values that later versions of the host add. */
  readonly extra: { readonly [name: string]: string };
}

/** A record on its way in. Do not keep it beyond the call. */
export interface Record {
  /** Its place in the batch, from 0. */
  readonly index: number;
  /** The partition key. */
  readonly key: string;
  /** The sequence number in its shard: up to 129 digits, so it fits no number. */
  readonly sequence: string;
  /** The position within an aggregated record, from 0. */
  readonly subSequence: number;
  /** The name of the route that it came by. */
  readonly route: string;
  /** When the stream took it, in milliseconds since the Unix epoch. */
  readonly arrivedMs: number;
  /** The payload, not copied: valid until the call ends. */
  bytes(): Uint8Array;
  /** The payload as text. Throws where it is not UTF-8. */
  text(): string;
  /**
   * The payload as a JSON value. Throws where it is none. Numbers are those of JavaScript: integers
   * beyond 2^53 are rounded.
   */
  json(): any;
}

/** Takes what becomes of a record. */
export interface Out {
  /**
   * Delivers a payload on a route, under the key that came in or another. A string goes as it is in
   * UTF-8, bytes as they are, anything else as JSON. Bytes must not be changed until the call ends.
   */
  emit(route: string, value: unknown, key?: string): void;
  /** Delivers the record as it came in, under its key or another. Nothing is copied. */
  pass(route: string, key?: string): void;
  /** Dead-letters the record. What was emitted for it is taken back. */
  reject(reason: string): void;
}

/** Takes what becomes of the records of a batch. */
export interface BatchOut extends Out {
  /** What follows belongs to this record. Records are due in their order. */
  at(record: Record): Out;
}

/** Thrown by a plugin: the whole batch is tried again after a pause. */
export class Retry extends Error {}

/** Makes the export `stage` of a plugin. */
export function plugin(definition: Plugin): object;

/** The UTF-8 bytes of a text. */
export function encodeText(text: string): Uint8Array;
/** The text of UTF-8 bytes. Throws where they are none. */
export function decodeText(bytes: Uint8Array): string;
