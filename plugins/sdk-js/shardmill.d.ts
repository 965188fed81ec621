/** SDK for shardmill plugins in JavaScript. */

/** PostgreSQL types of columns by name, such as `bigint`. A type that ends with `?` is nullable: `text?`. */
export type Columns = { readonly [name: string]: string };

/** A route: the media type of its payloads, and the columns of its rows if they are known. */
export type RouteDefinition = string | { readonly format: string; readonly columns?: Columns };

/** Parts of a plugin that may depend on the configuration. */
export interface Description {
  /** Name for error texts and metrics. */
  readonly name: string;
  /** The plugin's own version, such as `0.1.0`. */
  readonly version: string;
  /** Accepted media types. If absent or empty, all are accepted. */
  readonly accepts?: readonly string[];
  /** Routes by name (`a-z`, `0-9`, `-`, `_`). */
  readonly routes: { readonly [name: string]: RouteDefinition };
  /** Columns that the incoming rows must have. */
  readonly needsColumns?: Columns;
}

/**
 * A plugin. It must have `record` or `batch`.
 *
 * Outcome of a record:
 *
 * | what the plugin does                     | the record is                                |
 * |------------------------------------------|----------------------------------------------|
 * | emits or passes it, once or more often   | delivered on the routes named                |
 * | nothing                                  | filtered: dropped on purpose                 |
 * | rejects it, or throws                    | dead-lettered alone, with the reason         |
 * | throws `Retry`                           | retried with its batch, after a backoff      |
 *
 * The outcome must depend only on the record and the configuration, because a record may be replayed. So
 * `Date` without arguments is the arrival time of the record, and `Math.random` is seeded by the record.
 */
export interface Plugin extends Description {
  /**
   * Configures the plugin. Called once, before the first record, with the TOML table `[stage.config]`. It
   * may return parts of the description that depend on it. If it throws, the configuration is refused.
   */
  configure?(config: any, context: Context): Partial<Description> | void;
  /** Processes one record. */
  record?(record: Record, out: Out): void;
  /**
   * Sees a whole batch before its records, so that it can make one request to the host for all of them.
   * Without `record`, it processes all records: `out.at(record).emit(…)`. If it throws, the batch fails.
   * Batches are cut by size and time, so a replay has different ones.
   */
  batch?(records: readonly Record[], out: BatchOut): void;
}

/** The stage that the plugin runs in. The same for all calls of an instance. */
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

/** An incoming record. Do not keep it after the call. */
export interface Record {
  /** Index in the batch, from 0. */
  readonly index: number;
  /** The partition key. */
  readonly key: string;
  /** The sequence number in its shard: up to 129 digits, too many for a number. */
  readonly sequence: string;
  /** The position within an aggregated record, from 0. */
  readonly subSequence: number;
  /** Name of the upstream route on which the record came. */
  readonly route: string;
  /** Arrival time in the stream, in milliseconds since the Unix epoch. */
  readonly arrivedMs: number;
  /** The payload, not copied: valid until the call ends. */
  bytes(): Uint8Array;
  /** The payload as text. Throws if it is not UTF-8. */
  text(): string;
  /**
   * The payload as a JSON value. Throws if it is not JSON. Numbers are JavaScript numbers: integers
   * above 2^53 are rounded.
   */
  json(): any;
}

/** Collects the outcome of a record. */
export interface Out {
  /**
   * Delivers a payload on a route, under the key of the record or another key. A string is sent as UTF-8,
   * bytes unchanged, anything else as JSON. Do not change the bytes until the call ends.
   */
  emit(route: string, value: unknown, key?: string): void;
  /** Delivers the unchanged record, under its key or another key. Nothing is copied. */
  pass(route: string, key?: string): void;
  /** Dead-letters the record and discards its outputs. */
  reject(reason: string): void;
}

/** Takes the outcomes of the records of a batch. */
export interface BatchOut extends Out {
  /** What follows belongs to this record. Call it for the records in their order. */
  at(record: Record): Out;
}

/** Error that a plugin throws to have the whole batch retried after a backoff. */
export class Retry extends Error {}

/** Makes the export `stage` of a plugin. */
export function plugin(definition: Plugin): object;

/** Encodes a text as UTF-8. */
export function encodeText(text: string): Uint8Array;
/** Decodes UTF-8. Throws if the bytes are not UTF-8. */
export function decodeText(bytes: Uint8Array): string;
