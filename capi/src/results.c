/* Exported: wait, poll, read, and take results. Nothing here needs the interpreter. */

#include "internal.h"

/* ---- waiting ---- */

/* Find a request with the engine locked; both are given back by leave(). */
static int32_t enter(mpx_engine **engine, minipaged_engine *handle, mpx_request **request, minipaged_request id)
{
    int32_t status = mpx_engine_get(engine, handle);
    if (status)
        return status;
    pthread_mutex_lock(&(*engine)->lock);
    *request = mpx_request_get(*engine, id);
    if (*request)
        return MINIPAGED_OK;
    pthread_mutex_unlock(&(*engine)->lock);
    mpx_engine_put(*engine);
    return MINIPAGED_ERROR_NOT_FOUND;
}

static int32_t leave(mpx_engine *engine, int32_t status)
{
    pthread_mutex_unlock(&engine->lock);
    mpx_engine_put(engine);
    return status;
}

/* Wait on a condition; 0 when the time is over. */
static int wait_on(pthread_cond_t *cond, pthread_mutex_t *lock, int64_t timeout_ms, const struct timespec *deadline)
{
    int before, in_time = 1;
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before); /* a thread that ends here would keep the lock */
    if (timeout_ms < 0)
        pthread_cond_wait(cond, lock);
    else
        in_time = pthread_cond_timedwait(cond, lock, deadline) == 0;
    pthread_setcancelstate(before, NULL);
    return in_time;
}

static int32_t ending(const mpx_request *request)
{
    if (!request->status)
        return MINIPAGED_OK;
    return mpx_fail_text(request->status, request->error ? request->error : "out of memory.",
                         request->error ? request->error_size : 14);
}

static int settled(const mpx_request *request)
{
    return request->ended && (!request->callback || request->final_done);
}

/* Let the engine's lock go until `request` may have changed. MINIPAGED_OK: look again. After anything else the
 * record may be gone; MINIPAGED_DONE: it ended well and freed itself. */
static int32_t await(mpx_engine *engine, mpx_request *request, int64_t timeout_ms, const struct timespec *deadline)
{
    int in_time;
    if (timeout_ms == 0)
        return MINIPAGED_TIMEOUT;
    request->waiters++;
    in_time = wait_on(&request->changed, &engine->lock, timeout_ms, deadline);
    request->waiters--;
    if (request->freed) { /* by another thread; or by itself, after its last callback */
        int32_t status = settled(request) ? ending(request) : MINIPAGED_ERROR_NOT_FOUND;
        if (!settled(request))
            mpx_fail(status, "the request was freed by another thread meanwhile.");
        mpx_request_collect(engine, request);
        return status ? status : MINIPAGED_DONE;
    }
    return in_time ? MINIPAGED_OK : MINIPAGED_TIMEOUT;
}

MPX_EXPORT int32_t minipaged_wait(minipaged_engine *handle, minipaged_request id, int64_t timeout_ms)
{
    mpx_engine *engine;
    mpx_request *request;
    struct timespec deadline = mpx_deadline(timeout_ms > 0 ? timeout_ms : 0);
    int32_t status;
    if (timeout_ms && mpx_in_callback())
        return mpx_fail_in_callback("minipaged_wait");
    if ((status = enter(&engine, handle, &request, id)))
        return status;
    while (!settled(request))
        if ((status = await(engine, request, timeout_ms, &deadline)))
            return leave(engine, status == MINIPAGED_DONE ? MINIPAGED_OK : status);
    return leave(engine, ending(request));
}

MPX_EXPORT int32_t minipaged_next(minipaged_request *id, minipaged_engine *handle, int64_t timeout_ms)
{
    mpx_engine *engine;
    mpx_request *request;
    struct timespec deadline = mpx_deadline(timeout_ms > 0 ? timeout_ms : 0);
    int32_t status;
    if (!id)
        return mpx_fail(MINIPAGED_ERROR_ARGUMENT, "request is NULL; it must point to where the number is put.");
    *id = 0;
    if (timeout_ms && mpx_in_callback())
        return mpx_fail_in_callback("minipaged_next");
    if ((status = mpx_engine_get(&engine, handle)))
        return status;
    pthread_mutex_lock(&engine->lock);
    while (!engine->ready.first) {
        if (engine->closing)
            return leave(engine, mpx_fail(MINIPAGED_ERROR_ENGINE, "the engine was destroyed meanwhile."));
        if (timeout_ms == 0 || !wait_on(&engine->ready_changed, &engine->lock, timeout_ms, &deadline))
            return leave(engine, MINIPAGED_TIMEOUT);
    }
    request = engine->ready.first;
    mpx_list_remove(&engine->ready, request);
    *id = request->id;
    return leave(engine, MINIPAGED_OK);
}

/* ---- reading ---- */

/* Bytes of `text` that fit into `room` without cutting a character. */
static size_t whole_characters(const char *text, size_t size, size_t room)
{
    if (size <= room)
        return size;
    while (room && ((unsigned char)text[room] & 0xC0) == 0x80)
        room--;
    return room;
}

static void read_choice(mpx_choice *choice, minipaged_reader *out)
{
    size_t tokens = choice->num_tokens - choice->tokens_read;
    size_t text = choice->text_size - choice->text_read;
    if (out->token_ids) {
        if (tokens > out->token_capacity)
            tokens = (size_t)out->token_capacity;
        if (tokens)
            memcpy(out->token_ids, choice->token_ids + choice->tokens_read, tokens * sizeof(int32_t));
        out->num_tokens = tokens;
    }
    if (out->text) {
        text = whole_characters(choice->text + choice->text_read, text, (size_t)out->text_capacity - 1);
        if (text)
            memcpy(out->text, choice->text + choice->text_read, text);
        out->text[text] = 0;
        out->text_length = text;
    }
    choice->tokens_read += tokens; /* what has no buffer is left out */
    choice->text_read += text;
    if (choice->tokens_read == choice->num_tokens && choice->text_read == choice->text_size) {
        choice->finish_told = choice->finish_reason != 0;
        out->choice_finish_reason = choice->finish_reason;
    }
}

MPX_EXPORT int32_t minipaged_request_read(minipaged_engine *handle, minipaged_request id, minipaged_reader *reader,
                                          int64_t timeout_ms)
{
    mpx_engine *engine;
    mpx_request *request;
    mpx_choice *choice;
    minipaged_reader out;
    struct timespec deadline = mpx_deadline(timeout_ms > 0 ? timeout_ms : 0);
    int32_t status;
    if (!reader)
        return mpx_fail(MINIPAGED_ERROR_ARGUMENT, "reader is NULL; it must point to a minipaged_reader.");
    if ((status = mpx_check_out("minipaged_reader", reader->struct_size, sizeof out, sizeof out)))
        return status;
    out = *reader;
    out.choice = out.choice_finish_reason = 0;
    out.num_tokens = out.text_length = 0;
    if ((out.token_ids && out.token_capacity < 1) || (out.text && out.text_capacity < 5))
        return mpx_fail(MINIPAGED_ERROR_BUFFER,
                        "a buffer is too small: token_capacity must be at least 1 and text_capacity at least 5.");
    if (timeout_ms && mpx_in_callback())
        return mpx_fail_in_callback("minipaged_request_read");
    if ((status = enter(&engine, handle, &request, id)))
        return status;
    if (request->callback)
        return leave(engine, mpx_fail(MINIPAGED_ERROR_ARGUMENT,
                                      "request %llu gives its output to a callback; it cannot be read as well.",
                                      (unsigned long long)id));
    while (!(choice = mpx_request_news(request)) && !request->ended)
        if ((status = await(engine, request, timeout_ms, &deadline))) {
            mpx_write_out(reader, &out, sizeof out);
            return leave(engine, status);
        }
    if (choice) {
        out.choice = (int32_t)(choice - request->choices);
        read_choice(choice, &out);
        status = MINIPAGED_OK;
    } else {
        status = request->status ? ending(request) : MINIPAGED_DONE;
    }
    mpx_write_out(reader, &out, sizeof out);
    return leave(engine, status);
}

/* ---- state and results ---- */

MPX_EXPORT int32_t minipaged_request_poll(minipaged_engine *handle, minipaged_request id,
                                          minipaged_request_info *info)
{
    mpx_engine *engine;
    mpx_request *request;
    minipaged_request_info out;
    int32_t status;
    if (!info)
        return mpx_fail(MINIPAGED_ERROR_ARGUMENT, "info is NULL; it must point to a minipaged_request_info.");
    if ((status = mpx_check_out("minipaged_request_info", info->struct_size, 8, sizeof out)) ||
        (status = enter(&engine, handle, &request, id)))
        return status;
    out = request->info;
    out.finished = request->ended;
    out.status = request->status;
    out.num_choices = (int32_t)request->num_choices;
    out.finish_reason = !request->ended          ? MINIPAGED_FINISH_NONE
                        : request->num_choices   ? request->choices[0].finish_reason
                        : request->status        ? MINIPAGED_FINISH_ERROR
                                                 : MINIPAGED_FINISH_ABORT;
    for (size_t i = 0; i < request->num_choices; i++)
        out.num_generated_tokens += (int64_t)request->choices[i].num_tokens;
    mpx_write_out(info, &out, sizeof out);
    return leave(engine, MINIPAGED_OK);
}

/* As enter(), for one choice of a request that has ended. */
static int32_t enter_choice(mpx_engine **engine, minipaged_engine *handle, minipaged_request id, int32_t index,
                            mpx_choice **choice)
{
    mpx_request *request;
    int32_t status = enter(engine, handle, &request, id);
    if (status)
        return status;
    if (!request->ended)
        return leave(*engine, mpx_fail(MINIPAGED_ERROR_NOT_FINISHED,
                                       "request %llu is still running; wait for it first.", (unsigned long long)id));
    if (index < 0 || (size_t)index >= request->num_choices)
        return leave(*engine, mpx_fail(MINIPAGED_ERROR_ARGUMENT, "choice is %d, but the request has %zu choices%s.",
                                       index, request->num_choices, request->status ? " (it failed)" : ""));
    *choice = &request->choices[index];
    return MINIPAGED_OK;
}

MPX_EXPORT int32_t minipaged_request_choice(minipaged_engine *handle, minipaged_request id, int32_t index,
                                            minipaged_choice_info *info)
{
    mpx_engine *engine;
    mpx_choice *choice;
    minipaged_choice_info out = MINIPAGED_CHOICE_INFO_INIT;
    int32_t status;
    if (!info)
        return mpx_fail(MINIPAGED_ERROR_ARGUMENT, "info is NULL; it must point to a minipaged_choice_info.");
    if ((status = mpx_check_out("minipaged_choice_info", info->struct_size, 8, sizeof out)) ||
        (status = enter_choice(&engine, handle, id, index, &choice)))
        return status;
    out.finish_reason = choice->finish_reason;
    out.stop_token_id = choice->stop_token_id;
    out.has_logprobs = choice->has_logprobs;
    out.num_tokens = (int64_t)choice->num_tokens;
    out.text_length = (int64_t)choice->text_size;
    out.cumulative_logprob = choice->cumulative_logprob;
    out.beam_score = choice->beam_score;
    mpx_write_out(info, &out, sizeof out);
    return leave(engine, MINIPAGED_OK);
}

MPX_EXPORT int32_t minipaged_request_text(minipaged_engine *handle, minipaged_request id, int32_t index,
                                          char *buffer, size_t capacity, size_t *length)
{
    mpx_engine *engine;
    mpx_choice *choice;
    int32_t status = enter_choice(&engine, handle, id, index, &choice);
    return status ? status
                  : leave(engine, mpx_copy_out(choice->text, choice->text_size, 1, 1, buffer, capacity, length));
}

MPX_EXPORT int32_t minipaged_request_tokens(minipaged_engine *handle, minipaged_request id, int32_t index,
                                            int32_t *token_ids, size_t capacity, size_t *num_tokens)
{
    mpx_engine *engine;
    mpx_choice *choice;
    int32_t status = enter_choice(&engine, handle, id, index, &choice);
    return status ? status
                  : leave(engine, mpx_copy_out(choice->token_ids, choice->num_tokens, sizeof(int32_t), 0, token_ids,
                                               capacity, num_tokens));
}

MPX_EXPORT int32_t minipaged_request_stop_string(minipaged_engine *handle, minipaged_request id, int32_t index,
                                                 char *buffer, size_t capacity, size_t *length)
{
    mpx_engine *engine;
    mpx_choice *choice;
    int32_t status = enter_choice(&engine, handle, id, index, &choice);
    return status
               ? status
               : leave(engine, mpx_copy_out(choice->stop_string, choice->stop_size, 1, 1, buffer, capacity, length));
}

MPX_EXPORT int32_t minipaged_request_logprobs(minipaged_engine *handle, minipaged_request id, int32_t index,
                                              size_t position, minipaged_logprob *logprobs, size_t capacity,
                                              size_t *count)
{
    mpx_engine *engine;
    mpx_request *request;
    mpx_choice *choice;
    size_t begin = 0, end = 0;
    int32_t status = enter(&engine, handle, &request, id);
    if (status)
        return status;
    if (index != MINIPAGED_PROMPT && (index < 0 || (size_t)index >= request->num_choices))
        return leave(engine, mpx_fail(MINIPAGED_ERROR_ARGUMENT, "choice is %d, but the request has %zu choices.",
                                      index, request->num_choices));
    choice = index == MINIPAGED_PROMPT ? &request->prompt : &request->choices[index];
    if (position < choice->num_positions) {
        begin = position ? choice->logprob_ends[position - 1] : 0;
        end = choice->logprob_ends[position];
    }
    return leave(engine, mpx_copy_out(choice->logprobs + begin, end - begin, sizeof *logprobs, 0, logprobs, capacity,
                                      count));
}

MPX_EXPORT int32_t minipaged_request_error(minipaged_engine *handle, minipaged_request id, char *buffer,
                                           size_t capacity, size_t *length)
{
    mpx_engine *engine;
    mpx_request *request;
    int32_t status = enter(&engine, handle, &request, id);
    return status
               ? status
               : leave(engine, mpx_copy_out(request->error, request->error_size, 1, 1, buffer, capacity, length));
}
