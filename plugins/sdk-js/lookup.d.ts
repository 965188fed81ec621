/**
 * The capability `lookup`: the rows of the table `name` for the keys, in their order; undefined where
 * there is none. Ask for all keys of a batch at once, in `batch`.
 */
export function lookup(name: string, keys: readonly unknown[]): ({ [column: string]: any } | undefined)[];
