/* Everything the C files of the library share. */
#ifndef MINIPAGED_INTERNAL_H
#define MINIPAGED_INTERNAL_H

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "minipaged.h"

#include "bridge.h"
#include "externs.h"

#define MPX_EXPORT __attribute__((visibility("default")))
#define MPX_SETTLE_NS 1000000 /* at most so long the engine's thread leaves its core to callbacks */
#define MPX_MAX_STRUCT 65536 /* a struct_size above this is garbage, not a later version */

/* ---- status.c: errors, text, time, fork ---- */

int32_t mpx_fail(int32_t status, const char *format, ...) __attribute__((format(printf, 2, 3)));
int32_t mpx_fail_text(int32_t status, const char *text, size_t size);
int mpx_is_utf8(const char *text, size_t size);
/* Length of a text given as (text, length or MINIPAGED_ZSTRING), checked; `what` names it in the error. */
int32_t mpx_check_text(const char *what, const char *text, size_t *size);
int32_t mpx_copy_out(const void *data, size_t count, size_t unit, int is_text, void *buffer, size_t capacity,
                     size_t *length);
int64_t mpx_now_ns(void);
struct timespec mpx_deadline(int64_t timeout_ms);
struct timespec mpx_deadline_ns(int64_t timeout_ns);
void mpx_cond_init(pthread_cond_t *cond);
int mpx_forked(void);
int32_t mpx_fail_forked(void);
void mpx_mark_started(void); /* from now on a forked child is refused */

/* ---- structs.c: versioned structs ---- */

/* Read a caller's struct of any version into `copy`, which must hold the defaults. */
int32_t mpx_read_engine_options(minipaged_engine_options *copy, const minipaged_engine_options *given);
int32_t mpx_read_sampling(minipaged_sampling *copy, const minipaged_sampling *given);
int32_t mpx_read_request_options(minipaged_request_options *copy, const minipaged_request_options *given);
int32_t mpx_check_out(const char *what, uint32_t given, size_t first, size_t ours);
void mpx_write_out(void *given, const void *ours, size_t size); /* struct_size stays the caller's */
/* The fields that are set, as a JSON object to be freed. */
int32_t mpx_engine_options_json(const minipaged_engine_options *options, char **json, size_t *size);
int32_t mpx_sampling_json(const minipaged_sampling *sampling, char **json, size_t *size);

/* ---- engines and requests ---- */

typedef struct mpx_choice {
    int32_t *token_ids;
    size_t num_tokens, token_capacity, tokens_read;
    char *text; /* NUL after text_size bytes, once there are any */
    size_t text_size, text_capacity, text_read;
    int32_t finish_reason, stop_token_id, has_logprobs, finish_told;
    char *stop_string;
    size_t stop_size;
    double cumulative_logprob, beam_score;
    minipaged_logprob *logprobs; /* of all positions, one after the other */
    size_t num_logprobs, logprob_capacity;
    size_t *logprob_ends; /* where each position's end */
    size_t num_positions, position_capacity;
} mpx_choice;

typedef struct mpx_request {
    struct mpx_request *hash_next;
    struct mpx_request *next, *previous; /* in the engine's list of requests with news */
    int in_list;
    uint64_t id;
    pthread_cond_t changed;
    int ended, freed, cancelled, waiters;
    int dispatching, final_told, final_done; /* the last callback has begun, has returned */
    int32_t status;
    char *error;
    size_t error_size;
    minipaged_chunk_fn callback;
    void *user_data;
    int auto_free;
    minipaged_free_fn free_user_data;
    minipaged_request_info info; /* times and counts */
    mpx_choice prompt;           /* only its log-probabilities */
    mpx_choice *choices;
    size_t num_choices;
    int64_t produced_ns;
} mpx_request;

typedef struct mpx_list {
    mpx_request *first, *last;
} mpx_list;

typedef struct mpx_engine {
    uint64_t serial;
    int32_t mode;
    int references; /* under the registry's lock */
    struct mpx_engine *registry_next;

    pthread_mutex_t lock; /* everything below */
    pthread_cond_t commands_changed, calls_changed, calls_done, ready_changed;
    mpx_command *first_command, *last_command;
    mpx_request **buckets;
    size_t num_buckets, num_records, num_held;
    uint64_t last_request;
    mpx_list calls; /* with news, and a callback */
    mpx_list ready; /* with news, and none */
    mpx_request *dead; /* to be destroyed without the lock: they have user data to free */
    int calls_told, ready_told; /* their waiters are to be woken, by mpx_unlock */
    int calling, settling;      /* a callback runs; the engine's thread waits for the end of all that are due */
    int closing, dispatcher_ends, has_dispatcher, stepping;
    pthread_t dispatcher;
} mpx_engine;

/* engines.c */
int32_t mpx_engine_new(mpx_engine **engine, int32_t mode);
void mpx_engine_publish(mpx_engine *engine);
int32_t mpx_engine_get(mpx_engine **engine, minipaged_engine *handle); /* with a reference, or an error */
void mpx_engine_put(mpx_engine *engine);
minipaged_engine *mpx_engine_handle(const mpx_engine *engine);
int mpx_engine_withdraw(mpx_engine *engine); /* 0: another thread was first */
mpx_engine *mpx_engine_any(void);            /* some live engine with a reference, or NULL */
void mpx_command_add(mpx_engine *engine, mpx_command *command);

/* requests.c; all but mpx_request_new under the engine's lock */
mpx_request *mpx_request_new(void);
void mpx_request_destroy(mpx_request *request); /* without a lock, if it has user data to free */
int mpx_request_insert(mpx_engine *engine, mpx_request *request); /* gives it its id */
mpx_request *mpx_request_find(mpx_engine *engine, uint64_t id);   /* freed ones too */
mpx_request *mpx_request_get(mpx_engine *engine, uint64_t id);    /* the caller's; NULL with an error set */
void mpx_request_collect(mpx_engine *engine, mpx_request *request);
void mpx_request_end(mpx_engine *engine, mpx_request *request, int32_t status, const char *error, size_t size);
int32_t mpx_request_cancel(mpx_engine *engine, mpx_request *request);
int32_t mpx_request_release(mpx_engine *engine, mpx_request *request);
/* What the engine's thread hands over; these lock by themselves, and do nothing for a request that is gone. */
void mpx_push(mpx_engine *engine, uint64_t request, int32_t choice, const int32_t *token_ids, size_t num_tokens,
              const char *text, size_t size, int64_t sampled_ns, int32_t tell);
void mpx_push_logprobs(mpx_engine *engine, uint64_t request, int32_t choice, const minipaged_logprob *entries,
                       size_t num_entries, const size_t *counts, size_t num_positions);
void mpx_end_choice(mpx_engine *engine, uint64_t request, int32_t choice, int32_t finish_reason,
                    int32_t stop_token_id, const char *stop_string, size_t size, int32_t has_logprobs,
                    double cumulative_logprob, double beam_score);
/* Of `facts` counts and times are taken. */
void mpx_end(mpx_engine *engine, uint64_t request, int32_t status, const char *error, size_t size,
             const minipaged_request_info *facts);
void mpx_unlock(mpx_engine *engine); /* where news may have been told: wakes who waits for them */

int mpx_choice_has_news(const mpx_choice *choice);
mpx_choice *mpx_request_news(mpx_request *request); /* the first choice with output not given out yet */
void mpx_list_remove(mpx_list *list, mpx_request *request);

/* dispatch.c */
int mpx_in_callback(void);
void mpx_callback_begins(void);
void mpx_callback_ends(void);
int32_t mpx_fail_in_callback(const char *function);
int32_t mpx_dispatcher_start(mpx_engine *engine);
void mpx_destroy_dead(mpx_request *first);
void mpx_settle(mpx_engine *engine); /* give the dispatcher a moment to run what is due */
void mpx_dispatch(mpx_engine *engine); /* run the callbacks that are due, on this thread */

/* log.c */
void mpx_call_begins(void); /* around calls into Python made by a thread of the caller, where messages... */
void mpx_call_ends(void);   /* ...may be delivered at once */
void mpx_log_deliver(void); /* what waits is given to the log callback, on this thread */
int mpx_log_waiting(void);

/* python.c */
int32_t mpx_python_start(void);

/* handover.c */
int32_t mpx_handover_start(void); /* with a running interpreter */

int mpx_cffi_start(void); /* in the C file that cffi makes */

#endif
