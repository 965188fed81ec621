/** The capability `clock`: the time of day. `Date` still uses the time of the record. */
import host from "shardmill:plugin/clock";

/** Milliseconds since the Unix epoch. */
export const nowMs = () => host.nowMs();
