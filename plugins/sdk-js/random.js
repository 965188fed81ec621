/** The capability `random`. `Math.random` stays with the numbers of the record. */
import host from "shardmill:plugin/random";

/** A number from 0 to below 1 that nobody can predict. */
export function random() {
  // 64 bits come as a number, rounded to the 53 that it holds.
  return (Number(host.nextU64()) % 0x1_0000_0000_0000) / 0x1_0000_0000_0000;
}
