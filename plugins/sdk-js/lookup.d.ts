/**
 * The capability `lookup`: returns the rows of the table `name` in the order of the keys; undefined for a
 * key without a row. Look up all keys of a batch at once, in `batch`.
 */
export function lookup(name: string, keys: readonly unknown[]): ({ [column: string]: any } | undefined)[];
