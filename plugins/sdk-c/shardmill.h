/* SDK for shardmill plugins in C: one header, without generated code or offsets.
 *
 * A plugin includes this header in one source file and defines two functions:
 *
 *     #include "shardmill.h"
 *
 *     enum { OUT }; // routes, in the order of their declaration
 *
 *     void sm_configure(const sm_context *context) {
 *         sm_plugin("upper", "0.1.0");
 *         sm_route("out", "text/plain");
 *     }
 *
 *     void sm_record(const sm_input *record) {
 *         if (record->payload.size == 0)
 *             sm_reject("expected a text, found an empty payload");
 *         else
 *             sm_emit(OUT, record->payload);
 *     }
 *
 * `shardmill plugin build` compiles it and wraps it as a component. Outcome of a record:
 *
 *     emitted or passed, once or more often    delivered on the routes named
 *     nothing                                  filtered: dropped on purpose
 *     sm_reject                                dead-lettered alone, with the reason
 *     sm_retry                                 retried with its batch, after a backoff
 *     a trap (abort, a failed assert, …)       dead-lettered alone, with a backtrace
 *
 * Memory: the data of records, the memory from `sm_alloc` and the answers of the host are valid
 * until the call ends; then all of it is freed at once. Use `malloc` for data that must live
 * longer. Treat an instance's memory as a cache: it is lost at a trap, and a replay starts with
 * another instance. The outcome of a record must depend only on the record and the configuration.
 */
#ifndef SHARDMILL_H
#define SHARDMILL_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

_Static_assert(sizeof(void *) == 4, "shardmill.h is for wasm32: build with `shardmill plugin build`");

/* ---- Inputs of a plugin ------------------------------------------------------------------- */

/* Bytes, or a UTF-8 text without a terminating zero byte. */
typedef struct {
    const uint8_t *data;
    uint32_t size;
} sm_bytes;

/* A column of a route's rows. */
typedef struct {
    sm_bytes name;
    sm_bytes data_type; /* a PostgreSQL type name, such as `bigint` */
    bool nullable;
} sm_column_info;

/* An upstream route that leads to this plugin. */
typedef struct {
    sm_bytes name;
    sm_bytes format; /* a media type */
    const sm_column_info *columns;
    uint32_t column_count;
} sm_route_info;

/* The stage that the plugin runs in. */
typedef struct {
    sm_bytes stream_name;
    sm_bytes shard_id;
    sm_bytes config; /* the TOML table [stage.config] as a JSON object */
    const sm_route_info *upstream;
    uint32_t upstream_count;
} sm_context;

/* An incoming record. */
typedef struct {
    sm_bytes payload;
    sm_bytes key;      /* the partition key: UTF-8 */
    sm_bytes sequence; /* the sequence number: up to 129 digits, so it fits no integer */
    uint32_t sub_sequence;
    uint32_t route;      /* an index into `context->upstream` */
    uint64_t arrived_ms; /* arrival time since the Unix epoch: use it for "now" */
    uint32_t index;      /* index in the batch: may differ in a replay */
} sm_input;

/* ---- Functions that a plugin defines ------------------------------------------------------ */

/* Called once, before the first record: declares the plugin, or refuses its configuration. */
void sm_configure(const sm_context *context);

#ifdef SM_BATCH
/* Replaces `sm_record` in a plugin that defines SM_BATCH before it includes this header. It sees a
 * whole batch, so that it can make one request to the host for all records. It must call `sm_at` for
 * each record, in their order, before it emits or rejects for that record. */
void sm_batch(const sm_input *records, uint32_t count);
#else
/* Called for each record. */
void sm_record(const sm_input *record);
#endif

/* ---- Texts and memory --------------------------------------------------------------------- */

/* Returns the bytes of a C string. */
static inline sm_bytes sm_text(const char *text) {
    return (sm_bytes){(const uint8_t *)text, (uint32_t)strlen(text)};
}

static inline bool sm_equal(sm_bytes a, sm_bytes b) {
    return a.size == b.size && memcmp(a.data, b.data, a.size) == 0;
}

/* Copies bytes to a C string that is valid until the call ends. */
static inline const char *sm_c_text(sm_bytes bytes);

/* Formats a text as printf does; it is valid until the call ends. Adds 20 kB to the component. Format
 * bytes with `%.*s` and SM_ARG: sm_format("no car: %.*s", SM_ARG(record->payload)). */
static inline const char *sm_format(const char *format, ...) __attribute__((format(printf, 1, 2)));
#define SM_ARG(bytes) (int)(bytes).size, (const char *)(bytes).data

/* Allocates memory that is freed when the call ends. Never null, aligned for any type. */
static inline void *sm_alloc(size_t size);

/* ---- In `sm_configure` -------------------------------------------------------------------- */

/* Names the plugin. Call it exactly once. The texts of these functions must live until the call ends. */
static inline void sm_plugin(const char *name, const char *version);
/* Adds an accepted media type. A plugin that adds none accepts all. */
static inline void sm_accepts(const char *media_type);
/* Declares a route. The first one has the number 0. */
static inline void sm_route(const char *name, const char *format);
/* Declares a column of the last declared route. Its values are never null. */
static inline void sm_column(const char *name, const char *data_type);
/* Declares a column that may be null or absent. */
static inline void sm_nullable_column(const char *name, const char *data_type);
/* Requires a column of the incoming rows. This is checked at the start, before any record. */
static inline void sm_needs(const char *name, const char *data_type);
/* Requires a column that may be null or absent. */
static inline void sm_needs_nullable(const char *name, const char *data_type);
/* Refuses the configuration, so that the pipeline does not start. The text is for humans. */
static inline void sm_refuse(const char *why);

/* ---- For a record ------------------------------------------------------------------------- */

/* Delivers a payload on a route, under the key of the record. */
static inline void sm_emit(uint32_t route, sm_bytes payload);
/* Delivers a payload on a route, under a key of its own, which must be UTF-8. */
static inline void sm_emit_keyed(uint32_t route, sm_bytes key, sm_bytes payload);
/* Delivers the record as it came in, without a copy. */
static inline void sm_pass(uint32_t route);
/* Rejects the record; what was emitted for it is taken back. The reason says what was expected
 * and what was found. */
static inline void sm_reject(const char *reason);
/* Fails the whole batch, which is retried after a backoff: the record may succeed later. */
static inline void sm_retry(const char *reason);

/* Writes an output in place: begin it, put its parts, end it. */
static inline void sm_begin(uint32_t route);
static inline void sm_put(sm_bytes bytes);
static inline void sm_put_text(const char *text);
static inline void sm_put_int(int64_t number);
/* Puts a UTF-8 text as a JSON string with quotation marks. */
static inline void sm_put_json_string(sm_bytes text);
static inline void sm_end(void);

/* ---- The configuration -------------------------------------------------------------------- */

/* Finds a direct member of a JSON object, such as `context->config`, and returns the JSON text of its
 * value in `value`. Returns false if there is no such member. */
static inline bool sm_json_member(sm_bytes object, const char *name, sm_bytes *value);
/* Decodes a JSON string. Returns false if the value is not a string. */
static inline bool sm_json_string(sm_bytes value, sm_bytes *text);

/* ---- Internal: memory --------------------------------------------------------------------- */

#define SM__ALIGN 16u
#define SM__CHUNK_BYTES_MIN (64u << 10)

typedef struct sm__chunk {
    struct sm__chunk *next;
    uint32_t size, used;
} sm__chunk;

/* The memory of one call comes from chunks that are freed when it ends. The largest one is kept, so
 * that calls of the same size need no new chunk. */
static sm__chunk *sm__chunks;

static inline void *sm__alloc(uint32_t size) {
    size = (size + SM__ALIGN - 1) & ~(SM__ALIGN - 1);
    sm__chunk *chunk = sm__chunks;
    if (chunk == NULL || chunk->size - chunk->used < size) {
        uint32_t wanted = chunk == NULL ? SM__CHUNK_BYTES_MIN : 2 * chunk->size;
        if (wanted < size)
            wanted = size;
        /* The header takes SM__ALIGN bytes, so that the memory after it is aligned like malloc's. */
        chunk = malloc(wanted + SM__ALIGN);
        if (chunk == NULL)
            __builtin_trap();
        *chunk = (sm__chunk){sm__chunks, wanted, 0};
        sm__chunks = chunk;
    }
    uint8_t *start = (uint8_t *)chunk + SM__ALIGN + chunk->used;
    chunk->used += size;
    return start;
}

static inline void *sm_alloc(size_t size) {
    if (size > UINT32_MAX / 4)
        __builtin_trap();
    return sm__alloc((uint32_t)size);
}

static inline const char *sm_c_text(sm_bytes bytes) {
    char *text = sm_alloc((size_t)bytes.size + 1);
    memcpy(text, bytes.data, bytes.size);
    text[bytes.size] = 0;
    return text;
}

static inline const char *sm_format(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const int length = vsnprintf(NULL, 0, format, arguments);
    va_end(arguments);
    if (length < 0)
        __builtin_trap(); /* invalid format */
    char *text = sm_alloc((size_t)length + 1);
    va_start(arguments, format);
    vsnprintf(text, (size_t)length + 1, format, arguments);
    va_end(arguments);
    return text;
}

static inline void sm__free_call(void) {
    sm__chunk *kept = sm__chunks; /* the newest is the largest: each is at least twice the one before */
    if (kept == NULL)
        return;
    for (sm__chunk *chunk = kept->next; chunk != NULL;) {
        sm__chunk *next = chunk->next;
        free(chunk);
        chunk = next;
    }
    kept->next = NULL;
    kept->used = 0;
}

/* Allocates memory for the arguments and answers of the host, which never resizes a block. */
__attribute__((export_name("cabi_realloc"), used)) void *
sm__cabi_realloc(void *old, size_t old_size, size_t align, size_t new_size) {
    if (new_size == 0)
        return (void *)align;
    void *block = sm_alloc(new_size);
    if (old_size > 0)
        memcpy(block, old, old_size < new_size ? old_size : new_size);
    return block;
}

/* A growable buffer. It keeps its capacity between calls. */
typedef struct {
    uint8_t *data;
    uint32_t size, room;
} sm__buffer;

static inline uint8_t *sm__reserve(sm__buffer *buffer, uint32_t more) {
    if (buffer->room - buffer->size < more) {
        uint32_t room = buffer->room < 256 ? 256 : buffer->room;
        while (room - buffer->size < more) {
            if (room > UINT32_MAX / 4)
                __builtin_trap();
            room *= 2;
        }
        buffer->data = realloc(buffer->data, room);
        if (buffer->data == NULL)
            __builtin_trap();
        buffer->room = room;
    }
    return buffer->data + buffer->size;
}

static inline void sm__append(sm__buffer *buffer, const void *bytes, uint32_t size) {
    uint8_t *end = sm__reserve(buffer, size);
    if (size > 0)
        memcpy(end, bytes, size);
    buffer->size += size;
}

static inline sm_bytes sm__bytes(sm__buffer *buffer) {
    return (sm_bytes){buffer->data, buffer->size};
}

/* ---- Internal: configure ------------------------------------------------------------------ */

/* This and the structures below have the memory layout of the types of plugin.wit in the canonical
 * ABI. */
typedef struct {
    uint32_t is_error;
    union {
        struct {
            sm_bytes name, version, accepts, routes, extra; /* lists: a start and a count */
        } descriptor;
        sm_bytes error;
    };
} sm__configured;
_Static_assert(sizeof(sm__configured) == 44, "the canonical ABI's layout");
_Static_assert(sizeof(sm_route_info) == 24, "the canonical ABI's layout");
_Static_assert(sizeof(sm_column_info) == 20, "the canonical ABI's layout");

static struct {
    sm_bytes name, version;
    const char *refusal;
    sm__buffer accepts, routes, columns; /* of sm_bytes, sm_route_info, sm_column_info */
} sm__self;

static inline void sm_plugin(const char *name, const char *version) {
    sm__self.name = sm_text(name);
    sm__self.version = sm_text(version);
}

static inline void sm_accepts(const char *media_type) {
    sm_bytes text = sm_text(media_type);
    sm__append(&sm__self.accepts, &text, sizeof text);
}

static inline void sm_route(const char *name, const char *format) {
    sm_route_info route = {sm_text(name), sm_text(format), NULL, 0};
    sm__append(&sm__self.routes, &route, sizeof route);
}

static inline void sm__column(const char *name, const char *data_type, bool nullable) {
    if (sm__self.routes.size == 0) {
        sm_refuse("a column was declared before any route: call sm_route first");
        return;
    }
    sm_column_info column = {sm_text(name), sm_text(data_type), nullable};
    sm__append(&sm__self.columns, &column, sizeof column);
    sm_route_info *routes = (sm_route_info *)sm__self.routes.data;
    routes[sm__self.routes.size / sizeof *routes - 1].column_count++;
}

static inline void sm_column(const char *name, const char *data_type) {
    sm__column(name, data_type, false);
}

static inline void sm_nullable_column(const char *name, const char *data_type) {
    sm__column(name, data_type, true);
}

static inline void sm__needs(const char *name, const char *data_type, const char *rest);

static inline void sm_needs(const char *name, const char *data_type) {
    sm__needs(name, data_type, ",\"nullable\":false}");
}

static inline void sm_needs_nullable(const char *name, const char *data_type) {
    sm__needs(name, data_type, ",\"nullable\":true}");
}

static inline void sm_refuse(const char *why) {
    if (sm__self.refusal == NULL)
        sm__self.refusal = why;
}

/* ---- Internal: process -------------------------------------------------------------------- */

#define SM__INPUT_WORDS 10u
#define SM__NONE UINT32_MAX

typedef struct {
    uint32_t is_error;
    union {
        struct {
            sm_bytes arena, outputs, rejects; /* the last two: a start and a count of words */
        } outcome;
        struct {
            uint32_t retryable, has_input, input;
            sm_bytes message;
        } failure;
    };
} sm__processed;
_Static_assert(sizeof(sm__processed) == 28, "the canonical ABI's layout");

/* Outcome of the batch so far. */
static struct {
    sm__buffer arena, outputs, rejects;
    /* The current record, and the sizes of the buffers at its start. */
    const sm_input *record;
    uint32_t arena_start, outputs_start;
    bool is_rejected;
    /* The open output, between `sm_begin` and `sm_end`. */
    bool is_open;
    uint32_t open_route, open_start;
    /* The failure of the whole batch, and the record at which it occurred. */
    const char *failure;
    bool is_retryable, failed_at_record;
    uint32_t failed_record;
} sm__out;

static inline void sm__at(const sm_input *record) {
    sm__out.record = record;
    sm__out.arena_start = sm__out.arena.size;
    sm__out.outputs_start = sm__out.outputs.size;
    sm__out.is_rejected = sm__out.is_open = false;
}

#ifdef SM_BATCH
/* Selects the record of the next calls. */
static inline void sm_at(const sm_input *record) {
    if (sm__out.record != NULL && record->index <= sm__out.record->index)
        __builtin_trap(); /* records must be selected in the order of the batch */
    sm__at(record);
}
#endif

static inline void sm__output(uint32_t route, uint32_t key, uint32_t key_size, uint32_t payload,
                              uint32_t payload_size) {
    if (sm__out.record == NULL)
        __builtin_trap(); /* no record is selected */
    if (sm__out.is_rejected)
        return;
    const uint32_t words[] = {sm__out.record->index, route, key, key_size, payload, payload_size};
    sm__append(&sm__out.outputs, words, sizeof words);
}

static inline uint32_t sm__arena_append(sm_bytes bytes) {
    const uint32_t start = sm__out.arena.size;
    sm__append(&sm__out.arena, bytes.data, bytes.size);
    return start;
}

static inline void sm_emit(uint32_t route, sm_bytes payload) {
    sm__output(route, SM__NONE, 0, sm__arena_append(payload), payload.size);
}

static inline void sm_emit_keyed(uint32_t route, sm_bytes key, sm_bytes payload) {
    const uint32_t key_start = sm__arena_append(key);
    sm__output(route, key_start, key.size, sm__arena_append(payload), payload.size);
}

static inline void sm_pass(uint32_t route) { sm__output(route, SM__NONE, 0, SM__NONE, 0); }

static inline void sm_reject(const char *reason) {
    if (sm__out.record == NULL)
        __builtin_trap(); /* no record is selected */
    if (sm__out.is_rejected)
        return;
    sm__out.arena.size = sm__out.arena_start;
    sm__out.outputs.size = sm__out.outputs_start;
    const sm_bytes text = sm_text(reason);
    const uint32_t words[] = {sm__out.record->index, sm__arena_append(text), text.size};
    sm__append(&sm__out.rejects, words, sizeof words);
    sm__out.is_rejected = true;
}

static inline void sm__fail(const char *reason, bool is_retryable) {
    if (sm__out.failure != NULL)
        return;
    sm__out.failure = sm_c_text(sm_text(reason));
    sm__out.is_retryable = is_retryable;
    sm__out.failed_at_record = sm__out.record != NULL;
    sm__out.failed_record = sm__out.failed_at_record ? sm__out.record->index : 0;
}

static inline void sm_retry(const char *reason) { sm__fail(reason, true); }

static inline void sm_begin(uint32_t route) {
    sm__out.is_open = true;
    sm__out.open_route = route;
    sm__out.open_start = sm__out.arena.size;
}

static inline void sm_put(sm_bytes bytes) { sm__append(&sm__out.arena, bytes.data, bytes.size); }

static inline void sm_put_text(const char *text) { sm_put(sm_text(text)); }

static inline void sm_put_int(int64_t number) {
    uint8_t digits[20];
    uint32_t first = sizeof digits;
    uint64_t left = number < 0 ? -(uint64_t)number : (uint64_t)number;
    do
        digits[--first] = (uint8_t)('0' + left % 10);
    while ((left /= 10) > 0);
    if (number < 0)
        digits[--first] = '-';
    sm_put((sm_bytes){digits + first, (uint32_t)sizeof digits - first});
}

static inline void sm_put_json_string(sm_bytes text) {
    static const char hex[] = "0123456789abcdef";
    uint8_t *out = sm__reserve(&sm__out.arena, 6 * text.size + 2); /* the longest escape is \u00xx */
    *out++ = '"';
    for (uint32_t i = 0; i < text.size; i++) {
        const uint8_t byte = text.data[i];
        if (byte == '"' || byte == '\\') {
            *out++ = '\\';
            *out++ = byte;
        } else if (byte < 0x20) {
            memcpy(out, "\\u00", 4);
            out[4] = (uint8_t)hex[byte >> 4];
            out[5] = (uint8_t)hex[byte & 15];
            out += 6;
        } else {
            *out++ = byte;
        }
    }
    *out++ = '"';
    sm__out.arena.size = (uint32_t)(out - sm__out.arena.data);
}

static inline void sm_end(void) {
    if (!sm__out.is_open && !sm__out.is_rejected)
        __builtin_trap(); /* sm_end without sm_begin */
    if (sm__out.is_open)
        sm__output(sm__out.open_route, SM__NONE, 0, sm__out.open_start,
                   sm__out.arena.size - sm__out.open_start);
    sm__out.is_open = false;
}

/* The required columns are a JSON array. It is built in the arena, which is not in use yet. */
static inline void sm__needs(const char *name, const char *data_type, const char *rest) {
    sm_put_text(sm__out.arena.size == 0 ? "[{\"name\":" : ",{\"name\":");
    sm_put_json_string(sm_text(name));
    sm_put_text(",\"data_type\":");
    sm_put_json_string(sm_text(data_type));
    sm_put_text(rest);
}

/* C passes structures by pointer, the canonical ABI passes their members: hence these parameters. */
__attribute__((export_name("shardmill:plugin/stage@0.1.0#configure"), used)) sm__configured *
sm__configure(const uint8_t *stream, uint32_t stream_size, const uint8_t *shard,
              uint32_t shard_size, const uint8_t *config, uint32_t config_size,
              const sm_route_info *upstream, uint32_t upstream_count, const void *extra,
              uint32_t extra_count) {
    (void)extra, (void)extra_count;
    static sm__configured answer;
    const sm_context context = {{stream, stream_size}, {shard, shard_size}, {config, config_size},
                                upstream,              upstream_count};
    sm__self.accepts.size = sm__self.routes.size = sm__self.columns.size = 0;
    sm__self.refusal = NULL;
    sm__out.arena.size = 0;
    sm_configure(&context);
    if (sm__self.name.size == 0)
        sm_refuse("missing plugin name: sm_configure must call sm_plugin");
    answer = (sm__configured){0};
    if (sm__self.refusal != NULL) {
        answer.is_error = 1;
        answer.error = sm_text(sm__self.refusal);
        return &answer;
    }
    sm_route_info *routes = (sm_route_info *)sm__self.routes.data;
    const sm_column_info *columns = (const sm_column_info *)sm__self.columns.data;
    const uint32_t route_count = sm__self.routes.size / sizeof *routes;
    for (uint32_t i = 0; i < route_count; i++) { /* now that the columns no longer move */
        routes[i].columns = columns;
        columns += routes[i].column_count;
    }
    answer.descriptor.name = sm__self.name;
    answer.descriptor.version = sm__self.version;
    answer.descriptor.accepts =
        (sm_bytes){sm__self.accepts.data, sm__self.accepts.size / sizeof(sm_bytes)};
    answer.descriptor.routes = (sm_bytes){sm__self.routes.data, route_count};
    if (sm__out.arena.size > 0) {
        static sm_bytes needs[2]; /* a name and a value */
        sm_put_text("]");
        needs[0] = sm_text("needs-columns");
        needs[1] = sm__bytes(&sm__out.arena);
        answer.descriptor.extra = (sm_bytes){(const uint8_t *)needs, 1};
    }
    return &answer;
}

__attribute__((export_name("cabi_post_shardmill:plugin/stage@0.1.0#configure"), used)) void
sm__configure_done(void *answer) {
    (void)answer;
    sm__free_call();
}

static inline sm_input sm__input(const uint8_t *arena, const uint32_t *words, uint32_t index) {
    return (sm_input){
        .key = {arena + words[0], words[1]},
        .payload = {arena + words[2], words[3]},
        .sequence = {arena + words[4], words[5]},
        .sub_sequence = words[6],
        .route = words[7],
        .arrived_ms = (uint64_t)words[9] << 32 | words[8],
        .index = index,
    };
}

__attribute__((export_name("shardmill:plugin/stage@0.1.0#process"), used)) sm__processed *
sm__process(const uint8_t *arena, uint32_t arena_size, const uint32_t *words,
            uint32_t word_count) {
    (void)arena_size;
    static sm__processed answer;
    const uint32_t count = word_count / SM__INPUT_WORDS;
    sm__out.arena.size = sm__out.outputs.size = sm__out.rejects.size = 0;
    sm__out.record = NULL;
    sm__out.failure = NULL;
#ifdef SM_BATCH
    sm_input *records = sm_alloc(count * sizeof *records);
    for (uint32_t i = 0; i < count; i++)
        records[i] = sm__input(arena, words + i * SM__INPUT_WORDS, i);
    sm_batch(records, count);
#else
    for (uint32_t i = 0; i < count && sm__out.failure == NULL; i++) {
        const sm_input record = sm__input(arena, words + i * SM__INPUT_WORDS, i);
        sm__at(&record);
        sm_record(&record);
    }
#endif
    answer = (sm__processed){0};
    if (sm__out.failure != NULL) {
        answer.is_error = 1;
        answer.failure.retryable = sm__out.is_retryable;
        answer.failure.has_input = sm__out.failed_at_record;
        answer.failure.input = sm__out.failed_record;
        answer.failure.message = sm_text(sm__out.failure);
    } else {
        answer.outcome.arena = sm__bytes(&sm__out.arena);
        answer.outcome.outputs = (sm_bytes){sm__out.outputs.data, sm__out.outputs.size / 4};
        answer.outcome.rejects = (sm_bytes){sm__out.rejects.data, sm__out.rejects.size / 4};
    }
    return &answer;
}

__attribute__((export_name("cabi_post_shardmill:plugin/stage@0.1.0#process"), used)) void
sm__process_done(void *answer) {
    (void)answer;
    sm__free_call();
}

/* ---- Internal: JSON ----------------------------------------------------------------------- */

/* Returns the end of the JSON value that begins at `at`. The host passes only valid JSON. */
static inline const uint8_t *sm__json_end(const uint8_t *at, const uint8_t *end) {
    uint32_t depth = 0;
    while (at < end) {
        const uint8_t byte = *at;
        if (byte == '"') {
            for (at++; at < end && *at != '"'; at++)
                at += *at == '\\';
            at++;
        } else if (byte == '{' || byte == '[') {
            depth++, at++;
            continue;
        } else if (byte == '}' || byte == ']') {
            if (depth == 0)
                return at;
            depth--, at++;
        } else if (strchr(" \t\r\n,:", byte) != NULL) {
            at++;
            continue;
        } else {
            while (at < end && strchr(" \t\r\n,:}]", *at) == NULL)
                at++;
        }
        if (depth == 0)
            return at < end ? at : end;
    }
    return end;
}

static inline const uint8_t *sm__json_start(const uint8_t *at, const uint8_t *end) {
    while (at < end && strchr(" \t\r\n,:", *at) != NULL)
        at++;
    return at;
}

static inline bool sm_json_member(sm_bytes object, const char *name, sm_bytes *value) {
    const uint8_t *end = object.data + object.size;
    const uint8_t *at = sm__json_start(object.data, end);
    if (at == end || *at != '{')
        return false;
    for (at = sm__json_start(at + 1, end); at < end && *at == '"'; at = sm__json_start(at, end)) {
        const uint8_t *key_end = sm__json_end(at, end);
        sm_bytes key;
        const bool is_text = sm_json_string((sm_bytes){at, (uint32_t)(key_end - at)}, &key);
        at = sm__json_start(key_end, end);
        const uint8_t *value_end = sm__json_end(at, end);
        if (is_text && sm_equal(key, sm_text(name))) {
            *value = (sm_bytes){at, (uint32_t)(value_end - at)};
            return true;
        }
        at = value_end;
    }
    return false;
}

/* Reads four hexadecimal digits. */
static inline uint32_t sm__json_hex(const uint8_t *digits) {
    uint32_t number = 0;
    for (int i = 0; i < 4; i++) {
        const uint8_t c = digits[i];
        number = number << 4 | (uint32_t)(c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10);
    }
    return number;
}

static inline uint8_t *sm__utf8(uint8_t *out, uint32_t code) {
    if (code < 0x80) {
        *out++ = (uint8_t)code;
    } else if (code < 0x800) {
        *out++ = (uint8_t)(0xc0 | code >> 6);
        *out++ = (uint8_t)(0x80 | (code & 63));
    } else if (code < 0x10000) {
        *out++ = (uint8_t)(0xe0 | code >> 12);
        *out++ = (uint8_t)(0x80 | (code >> 6 & 63));
        *out++ = (uint8_t)(0x80 | (code & 63));
    } else {
        *out++ = (uint8_t)(0xf0 | code >> 18);
        *out++ = (uint8_t)(0x80 | (code >> 12 & 63));
        *out++ = (uint8_t)(0x80 | (code >> 6 & 63));
        *out++ = (uint8_t)(0x80 | (code & 63));
    }
    return out;
}

static inline bool sm_json_string(sm_bytes value, sm_bytes *text) {
    if (value.size < 2 || value.data[0] != '"' || value.data[value.size - 1] != '"')
        return false;
    static const char escapes[] = "b\bf\fn\nr\rt\t";
    uint8_t *start = sm_alloc(value.size), *out = start;
    const uint8_t *at = value.data + 1, *end = value.data + value.size - 1;
    while (at < end) {
        if (*at != '\\' || end - at < 2) {
            *out++ = *at++;
            continue;
        }
        const uint8_t escaped = at[1];
        at += 2;
        if (escaped == 'u' && end - at >= 4) {
            uint32_t code = sm__json_hex(at);
            at += 4;
            if (code >> 10 == 0x36 && end - at >= 6 && at[0] == '\\' && at[1] == 'u') {
                code = 0x10000 + ((code & 0x3ff) << 10) + (sm__json_hex(at + 2) & 0x3ff);
                at += 6;
            }
            out = sm__utf8(out, code);
        } else {
            const char *found = memchr(escapes, escaped, sizeof escapes - 1);
            *out++ = found != NULL ? (uint8_t)found[1] : escaped;
        }
    }
    *text = (sm_bytes){start, (uint32_t)(out - start)};
    return true;
}

/* ---- Capabilities ------------------------------------------------------------------------- */

/* Functions of the host that a plugin may call if its stage grants them (`[stage.grant]`). A component
 * imports only the functions that it uses. The results of `lookup`, `clock`, `random` and `http` may
 * differ in a replay. */

#define SM__IMPORT(interface, name)                                                                \
    __attribute__((import_module("shardmill:plugin/" interface "@0.1.0"), import_name(name))) extern

/* Failure of a call to the host. Pass it to `sm_fail`. */
typedef struct {
    bool retryable;
    sm_bytes message;
} sm_failure;

/* Retries the batch if the failure is retryable. Otherwise rejects the current record, or fails the
 * whole batch if no record is selected yet. */
static inline void sm_fail(const sm_failure *failure) {
    const char *message = sm_c_text(failure->message);
    if (failure->retryable || sm__out.record == NULL)
        sm__fail(message, failure->retryable);
    else
        sm_reject(message);
}

/* log: writes a line to the host's log. */
typedef enum { SM_TRACE, SM_DEBUG, SM_INFO, SM_WARN, SM_ERROR } sm_level;

SM__IMPORT("log", "write") void sm__log_write(uint32_t level, const char *line, uint32_t size);

static inline void sm_log(sm_level level, const char *line) {
    sm__log_write(level, line, (uint32_t)strlen(line));
}

/* metrics: time series that the plugin defines. Register them in `sm_configure`; a failure refuses
 * the configuration. Pass the returned number to `sm_observe`. */
typedef struct {
    uint32_t is_error;
    union {
        uint32_t metric;
        sm_bytes message;
    };
} sm__registered;

SM__IMPORT("metrics", "register")
void sm__metrics_register(uint32_t kind, const char *name, uint32_t name_size, const char *help,
                          uint32_t help_size, sm__registered *answer);
SM__IMPORT("metrics", "observe") void sm__metrics_observe(uint32_t metric, double value);

static inline uint32_t sm__register(uint32_t kind, const char *name, const char *help) {
    sm__registered answer = {0};
    sm__metrics_register(kind, name, (uint32_t)strlen(name), help, (uint32_t)strlen(help),
                         &answer);
    if (!(uint8_t)answer.is_error)
        return answer.metric;
    sm_refuse(sm_c_text(answer.message));
    return 0;
}

static inline uint32_t sm_counter(const char *name, const char *help) {
    return sm__register(0, name, help);
}
static inline uint32_t sm_gauge(const char *name, const char *help) {
    return sm__register(1, name, help);
}
static inline uint32_t sm_histogram(const char *name, const char *help) {
    return sm__register(2, name, help);
}
/* Adds to a counter, sets a gauge, or adds a value to a histogram. */
static inline void sm_observe(uint32_t metric, double value) {
    sm__metrics_observe(metric, value);
}

/* lookup: rows of a reference table for many keys at once; see SM_BATCH. */
typedef struct {
    uint32_t is_error;
    union {
        struct {
            const uint8_t *arena;
            uint32_t arena_size;
            const uint32_t *rows;
            uint32_t row_words;
        } found;
        struct {
            uint32_t retryable;
            sm_bytes message;
        } failure;
    };
} sm__looked_up;
_Static_assert(sizeof(sm__looked_up) == 20, "the canonical ABI's layout");

SM__IMPORT("lookup", "get")
void sm__lookup_get(const char *table, uint32_t table_size, const uint8_t *arena,
                    uint32_t arena_size, const uint32_t *keys, uint32_t key_words,
                    sm__looked_up *answer);

/* Fills `rows`, one per key: a JSON object, or `data == NULL` for a key without a row. Returns false
 * and sets `failure` if the lookup failed. */
static inline bool sm_lookup(const char *table, const sm_bytes *keys, uint32_t count,
                             sm_bytes *rows, sm_failure *failure) {
    uint32_t size = 0;
    for (uint32_t i = 0; i < count; i++)
        size += keys[i].size;
    uint8_t *arena = sm_alloc(size);
    uint32_t *spans = sm_alloc(count * 8), at = 0;
    for (uint32_t i = 0; i < count; i++) {
        memcpy(arena + at, keys[i].data, keys[i].size);
        spans[2 * i] = at;
        spans[2 * i + 1] = keys[i].size;
        at += keys[i].size;
    }
    sm__looked_up answer = {0};
    sm__lookup_get(table, (uint32_t)strlen(table), arena, size, spans, 2 * count, &answer);
    if ((uint8_t)answer.is_error) {
        *failure = (sm_failure){(uint8_t)answer.failure.retryable, answer.failure.message};
        return false;
    }
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t start = answer.found.rows[2 * i];
        rows[i] = start == SM__NONE
                      ? (sm_bytes){NULL, 0}
                      : (sm_bytes){answer.found.arena + start, answer.found.rows[2 * i + 1]};
    }
    return true;
}

/* clock and random. Prefer `arrived_ms` and the sequence number: they are the same in a replay. */
SM__IMPORT("clock", "now-ms") uint64_t sm__clock_now_ms(void);
SM__IMPORT("random", "next-u64") uint64_t sm__random_next_u64(void);

/* Returns the time of day, in milliseconds since the Unix epoch. */
static inline uint64_t sm_now_ms(void) { return sm__clock_now_ms(); }
/* Returns 64 random bits. */
static inline uint64_t sm_random(void) { return sm__random_next_u64(); }

/* http: requests to granted hosts. */
typedef struct {
    sm_bytes name, value;
} sm_header;

typedef struct {
    sm_bytes method, url;
    const sm_header *headers;
    uint32_t header_count;
    sm_bytes body;
} sm_http_request;

typedef struct {
    uint32_t status;
    const sm_header *headers; /* names in lower case */
    uint32_t header_count;
    sm_bytes body;
} sm_http_response;

typedef struct {
    uint32_t is_error;
    union {
        sm_http_response response;
        struct {
            uint32_t retryable;
            sm_bytes message;
        } failure;
    };
} sm__answered;
_Static_assert(sizeof(sm__answered) == 24, "the canonical ABI's layout");

SM__IMPORT("http", "send")
void sm__http_send(const uint8_t *method, uint32_t method_size, const uint8_t *url,
                   uint32_t url_size, const sm_header *headers, uint32_t header_count,
                   const uint8_t *body, uint32_t body_size, sm__answered *answer);

/* Sends a request and waits for the response, whatever its status. Returns false and sets `failure` if
 * there was no response. */
static inline bool sm_http(const sm_http_request *request, sm_http_response *response,
                           sm_failure *failure) {
    sm__answered answer = {0};
    sm__http_send(request->method.data, request->method.size, request->url.data,
                  request->url.size, request->headers, request->header_count, request->body.data,
                  request->body.size, &answer);
    if ((uint8_t)answer.is_error) {
        *failure = (sm_failure){(uint8_t)answer.failure.retryable, answer.failure.message};
        return false;
    }
    *response = answer.response;
    response->status &= 0xffff;
    return true;
}

#endif
