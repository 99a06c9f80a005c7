/* Exported: submit, cancel, free. Nothing here needs the interpreter, or waits for the engine. */

#include "internal.h"

typedef struct part { /* one of the texts that a command carries */
    const char *data;
    size_t size;
} part;

static const char *copy_part(char **to, part from)
{
    char *copy = *to;
    if (from.size)
        memcpy(copy, from.data, from.size);
    *to += from.size;
    return copy;
}

/* A command and copies of its parts, in one block. */
static mpx_command *make_command(int32_t kind, part data, part sampling, part extra, part salt)
{
    mpx_command *command = calloc(1, sizeof *command + data.size + sampling.size + extra.size + salt.size);
    char *to = (char *)(command + 1);
    if (!command)
        return NULL;
    command->kind = kind;
    command->data = copy_part(&to, data); /* first, so that tokens are aligned */
    command->size = data.size;
    command->sampling = copy_part(&to, sampling);
    command->sampling_size = sampling.size;
    command->extra = copy_part(&to, extra);
    command->extra_size = extra.size;
    command->salt = copy_part(&to, salt);
    command->salt_size = salt.size;
    return command;
}

static int32_t optional_text(const char *what, const char *text, part *checked)
{
    checked->data = text ? text : "";
    checked->size = text ? MINIPAGED_ZSTRING : 0;
    return mpx_check_text(what, checked->data, &checked->size);
}

static int32_t enqueue(minipaged_request *id, minipaged_engine *handle, mpx_command *command,
                       const minipaged_request_options *options)
{
    mpx_engine *engine;
    mpx_request *request;
    int32_t status = mpx_engine_get(&engine, handle);
    if (status)
        return status;
    request = mpx_request_new();
    if (!request) {
        mpx_engine_put(engine);
        return mpx_fail(MINIPAGED_ERROR_MEMORY, "out of memory.");
    }
    request->callback = options->callback;
    request->user_data = options->user_data;
    request->auto_free = options->auto_free;
    request->free_user_data = options->free_user_data;
    request->info.submitted_ns = mpx_now_ns();
    command->priority = options->priority;
    command->stream = options->stream || options->callback;
    command->has_salt = options->cache_salt != NULL;
    pthread_mutex_lock(&engine->lock);
    if (mpx_request_insert(engine, request)) {
        *id = command->request = request->id; /* before the command is seen: a callback may come at once */
        mpx_command_add(engine, command);
    } else {
        status = mpx_fail(MINIPAGED_ERROR_ENGINE, "this engine is being destroyed.");
        request->free_user_data = NULL; /* the caller's still */
        mpx_request_destroy(request);
    }
    pthread_mutex_unlock(&engine->lock);
    mpx_engine_put(engine);
    return status;
}

static int32_t submit(minipaged_request *id, minipaged_engine *handle, int32_t kind, part data,
                      const minipaged_sampling *given_sampling, const minipaged_request_options *given_options)
{
    minipaged_sampling sampling = MINIPAGED_SAMPLING_INIT;
    minipaged_request_options options = MINIPAGED_REQUEST_OPTIONS_INIT;
    part extra, salt, fields;
    mpx_command *command;
    char *json;
    int32_t status;

    if ((status = mpx_read_sampling(&sampling, given_sampling)) ||
        (status = mpx_read_request_options(&options, given_options)) ||
        (status = optional_text("minipaged_sampling.json", sampling.json, &extra)) ||
        (status = optional_text("cache_salt", options.cache_salt, &salt)))
        return status;
    if (options.auto_free && !options.callback)
        return mpx_fail(MINIPAGED_ERROR_ARGUMENT, "auto_free is set, but there is no callback after which to free.");
    if ((status = mpx_sampling_json(&sampling, &json, &fields.size)))
        return status;
    fields.data = json;
    command = make_command(kind, data, fields, extra, salt);
    free(json);
    if (!command)
        return mpx_fail(MINIPAGED_ERROR_MEMORY, "out of memory.");
    status = enqueue(id, handle, command, &options);
    if (status)
        mpx_free_command(command);
    return status;
}

static int32_t begin(minipaged_request *id)
{
    if (!id)
        return mpx_fail(MINIPAGED_ERROR_ARGUMENT, "request is NULL; it must point to where the number is put.");
    *id = 0;
    return mpx_forked() ? mpx_fail_forked() : MINIPAGED_OK;
}

MPX_EXPORT int32_t minipaged_submit_text(minipaged_request *request, minipaged_engine *engine, const char *text,
                                         size_t text_length, const minipaged_sampling *sampling,
                                         const minipaged_request_options *options)
{
    int32_t status = begin(request);
    if (!status)
        status = mpx_check_text("the prompt", text, &text_length);
    return status ? status : submit(request, engine, 1, (part){text, text_length}, sampling, options);
}

MPX_EXPORT int32_t minipaged_submit_tokens(minipaged_request *request, minipaged_engine *engine,
                                           const int32_t *token_ids, size_t num_tokens,
                                           const minipaged_sampling *sampling,
                                           const minipaged_request_options *options)
{
    int32_t status = begin(request);
    if (status)
        return status;
    if (!token_ids && num_tokens)
        return mpx_fail(MINIPAGED_ERROR_ARGUMENT, "token_ids is NULL, but num_tokens is %zu.", num_tokens);
    if (num_tokens > INT32_MAX)
        return mpx_fail(MINIPAGED_ERROR_ARGUMENT, "num_tokens is %zu; it must be at most %d.", num_tokens, INT32_MAX);
    return submit(request, engine, 2, (part){(const char *)token_ids, num_tokens * sizeof *token_ids}, sampling,
                  options);
}

MPX_EXPORT int32_t minipaged_submit_chat(minipaged_request *request, minipaged_engine *engine, const char *json,
                                         size_t json_length, const minipaged_sampling *sampling,
                                         const minipaged_request_options *options)
{
    int32_t status = begin(request);
    if (!status)
        status = mpx_check_text("the conversation", json, &json_length);
    return status ? status : submit(request, engine, 3, (part){json, json_length}, sampling, options);
}

/* ---- cancel and free ---- */

static int32_t on_request(minipaged_engine *handle, minipaged_request id,
                          int32_t (*function)(mpx_engine *, mpx_request *))
{
    mpx_engine *engine;
    mpx_request *request;
    int32_t status = mpx_engine_get(&engine, handle);
    if (status)
        return status;
    pthread_mutex_lock(&engine->lock);
    request = mpx_request_get(engine, id);
    status = request ? function(engine, request) : MINIPAGED_ERROR_NOT_FOUND;
    pthread_mutex_unlock(&engine->lock);
    mpx_engine_put(engine);
    return status;
}

MPX_EXPORT int32_t minipaged_cancel(minipaged_engine *engine, minipaged_request request)
{
    return on_request(engine, request, mpx_request_cancel);
}

MPX_EXPORT int32_t minipaged_request_free(minipaged_engine *engine, minipaged_request request)
{
    return on_request(engine, request, mpx_request_release);
}
