// Calls the capabilities that the host itself answers: log, metrics, clock, random.
import { plugin } from "shardmill";
import { nowMs } from "shardmill/clock";
import { log } from "shardmill/log";
import { counter } from "shardmill/metrics";
import { random } from "shardmill/random";

let seen;

export const stage = plugin({
  name: "near",
  version: "0.1.0",
  routes: { out: "application/json" },
  needsColumns: { make: "text", id: "bigint?" },

  configure() {
    seen = counter("seen", "Records seen");
    log.info("configured");
  },

  record(record, out) {
    console.warn(`saw ${record.text()}`);
    seen.observe(1);
    out.emit("out", {
      now_is_later: nowMs() >= record.arrivedMs && nowMs() > 1_700_000_000_000,
      differ: random() !== random(),
    });
  },
});
