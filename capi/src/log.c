/* The log callback, and the messages on their way to it.
 *
 * Messages come from any thread, the compute thread too, which must not run the caller's code: they are
 * queued, and delivered by a thread of the caller inside a call, or by a dispatcher. */

#include "internal.h"

#define MAX_WAITING 1000 /* further messages are dropped: nobody is there to deliver */

typedef struct message {
    struct message *next;
    int32_t level;
    char text[];
} message;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t delivered = PTHREAD_COND_INITIALIZER;
static minipaged_log_fn callback;
static void *callback_data;
static int32_t minimum = MINIPAGED_LOG_ERROR + 1;
static message *first, *last;
static int num_waiting, delivering;
static pthread_t deliverer;
static __thread int inside_a_call;

void mpx_call_begins(void)
{
    inside_a_call++;
}

void mpx_call_ends(void)
{
    inside_a_call--;
    if (mpx_log_waiting() && !mpx_in_callback())
        mpx_log_deliver();
}

int mpx_log_waiting(void)
{
    return __atomic_load_n(&num_waiting, __ATOMIC_RELAXED) > 0;
}

int32_t mpx_log_level(void)
{
    return __atomic_load_n(&minimum, __ATOMIC_RELAXED);
}

/* Wait for whoever delivers; a thread that is cancelled meanwhile would keep the lock. */
static void wait_for_delivery(void)
{
    int before;
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before);
    pthread_cond_wait(&delivered, &lock);
    pthread_setcancelstate(before, NULL);
}

static message *take(void)
{
    message *taken = first;
    if (taken) {
        first = taken->next;
        if (!first)
            last = NULL;
        __atomic_fetch_sub(&num_waiting, 1, __ATOMIC_RELAXED);
    }
    return taken;
}

void mpx_log_deliver(void)
{
    message *taken;
    pthread_mutex_lock(&lock);
    while (delivering && !pthread_equal(deliverer, pthread_self()))
        wait_for_delivery(); /* what waits may be ours, and is due before our call returns */
    while (!delivering && (taken = take())) {
        minipaged_log_fn function = callback;
        void *data = callback_data;
        if (function && taken->level >= mpx_log_level()) {
            delivering = 1;
            deliverer = pthread_self();
            pthread_mutex_unlock(&lock);
            mpx_callback_begins();
            function(taken->level, taken->text, data);
            mpx_callback_ends();
            pthread_mutex_lock(&lock);
            delivering = 0;
            pthread_cond_broadcast(&delivered);
        }
        free(taken);
    }
    pthread_mutex_unlock(&lock);
}

void mpx_log(int32_t level, const char *text, size_t size)
{
    mpx_engine *engine;
    message *made;
    if (level < mpx_log_level() || mpx_forked() || !(made = malloc(sizeof *made + size + 1)))
        return;
    made->next = NULL;
    made->level = level;
    memcpy(made->text, text, size);
    made->text[size] = 0;
    pthread_mutex_lock(&lock);
    if (!callback || num_waiting >= MAX_WAITING) {
        pthread_mutex_unlock(&lock);
        free(made);
        return;
    }
    *(last ? &last->next : &first) = made;
    last = made;
    __atomic_fetch_add(&num_waiting, 1, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&lock);
    if (inside_a_call && !mpx_in_callback()) {
        mpx_log_deliver();
    } else if ((engine = mpx_engine_any())) {
        pthread_mutex_lock(&engine->lock);
        pthread_cond_signal(&engine->calls_changed);
        pthread_mutex_unlock(&engine->lock);
        mpx_engine_put(engine);
    }
}

MPX_EXPORT int32_t minipaged_set_log_callback(minipaged_log_fn function, int32_t level, void *user_data)
{
    message *taken;
    if (mpx_forked())
        return mpx_fail_forked();
    pthread_mutex_lock(&lock);
    while (delivering && !pthread_equal(deliverer, pthread_self()))
        wait_for_delivery();
    callback = function;
    callback_data = user_data;
    __atomic_store_n(&minimum, function ? level : MINIPAGED_LOG_ERROR + 1, __ATOMIC_RELAXED);
    while (!function && (taken = take()))
        free(taken);
    pthread_mutex_unlock(&lock);
    return MINIPAGED_OK;
}
