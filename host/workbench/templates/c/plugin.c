/* {{name}}: greets. Accepts {"name":"Ada"}, emits {"greeting":"Hello, Ada!"} on the route `out`. */

#include "shardmill.h"

enum { OUT }; /* routes, in the order of their declaration */

void sm_configure(const sm_context *context) {
    (void)context; /* context->config is the TOML table [stage.config] as JSON */
    sm_plugin("{{name}}", "0.1.0");
    sm_accepts("application/json");
    sm_route("out", "application/json");
    sm_column("greeting", "text");
}

void sm_record(const sm_input *record) {
    sm_bytes value, name;
    if (!sm_json_member(record->payload, "name", &value) || !sm_json_string(value, &name)) {
        /* The record becomes a dead letter with this reason. Other records are not affected. */
        sm_reject("expected an object with a text `name`");
        return;
    }
    const char *greeting = sm_format("Hello, %.*s!", SM_ARG(name)); /* edit me */
    sm_begin(OUT);
    sm_put_text("{\"greeting\":");
    sm_put_json_string(sm_text(greeting));
    sm_put_text("}");
    sm_end();
}
