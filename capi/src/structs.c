/* Structs that grow: reading those of older and newer callers, and the fields that are set as JSON.
 *
 * JSON is how options cross into Python: one buffer holds a copy of everything the caller's struct points
 * to, and names that this library passes on need no code on the other side. */

#include "internal.h"

#include <math.h>
#include <stdio.h>

enum kind { PLAIN, STRING, INT32, INT64, BOOL, DOUBLE, STRINGS, IDS }; /* PLAIN: not passed on as it stands */

typedef struct field {
    const char *name;
    size_t offset;
    enum kind kind;
} field;

#define FIELD(type, name, kind) { #name, offsetof(type, name), kind }
#define E(name, kind) FIELD(minipaged_engine_options, name, kind)
#define S(name, kind) FIELD(minipaged_sampling, name, kind)
#define R(name) FIELD(minipaged_request_options, name, PLAIN)
#define COUNT(array) (sizeof(array) / sizeof *(array))

static const field engine_fields[] = {
    E(struct_size, PLAIN), E(mode, PLAIN), E(device, STRING), E(dtype, STRING), E(quantization, STRING),
    E(kv_cache_dtype, STRING), E(policy, STRING), E(num_blocks, INT64), E(kv_cache_memory, INT64),
    E(max_model_len, INT64), E(swap_space, INT64), E(seed, PLAIN), E(block_size, INT32), E(max_num_seqs, INT32),
    E(max_num_batched_tokens, INT32), E(num_threads, INT32), E(enable_prefix_caching, BOOL), E(reserved, PLAIN),
    E(json, PLAIN),
};

/* Lists are followed by their length, a uint64_t. */
static const field sampling_fields[] = {
    S(struct_size, PLAIN), S(n, INT32), S(max_tokens, INT64), S(min_tokens, INT64), S(temperature, DOUBLE),
    S(top_p, DOUBLE), S(min_p, DOUBLE), S(presence_penalty, DOUBLE), S(frequency_penalty, DOUBLE),
    S(repetition_penalty, DOUBLE), S(top_k, INT32), S(has_seed, PLAIN), S(seed, PLAIN), S(ignore_eos, BOOL),
    S(include_stop_str_in_output, BOOL), S(skip_special_tokens, BOOL), S(logprobs, INT32),
    S(prompt_logprobs, INT32), S(best_of, INT32), S(beam_width, PLAIN), S(early_stopping, PLAIN),
    S(length_penalty, DOUBLE), S(stop, STRINGS), S(num_stop, PLAIN), S(bad_words, STRINGS),
    S(num_bad_words, PLAIN), S(stop_token_ids, IDS), S(num_stop_token_ids, PLAIN), S(allowed_token_ids, IDS),
    S(num_allowed_token_ids, PLAIN), S(logit_bias_ids, PLAIN), S(logit_bias, PLAIN), S(num_logit_bias, PLAIN),
    S(grammar_kind, PLAIN), S(grammar, PLAIN), S(json, PLAIN),
};

static const field request_fields[] = {R(struct_size), R(priority), R(cache_salt), R(callback),
                                       R(user_data), R(stream), R(auto_free), R(free_user_data)};

/* ---- versions ---- */

/* `copy` holds the defaults and is as long as `ours`; the part that the caller has is taken from `given`. */
static int32_t read_struct(const char *what, void *copy, const void *given, size_t ours, const field *fields,
                           size_t num_fields)
{
    uint32_t size;
    if (!given)
        return MINIPAGED_OK;
    memcpy(&size, given, sizeof size);
    if (size < ours) { /* an older caller: its struct ends where a field of ours begins */
        size_t i = 1;
        while (i < num_fields && fields[i].offset != size)
            i++;
        if (i == num_fields)
            return mpx_fail(MINIPAGED_ERROR_STRUCT,
                            "%s has a struct_size of %u; it must be %zu. Make it with its INIT macro.", what, size,
                            ours);
    }
    if (size > MPX_MAX_STRUCT)
        return mpx_fail(MINIPAGED_ERROR_STRUCT,
                        "%s has a struct_size of %u; it must be %zu. Make it with its INIT macro.", what, size, ours);
    for (size_t i = ours; i < size; i++)
        if (((const char *)given)[i])
            return mpx_fail(MINIPAGED_ERROR_STRUCT,
                            "%s is of a later version (%u bytes, this library knows %zu) and sets fields that this "
                            "library does not know; install a newer minipaged.",
                            what, size, ours);
    memcpy(copy, given, size < ours ? size : ours);
    return MINIPAGED_OK;
}

int32_t mpx_read_engine_options(minipaged_engine_options *copy, const minipaged_engine_options *given)
{
    return read_struct("minipaged_engine_options", copy, given, sizeof *copy, engine_fields, COUNT(engine_fields));
}

int32_t mpx_read_sampling(minipaged_sampling *copy, const minipaged_sampling *given)
{
    return read_struct("minipaged_sampling", copy, given, sizeof *copy, sampling_fields, COUNT(sampling_fields));
}

int32_t mpx_read_request_options(minipaged_request_options *copy, const minipaged_request_options *given)
{
    return read_struct("minipaged_request_options", copy, given, sizeof *copy, request_fields,
                       COUNT(request_fields));
}

/* A struct to be filled: an older caller's has at least `first` bytes, a newer one's keeps its tail. */
int32_t mpx_check_out(const char *what, uint32_t given, size_t first, size_t ours)
{
    if (given < first || given > MPX_MAX_STRUCT || given % 4)
        return mpx_fail(MINIPAGED_ERROR_STRUCT,
                        "%s has a struct_size of %u; it must be %zu. Make it with its INIT macro.", what, given, ours);
    return MINIPAGED_OK;
}

void mpx_write_out(void *given, const void *ours, size_t size)
{
    uint32_t theirs;
    memcpy(&theirs, given, sizeof theirs);
    memcpy((char *)given + sizeof theirs, (const char *)ours + sizeof theirs,
           (theirs < size ? theirs : size) - sizeof theirs);
}

/* ---- JSON ---- */

typedef struct writer {
    char *data;
    size_t size, capacity;
    int failed; /* out of memory */
} writer;

static void put(writer *out, const char *text, size_t size)
{
    if (out->failed)
        return;
    if (out->size + size + 1 > out->capacity) {
        size_t capacity = (out->size + size + 1) * 2;
        char *data = realloc(out->data, capacity);
        if (!data) {
            out->failed = 1;
            return;
        }
        out->data = data;
        out->capacity = capacity;
    }
    memcpy(out->data + out->size, text, size);
    out->size += size;
    out->data[out->size] = 0;
}

static void put_zero(writer *out, const char *text)
{
    put(out, text, strlen(text));
}

static void put_name(writer *out, const char *name)
{
    put_zero(out, out->size == 1 ? "\"" : ", \"");
    put_zero(out, name);
    put_zero(out, "\": ");
}

static void put_string(writer *out, const char *text)
{
    put(out, "\"", 1);
    for (const char *p = text; *p; p++) {
        char escaped[16];
        if (*p == '"' || *p == '\\' || (unsigned char)*p < 0x20) {
            snprintf(escaped, sizeof escaped, "\\u%04x", (unsigned char)*p);
            put_zero(out, escaped);
        } else
            put(out, p, 1);
    }
    put(out, "\"", 1);
}

static void put_int(writer *out, int64_t value)
{
    char text[32];
    snprintf(text, sizeof text, "%lld", (long long)value);
    put_zero(out, text);
}

static void put_double(writer *out, double value)
{
    char text[64], *to = text;
    if (!isfinite(value)) { /* Python reads these, and SamplingParams refuses them by name */
        put_zero(out, isnan(value) ? "NaN" : value > 0 ? "Infinity" : "-Infinity");
        return;
    }
    snprintf(text, sizeof text, "%.17g", value);
    for (const char *from = text; *from; from++) /* the locale's decimal point may be anything */
        if (strchr("0123456789+-e", *from))
            *to++ = *from;
        else if (to == text || to[-1] != '.')
            *to++ = '.';
    put(out, text, (size_t)(to - text));
}

static int32_t check_string(const char *name, const char *text)
{
    size_t size = MINIPAGED_ZSTRING;
    return mpx_check_text(name, text, &size);
}

static int32_t put_list(writer *out, const field *f, const char *base)
{
    const void *list;
    uint64_t count;
    memcpy(&list, base + f->offset, sizeof list);
    memcpy(&count, base + f->offset + sizeof list, sizeof count);
    if (!list && !count)
        return MINIPAGED_OK;
    if (!list || count > INT32_MAX)
        return mpx_fail(MINIPAGED_ERROR_ARGUMENT, "%s is %s, but its length is given as %llu.", f->name,
                        list ? "a list" : "NULL", (unsigned long long)count);
    put_name(out, f->name);
    put_zero(out, "[");
    for (uint64_t i = 0; i < count; i++) {
        if (i)
            put_zero(out, ", ");
        if (f->kind == IDS) {
            put_int(out, ((const int32_t *)list)[i]);
        } else {
            int32_t status = check_string(f->name, ((const char *const *)list)[i]);
            if (status)
                return status;
            put_string(out, ((const char *const *)list)[i]);
        }
    }
    put_zero(out, "]");
    return MINIPAGED_OK;
}

static int32_t put_field(writer *out, const field *f, const char *base)
{
    const char *text;
    int32_t small;
    int64_t large;
    double real;
    switch (f->kind) {
    case PLAIN:
        break;
    case STRING:
        memcpy(&text, base + f->offset, sizeof text);
        if (!text)
            break;
        if ((small = check_string(f->name, text)))
            return small;
        put_name(out, f->name);
        put_string(out, text);
        break;
    case INT32:
    case BOOL:
        memcpy(&small, base + f->offset, sizeof small);
        if (small == MINIPAGED_UNSET)
            break;
        if (f->kind == BOOL && small != 0 && small != 1)
            return mpx_fail(MINIPAGED_ERROR_ARGUMENT, "%s is %d; it must be 0, 1 or MINIPAGED_UNSET.", f->name, small);
        put_name(out, f->name);
        if (f->kind == BOOL)
            put_zero(out, small ? "true" : "false");
        else
            put_int(out, small);
        break;
    case INT64:
        memcpy(&large, base + f->offset, sizeof large);
        if (large == MINIPAGED_UNSET)
            break;
        put_name(out, f->name);
        put_int(out, large);
        break;
    case DOUBLE:
        memcpy(&real, base + f->offset, sizeof real);
        if (real == MINIPAGED_UNSET)
            break;
        put_name(out, f->name);
        put_double(out, real);
        break;
    case STRINGS:
    case IDS:
        return put_list(out, f, base);
    }
    return MINIPAGED_OK;
}

static int32_t put_fields(writer *out, const field *fields, size_t count, const void *base)
{
    put_zero(out, "{");
    for (size_t i = 0; i < count; i++) {
        int32_t status = put_field(out, &fields[i], base);
        if (status)
            return status;
    }
    return MINIPAGED_OK;
}

static void put_seed(writer *out, uint64_t seed)
{
    char text[32];
    snprintf(text, sizeof text, "%llu", (unsigned long long)seed);
    put_name(out, "seed");
    put_zero(out, text);
}

/* The fields of minipaged_sampling whose form is another than in Python. */
static int32_t put_sampling_rest(writer *out, const minipaged_sampling *s)
{
    int32_t status;
    if (s->has_seed)
        put_seed(out, s->seed);
    if (s->beam_width != MINIPAGED_UNSET && s->beam_width != 0 && s->beam_width != 1) {
        put_name(out, "use_beam_search");
        put_zero(out, "true");
        put_name(out, "beam_width");
        put_int(out, s->beam_width);
    }
    if (s->early_stopping != MINIPAGED_UNSET) {
        if (s->early_stopping < 0 || s->early_stopping > 2)
            return mpx_fail(MINIPAGED_ERROR_ARGUMENT,
                            "early_stopping is %d; it must be 0, 1, 2 (never) or MINIPAGED_UNSET.",
                            s->early_stopping);
        put_name(out, "early_stopping");
        put_zero(out, s->early_stopping == 2 ? "\"never\"" : s->early_stopping ? "true" : "false");
    }
    if (s->num_logit_bias) {
        if (!s->logit_bias_ids || !s->logit_bias || s->num_logit_bias > INT32_MAX)
            return mpx_fail(MINIPAGED_ERROR_ARGUMENT, "num_logit_bias is %llu, but %s.",
                            (unsigned long long)s->num_logit_bias,
                            s->logit_bias_ids && s->logit_bias ? "that is too many" : "a list is NULL");
        put_name(out, "logit_bias");
        put_zero(out, "{");
        for (uint64_t i = 0; i < s->num_logit_bias; i++) {
            put_zero(out, i ? ", \"" : "\"");
            put_int(out, s->logit_bias_ids[i]);
            put_zero(out, "\": ");
            put_double(out, s->logit_bias[i]);
        }
        put_zero(out, "}");
    }
    if (s->grammar && !s->grammar_kind)
        return mpx_fail(MINIPAGED_ERROR_ARGUMENT, "a grammar is given, but grammar_kind is NULL.");
    if (s->grammar_kind) { /* bindings/ makes structured_outputs of these two */
        if ((status = check_string("grammar_kind", s->grammar_kind)))
            return status;
        if (s->grammar && (status = check_string("grammar", s->grammar)))
            return status;
        put_name(out, "grammar_kind");
        put_string(out, s->grammar_kind);
        put_name(out, "grammar");
        put_string(out, s->grammar ? s->grammar : "");
    }
    return MINIPAGED_OK;
}

static int32_t finish(writer *out, int32_t status, char **json, size_t *size)
{
    put_zero(out, "}");
    if (out->failed && !status)
        status = mpx_fail(MINIPAGED_ERROR_MEMORY, "out of memory.");
    if (status) {
        free(out->data);
        return status;
    }
    *json = out->data;
    *size = out->size;
    return MINIPAGED_OK;
}

int32_t mpx_engine_options_json(const minipaged_engine_options *options, char **json, size_t *size)
{
    writer out = {0};
    int32_t status = put_fields(&out, engine_fields, COUNT(engine_fields), options);
    if (!status && options->seed)
        put_seed(&out, options->seed);
    return finish(&out, status, json, size);
}

int32_t mpx_sampling_json(const minipaged_sampling *sampling, char **json, size_t *size)
{
    writer out = {0};
    int32_t status = put_fields(&out, sampling_fields, COUNT(sampling_fields), sampling);
    if (!status)
        status = put_sampling_rest(&out, sampling);
    return finish(&out, status, json, size);
}
