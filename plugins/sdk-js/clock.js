/** The capability `clock`: the time of day. `Date` stays with the time of the record. */
import host from "shardmill:plugin/clock";

/** Milliseconds since the Unix epoch. */
export const nowMs = () => host.nowMs();
