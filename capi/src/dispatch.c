/* Callbacks: one dispatcher thread an engine (in step mode the thread that steps), never the compute thread.
 *
 * A callback gets whatever is new in one choice, copied, and runs with no lock held and without the
 * interpreter's. A slow one delays the others of its engine, and gets its own output in larger pieces; the
 * engine computes on (see mpx_settle). */

#define _GNU_SOURCE
#include "internal.h"

#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

static __thread int callback_depth;

int mpx_in_callback(void)
{
    return callback_depth > 0;
}

void mpx_callback_begins(void)
{
    callback_depth++;
}

void mpx_callback_ends(void)
{
    callback_depth--;
}

int32_t mpx_fail_in_callback(const char *function)
{
    return mpx_fail(MINIPAGED_ERROR_BUSY,
                    "%s was called inside a callback, where it would wait for itself; call it from another thread, "
                    "or after the callback has returned.",
                    function);
}

typedef struct scratch {
    char *data;
    size_t capacity;
} scratch;

/* Copy what is new in `choice` (NULL: nothing is) and mark it as given out. */
static int fill(minipaged_chunk *chunk, mpx_request *request, mpx_choice *choice, scratch *copy)
{
    size_t tokens = choice ? choice->num_tokens - choice->tokens_read : 0;
    size_t text = choice ? choice->text_size - choice->text_read : 0;
    size_t needed = tokens * sizeof(int32_t) + text + 1 + (request->ended ? request->error_size + 1 : 1);
    char *to;
    if (needed > copy->capacity) {
        char *larger = realloc(copy->data, needed * 2);
        if (!larger)
            return 0;
        copy->data = larger;
        copy->capacity = needed * 2;
    }
    to = copy->data;
    memset(chunk, 0, sizeof *chunk);
    chunk->struct_size = sizeof *chunk;
    chunk->request = request->id;
    chunk->produced_ns = request->produced_ns;
    chunk->token_ids = (const int32_t *)(void *)to;
    chunk->num_tokens = tokens;
    if (tokens)
        memcpy(to, choice->token_ids + choice->tokens_read, tokens * sizeof(int32_t));
    to += tokens * sizeof(int32_t);
    chunk->text = to;
    chunk->text_length = text;
    if (text)
        memcpy(to, choice->text + choice->text_read, text);
    to[text] = 0;
    to += text + 1;
    chunk->error = to;
    if (request->ended && request->error_size)
        memcpy(to, request->error, request->error_size);
    to[request->ended ? request->error_size : 0] = 0;
    if (choice) {
        choice->tokens_read = choice->num_tokens;
        choice->text_read = choice->text_size;
        choice->finish_told = choice->finish_reason != 0;
        chunk->choice = (int32_t)(choice - request->choices);
        chunk->choice_finish_reason = choice->finish_reason;
    } else if (request->num_choices)
        chunk->choice_finish_reason = request->choices[0].finish_reason;
    else
        chunk->choice_finish_reason = request->status ? MINIPAGED_FINISH_ERROR : MINIPAGED_FINISH_ABORT;
    if (request->ended && !mpx_request_news(request)) {
        chunk->finished = 1;
        chunk->status = request->status;
        request->final_told = 1;
    }
    return 1;
}

/* Give one request's news to its callback. The engine's lock is held, but not while the callback runs. */
static void call(mpx_engine *engine, mpx_request *request, scratch *copy)
{
    minipaged_chunk chunk;
    int32_t answer;
    mpx_choice *choice = mpx_request_news(request);
    if ((!choice && !request->ended) || !fill(&chunk, request, choice, copy))
        return; /* nothing new after all; or no memory now: told with the next news */
    request->dispatching = engine->calling = 1;
    pthread_mutex_unlock(&engine->lock);
    mpx_callback_begins();
    answer = request->callback(&chunk, request->user_data);
    mpx_callback_ends();
    pthread_mutex_lock(&engine->lock);
    request->dispatching = engine->calling = 0;
    if (request->final_told) {
        request->final_done = 1;
        pthread_cond_broadcast(&request->changed);
        if (request->auto_free && !request->freed) {
            mpx_request_release(engine, request);
            return;
        }
    } else if (answer) {
        mpx_request_cancel(engine, request);
    }
    mpx_request_collect(engine, request);
}

void mpx_destroy_dead(mpx_request *first)
{
    while (first) {
        mpx_request *dead = first;
        first = dead->hash_next;
        mpx_callback_begins();
        mpx_request_destroy(dead);
        mpx_callback_ends();
    }
}

static void run(mpx_engine *engine, scratch *copy)
{
    while (engine->calls.first || engine->dead) {
        mpx_request *request = engine->calls.first, *dead = engine->dead;
        int more;
        if (dead) {
            engine->dead = NULL;
            pthread_mutex_unlock(&engine->lock);
            mpx_destroy_dead(dead);
            pthread_mutex_lock(&engine->lock);
            continue;
        }
        mpx_list_remove(&engine->calls, request);
        do { /* all choices with news, before another request's turn */
            uint64_t id = request->id;
            if (request->freed || request->final_told)
                break;
            call(engine, request, copy);
            request = mpx_request_find(engine, id);
            more = request && !request->in_list && !request->freed && !request->final_told &&
                   (mpx_request_news(request) || request->ended);
        } while (more);
    }
}

void mpx_dispatch(mpx_engine *engine)
{
    scratch copy = {0};
    pthread_mutex_lock(&engine->lock);
    run(engine, &copy);
    pthread_mutex_unlock(&engine->lock);
    free(copy.data);
}

/* Ask Linux (6.12 and newer; others do not mind) to let this thread run as soon as it is woken, for a short
 * while, beside threads that compute. It would wait for the end of their slice else, which is milliseconds. */
static void ask_for_short_slices(void)
{
#ifdef SYS_sched_setattr
    struct {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t slice, deadline, period; /* nanoseconds */
    } attributes = {0};
    if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) == 0 && attributes.policy == 0) {
        attributes.slice = 100000;
        syscall(SYS_sched_setattr, 0, &attributes, 0);
    }
#endif
}

static void *dispatcher(void *argument)
{
    mpx_engine *engine = argument;
    scratch copy = {0};
    ask_for_short_slices();
    pthread_mutex_lock(&engine->lock);
    for (;;) {
        run(engine, &copy);
        if (mpx_log_waiting()) {
            pthread_mutex_unlock(&engine->lock);
            mpx_log_deliver();
            pthread_mutex_lock(&engine->lock);
        } else if (engine->calls.first || engine->dead) {
            continue;
        } else if (engine->dispatcher_ends) {
            break;
        } else {
            if (engine->settling)
                pthread_cond_signal(&engine->calls_done);
            pthread_cond_wait(&engine->calls_changed, &engine->lock);
        }
    }
    pthread_mutex_unlock(&engine->lock);
    free(copy.data);
    return NULL;
}

/* Where compute takes every core, the dispatcher would not get one before the end of a slice, milliseconds into
 * the next step. So the engine's thread lets it finish before that step begins, but waits for no slow callback. */
void mpx_settle(mpx_engine *engine)
{
    struct timespec deadline = mpx_deadline_ns(MPX_SETTLE_NS);
    int in_time = 1;
    pthread_mutex_lock(&engine->lock);
    engine->settling = 1;
    while (in_time && (engine->calls.first || engine->calling))
        in_time = pthread_cond_timedwait(&engine->calls_done, &engine->lock, &deadline) == 0;
    engine->settling = 0;
    pthread_mutex_unlock(&engine->lock);
}

int32_t mpx_dispatcher_start(mpx_engine *engine)
{
    sigset_t all, before;
    int error;
    sigfillset(&all); /* signals are for the program's own threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&engine->dispatcher, NULL, dispatcher, engine);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error)
        return mpx_fail(MINIPAGED_ERROR_MEMORY, "no thread for the callbacks can be started (%s).", strerror(error));
    engine->has_dispatcher = 1;
    return MINIPAGED_OK;
}
