/* packed-readings: decodes the packed structures that a sensor's firmware sends, and emits JSON.
 *
 * Accepts application/octet-stream: each record is one `reading` as below, little-endian, without
 * padding. Emits {"device":…,"at_ms":…,"celsius":…,"humidity":…,"label":…} on the route `readings`.
 * Readings above the configured `alarm_celsius` (a whole number, 60 by default) also go to the route
 * `alarms`. */

#include "../../plugins/sdk-c/shardmill.h"

enum { READINGS, ALARMS }; /* routes, in the order of their declaration */

#define VERSION 2

/* A real plugin would include the firmware's own header here. */
typedef struct __attribute__((packed)) {
    uint8_t version;
    uint32_t device;
    uint64_t at_ms;
    int16_t centi_celsius;
    uint8_t humidity_percent;
    char label[8]; /* padded with zeros, or full */
} reading;

_Static_assert(sizeof(reading) == 24, "what the firmware sends");

static long alarm_celsius = 60;

static void declare_columns(void) {
    sm_column("device", "bigint");
    sm_column("at_ms", "bigint");
    sm_column("celsius", "numeric");
    sm_column("humidity", "integer");
    sm_column("label", "text");
}

void sm_configure(const sm_context *context) {
    sm_plugin("packed-readings", "0.1.0");
    sm_accepts("application/octet-stream");
    sm_route("readings", "application/json");
    declare_columns();
    sm_route("alarms", "application/json");
    declare_columns();

    sm_bytes value;
    if (sm_json_member(context->config, "alarm_celsius", &value)) {
        const char *text = sm_c_text(value);
        char *end;
        alarm_celsius = strtol(text, &end, 10);
        if (end == text || *end != 0)
            sm_refuse(sm_format("config.alarm_celsius: expected a whole number, found %s", text));
    }
}

static void emit(uint32_t route, const reading *of) {
    const int celsius = of->centi_celsius;
    sm_begin(route);
    sm_put_text("{\"device\":");
    sm_put_int(of->device);
    sm_put_text(",\"at_ms\":");
    sm_put_int((int64_t)of->at_ms);
    sm_put_text(sm_format(",\"celsius\":%s%d.%02d", celsius < 0 ? "-" : "", abs(celsius) / 100,
                          abs(celsius) % 100));
    sm_put_text(",\"humidity\":");
    sm_put_int(of->humidity_percent);
    sm_put_text(",\"label\":");
    const uint32_t label_size = (uint32_t)strnlen(of->label, sizeof of->label);
    sm_put_json_string((sm_bytes){(const uint8_t *)of->label, label_size});
    sm_put_text("}");
    sm_end();
}

void sm_record(const sm_input *record) {
    reading of;
    if (record->payload.size != sizeof of) {
        sm_reject(sm_format("expected a reading of %zu bytes, found %u", sizeof of,
                            (unsigned)record->payload.size));
        return;
    }
    memcpy(&of, record->payload.data, sizeof of);
    if (of.version != VERSION) {
        sm_reject(sm_format("expected a reading of version %d, found %d", VERSION, of.version));
        return;
    }
    emit(READINGS, &of);
    if (of.centi_celsius > 100 * alarm_celsius)
        emit(ALARMS, &of);
}
