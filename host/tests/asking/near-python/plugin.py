"""Calls the capabilities that the host itself answers: log, metrics, clock, random."""

import shardmill_clock
import shardmill_log
import shardmill_metrics
import shardmill_random
from shardmill import plugin


@plugin(
    name="near",
    version="0.1.0",
    routes={"out": "application/json"},
    needs_columns={"make": "text", "id": "bigint?"},
)
class Near:
    def configure(self, config, context):
        self.seen = shardmill_metrics.counter("seen", "Records seen")
        shardmill_log.info("configured")

    def record(self, record, out):
        print(f"saw {record.text()}")
        self.seen.observe(1)
        now_ms = shardmill_clock.now_ms()
        later = now_ms / 1000 >= record.arrived.timestamp() and now_ms > 1_700_000_000_000
        differ = shardmill_random.random() != shardmill_random.random()
        out.emit("out", {"now_is_later": later, "differ": differ})
