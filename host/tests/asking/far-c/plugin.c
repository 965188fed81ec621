/* Calls the capabilities that ask other servers: lookup, http. */

#define SM_BATCH
#include "../../../../plugins/sdk-c/shardmill.h"

enum { OUT };

static char url[256];

void sm_configure(const sm_context *context) {
    sm_bytes value, text;
    if (!sm_json_member(context->config, "url", &value) || !sm_json_string(value, &text)
        || text.size >= sizeof url) {
        sm_refuse("expected `url`, a short text");
        return;
    }
    memcpy(url, text.data, text.size);
    sm_plugin("far", "0.1.0");
    sm_route("out", "application/json");
}

static bool ask(const sm_input *record, sm_http_response *response, sm_failure *failure) {
    const sm_header header = {sm_text("x-key"), record->key};
    const bool is_url = record->payload.size > 4 && memcmp(record->payload.data, "http", 4) == 0;
    const sm_http_request request = {
        .method = sm_text("POST"),
        .url = is_url ? record->payload
                      : sm_text(sm_format("%s%.*s", url, SM_ARG(record->payload))),
        .headers = &header,
        .header_count = 1,
        .body = record->payload,
    };
    return sm_http(&request, response, failure);
}

void sm_batch(const sm_input *records, uint32_t count) {
    sm_bytes *keys = sm_alloc(count * sizeof *keys), *rows = sm_alloc(count * sizeof *rows);
    sm_failure failure;
    for (uint32_t i = 0; i < count; i++)
        keys[i] = records[i].payload;
    if (!sm_lookup("cars", keys, count, rows, &failure)) {
        sm_fail(&failure);
        return;
    }
    for (uint32_t i = 0; i < count; i++) {
        sm_http_response response;
        sm_at(&records[i]);
        if (rows[i].data != NULL)
            sm_emit(OUT, rows[i]);
        else if (ask(&records[i], &response, &failure))
            sm_emit(OUT, response.body);
        else
            sm_fail(&failure);
    }
}
