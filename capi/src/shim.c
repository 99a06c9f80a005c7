/* Exported: what goes through Python. Each call presets a failing reply, calls a hidden Python function that
 * writes into it, and returns what is there then. */

#include "internal.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

#define NO_ANSWER (-1000) /* what a reply holds until Python writes to it */

/* Make a call that takes &reply. */
#define PYTHON(call)                                                                                           \
    do {                                                                                                       \
        int uncancelled; /* a thread that ends inside Python would keep its lock */                            \
        pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &uncancelled);                                          \
        reply = (mpx_reply){NO_ANSWER, 0, NULL, 0};                                                            \
        mpx_call_begins();                                                                                     \
        call;                                                                                                  \
        mpx_call_ends();                                                                                       \
        if (reply.status == NO_ANSWER)                                                                         \
            reply.status = mpx_fail(MINIPAGED_ERROR_INTERNAL,                                                  \
                                    "the Python side gave no answer; a traceback may be on stderr.");          \
        pthread_setcancelstate(uncancelled, NULL);                                                             \
    } while (0)

void mpx_reply_error(mpx_reply *reply, int32_t status, const char *text, size_t size)
{
    reply->status = mpx_fail_text(status, text, size); /* on the caller's own thread */
}

void mpx_reply_data(mpx_reply *reply, const char *data, size_t size)
{
    reply->data = malloc(size + 1);
    if (!reply->data) {
        reply->status = mpx_fail(MINIPAGED_ERROR_MEMORY, "out of memory.");
        return;
    }
    if (size)
        memcpy(reply->data, data, size);
    reply->size = size;
    reply->status = MINIPAGED_OK;
}

/* Give the data of a reply out as text or tokens. */
static int32_t answer(mpx_reply *reply, size_t unit, void *buffer, size_t capacity, size_t *length)
{
    if (!reply->status)
        reply->status =
            mpx_copy_out(reply->data, reply->size / unit, unit, unit == 1, buffer, capacity, length);
    free(reply->data);
    return reply->status;
}

/* ---- create ---- */

static void end_all(mpx_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    for (size_t i = 0; i < engine->num_buckets; i++)
        for (mpx_request *request = engine->buckets[i], *next; request; request = next) {
            next = request->hash_next;
            mpx_request_end(engine, request, MINIPAGED_OK, "", 0);
        }
    mpx_unlock(engine);
}

/* malloc keeps what is freed. An engine is large, and its pieces lie in the heaps of several threads. */
static void give_memory_back(void)
{
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

static int32_t close_engine(mpx_engine *engine)
{
    mpx_reply reply;
    int before;
    pthread_mutex_lock(&engine->lock);
    engine->closing = 1;
    pthread_cond_broadcast(&engine->commands_changed);
    pthread_cond_broadcast(&engine->ready_changed);
    pthread_mutex_unlock(&engine->lock);
    PYTHON(mpy_close(engine, &reply)); /* its requests end, and what may still write to them ends */
    end_all(engine); /* those that Python had not seen */
    if (mpx_in_callback())
        return reply.status; /* exit() inside a callback: what is behind it on this thread never goes on */
    if (engine->has_dispatcher) {
        pthread_mutex_lock(&engine->lock);
        engine->dispatcher_ends = 1;
        pthread_cond_signal(&engine->calls_changed);
        pthread_mutex_unlock(&engine->lock);
        pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before); /* to be cancelled while joining is to join never */
        pthread_join(engine->dispatcher, NULL);
        pthread_setcancelstate(before, NULL);
    } else {
        mpx_dispatch(engine);
    }
    give_memory_back();
    return reply.status;
}

/* At exit: end the engines that the program left, while what their threads use is still there. */
void mpx_close_all(void)
{
    mpx_engine *engine;
    if (mpx_forked())
        return;
    while ((engine = mpx_engine_any())) {
        if (mpx_engine_withdraw(engine))
            close_engine(engine);
        if (!mpx_in_callback())
            mpx_engine_put(engine);
    }
}

static void register_exit(void)
{
    atexit(mpx_close_all); /* after what the first engine loaded registered its own: so it runs before */
}

static int32_t create(mpx_engine **made, const char *model, const minipaged_engine_options *options,
                      const char *json)
{
    static pthread_once_t at_exit = PTHREAD_ONCE_INIT;
    mpx_engine *engine;
    mpx_reply reply;
    int32_t status = mpx_python_start();
    if (status || (status = mpx_engine_new(&engine, options->mode)))
        return status;
    PYTHON(mpy_create(engine, model, json, options->json ? options->json : "", options->mode, &reply));
    status = reply.status;
    if (!status && options->mode == MINIPAGED_MODE_THREAD && (status = mpx_dispatcher_start(engine)))
        close_engine(engine);
    if (status) {
        mpx_engine_put(engine);
        return status;
    }
    pthread_once(&at_exit, register_exit);
    mpx_engine_publish(engine);
    *made = engine;
    return MINIPAGED_OK;
}

MPX_EXPORT int32_t minipaged_engine_create(minipaged_engine **handle, const char *model,
                                           const minipaged_engine_options *given)
{
    minipaged_engine_options options = MINIPAGED_ENGINE_OPTIONS_INIT;
    mpx_engine *engine;
    size_t size = MINIPAGED_ZSTRING;
    char *json;
    int before;
    int32_t status;
    if (!handle)
        return mpx_fail(MINIPAGED_ERROR_ARGUMENT, "engine is NULL; it must point to where the handle is put.");
    *handle = NULL;
    if (mpx_forked())
        return mpx_fail_forked();
    if (mpx_in_callback())
        return mpx_fail_in_callback("minipaged_engine_create");
    if ((status = mpx_check_text("the model", model, &size)) ||
        (status = mpx_read_engine_options(&options, given)))
        return status;
    if (options.mode != MINIPAGED_MODE_THREAD && options.mode != MINIPAGED_MODE_STEP)
        return mpx_fail(MINIPAGED_ERROR_ARGUMENT,
                        "mode is %d; it must be MINIPAGED_MODE_THREAD or MINIPAGED_MODE_STEP.", options.mode);
    size = MINIPAGED_ZSTRING;
    if ((options.json && (status = mpx_check_text("minipaged_engine_options.json", options.json, &size))) ||
        (status = mpx_engine_options_json(&options, &json, &size)))
        return status;
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before);
    status = create(&engine, model, &options, json);
    pthread_setcancelstate(before, NULL);
    free(json);
    if (!status)
        *handle = mpx_engine_handle(engine);
    return status;
}

MPX_EXPORT int32_t minipaged_engine_destroy(minipaged_engine *handle)
{
    mpx_engine *engine;
    int32_t status;
    if (mpx_forked())
        return mpx_fail_forked();
    if (!handle)
        return MINIPAGED_OK;
    if (mpx_in_callback())
        return mpx_fail_in_callback("minipaged_engine_destroy");
    if ((status = mpx_engine_get(&engine, handle)))
        return status;
    pthread_mutex_lock(&engine->lock);
    if (engine->stepping)
        status = mpx_fail(MINIPAGED_ERROR_BUSY, "another thread is in minipaged_engine_step; end that loop first.");
    else if (engine->closing)
        status = mpx_fail(MINIPAGED_ERROR_ENGINE, "this engine is being destroyed by another thread.");
    else
        engine->closing = 1;
    pthread_mutex_unlock(&engine->lock);
    if (!status && mpx_engine_withdraw(engine))
        status = close_engine(engine);
    mpx_engine_put(engine);
    return status;
}

/* ---- step mode ---- */

MPX_EXPORT int32_t minipaged_engine_step(minipaged_engine *handle)
{
    mpx_engine *engine;
    mpx_reply reply;
    int32_t status;
    if (mpx_in_callback())
        return mpx_fail_in_callback("minipaged_engine_step");
    if ((status = mpx_engine_get(&engine, handle)))
        return status;
    pthread_mutex_lock(&engine->lock);
    if (engine->mode != MINIPAGED_MODE_STEP)
        status = mpx_fail(MINIPAGED_ERROR_MODE,
                          "this engine computes on a thread of its own; create it with MINIPAGED_MODE_STEP to step it.");
    else if (engine->stepping)
        status = mpx_fail(MINIPAGED_ERROR_BUSY, "another thread is in minipaged_engine_step; one at a time can step.");
    else if (engine->closing)
        status = mpx_fail(MINIPAGED_ERROR_ENGINE, "this engine is being destroyed.");
    else
        engine->stepping = 1;
    pthread_mutex_unlock(&engine->lock);
    if (!status) {
        PYTHON(mpy_step(engine, &reply));
        mpx_dispatch(engine);
        pthread_mutex_lock(&engine->lock);
        engine->stepping = 0;
        pthread_mutex_unlock(&engine->lock);
        status = reply.status ? reply.status : reply.number ? MINIPAGED_OK : MINIPAGED_DONE;
    }
    mpx_engine_put(engine);
    return status;
}

/* ---- questions ---- */

MPX_EXPORT int32_t minipaged_engine_model_info(minipaged_engine *handle, minipaged_model_info *info)
{
    mpx_engine *engine;
    mpx_reply reply;
    minipaged_model_info out = MINIPAGED_MODEL_INFO_INIT;
    int32_t status;
    if (!info)
        return mpx_fail(MINIPAGED_ERROR_ARGUMENT, "info is NULL; it must point to a minipaged_model_info.");
    if ((status = mpx_check_out("minipaged_model_info", info->struct_size, 8, sizeof out)) ||
        (status = mpx_engine_get(&engine, handle)))
        return status;
    PYTHON(mpy_model_info(engine, &out, &reply));
    if (!reply.status)
        mpx_write_out(info, &out, sizeof out);
    mpx_engine_put(engine);
    return reply.status;
}

MPX_EXPORT int32_t minipaged_engine_stats(minipaged_engine *handle, minipaged_stats *stats)
{
    mpx_engine *engine;
    mpx_reply reply;
    minipaged_stats out = MINIPAGED_STATS_INIT;
    int32_t status;
    if (!stats)
        return mpx_fail(MINIPAGED_ERROR_ARGUMENT, "stats is NULL; it must point to a minipaged_stats.");
    if ((status = mpx_check_out("minipaged_stats", stats->struct_size, 8, sizeof out)) ||
        (status = mpx_engine_get(&engine, handle)))
        return status;
    PYTHON(mpy_stats(engine, &out, &reply));
    pthread_mutex_lock(&engine->lock);
    out.num_requests_held = (int64_t)engine->num_held;
    pthread_mutex_unlock(&engine->lock);
    if (!reply.status)
        mpx_write_out(stats, &out, sizeof out);
    mpx_engine_put(engine);
    return reply.status;
}

MPX_EXPORT int32_t minipaged_engine_stats_json(minipaged_engine *handle, char *buffer, size_t capacity,
                                               size_t *length)
{
    mpx_engine *engine;
    mpx_reply reply;
    int32_t status = mpx_engine_get(&engine, handle);
    if (status)
        return status;
    PYTHON(mpy_stats_json(engine, &reply));
    mpx_engine_put(engine);
    return answer(&reply, 1, buffer, capacity, length);
}

MPX_EXPORT int32_t minipaged_tokenize(minipaged_engine *handle, const char *text, size_t text_length,
                                      int32_t add_special_tokens, int32_t *token_ids, size_t capacity,
                                      size_t *num_tokens)
{
    mpx_engine *engine;
    mpx_reply reply;
    int32_t status;
    if ((status = mpx_engine_get(&engine, handle)))
        return status;
    if (!(status = mpx_check_text("the text", text, &text_length))) {
        PYTHON(mpy_tokenize(engine, text, text_length, add_special_tokens, &reply));
        status = answer(&reply, sizeof(int32_t), token_ids, capacity, num_tokens);
    }
    mpx_engine_put(engine);
    return status;
}

MPX_EXPORT int32_t minipaged_detokenize(minipaged_engine *handle, const int32_t *token_ids, size_t num_tokens,
                                        int32_t skip_special_tokens, char *buffer, size_t capacity, size_t *length)
{
    mpx_engine *engine;
    mpx_reply reply;
    int32_t status;
    if ((status = mpx_engine_get(&engine, handle)))
        return status;
    if ((!token_ids && num_tokens) || num_tokens > INT32_MAX) {
        status = mpx_fail(MINIPAGED_ERROR_ARGUMENT, "token_ids is %s, but num_tokens is %zu.",
                          token_ids ? "a list" : "NULL", num_tokens);
    } else {
        PYTHON(mpy_detokenize(engine, token_ids, num_tokens, skip_special_tokens, &reply));
        status = answer(&reply, 1, buffer, capacity, length);
    }
    mpx_engine_put(engine);
    return status;
}

MPX_EXPORT int32_t minipaged_chat_prompt(minipaged_engine *handle, const char *json, size_t json_length, char *buffer,
                                         size_t capacity, size_t *length)
{
    mpx_engine *engine;
    mpx_reply reply;
    int32_t status;
    if ((status = mpx_engine_get(&engine, handle)))
        return status;
    if (!(status = mpx_check_text("the conversation", json, &json_length))) {
        PYTHON(mpy_chat_prompt(engine, json, json_length, &reply));
        status = answer(&reply, 1, buffer, capacity, length);
    }
    mpx_engine_put(engine);
    return status;
}
