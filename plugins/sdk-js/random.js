/** The capability `random`. `Math.random` is still seeded by the record. */
import host from "shardmill:plugin/random";

/** Returns an unpredictable number, at least 0 and less than 1. */
export function random() {
  // The 64 bits arrive as a JavaScript number, rounded to its 53 highest bits: the largest values become 2 ** 64.
  return (Number(host.nextU64()) % 2 ** 64) / 2 ** 64;
}
