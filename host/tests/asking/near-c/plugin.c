/* Calls the capabilities that the host itself answers: log, metrics, clock, random. */

#include "../../../../plugins/sdk-c/shardmill.h"

enum { OUT };

static uint32_t seen;

void sm_configure(const sm_context *context) {
    (void)context;
    sm_plugin("near", "0.1.0");
    sm_needs("make", "text");
    sm_needs_nullable("id", "bigint");
    sm_route("out", "application/json");
    seen = sm_counter("seen", "Records seen");
    sm_log(SM_INFO, "configured");
}

void sm_record(const sm_input *record) {
    sm_log(SM_WARN, sm_format("saw %.*s", SM_ARG(record->payload)));
    sm_observe(seen, 1);
    const uint64_t first = sm_random(), now_ms = sm_now_ms();
    sm_begin(OUT);
    sm_put_text("{\"now_is_later\":");
    sm_put_text(now_ms >= record->arrived_ms && now_ms > 1700000000000 ? "true" : "false");
    sm_put_text(",\"differ\":");
    sm_put_text(first != sm_random() ? "true}" : "false}");
    sm_end();
}
