/*
 * minipaged.h: a large-language-model engine with a paged KV cache, for C programs.
 *
 * This header is the manual. A complete program:
 *
 *     minipaged_engine *engine;
 *     minipaged_request request;
 *     char text[4096];
 *     if (minipaged_engine_create(&engine, "tiny", NULL) ||
 *         minipaged_submit_text(&request, engine, "ROMEO:", MINIPAGED_ZSTRING, NULL, NULL) ||
 *         minipaged_wait(engine, request, MINIPAGED_FOREVER) ||
 *         minipaged_request_text(engine, request, 0, text, sizeof text, NULL))
 *         fprintf(stderr, "%s\n", minipaged_error());
 *     else
 *         puts(text);
 *     minipaged_engine_destroy(engine);
 *
 * Build it with `cc hello.c $(minipaged config --cflags --libs)`.
 *
 * THE MODEL OF USE. An engine holds one model and serves any number of requests at once: whatever is
 * unfinished is batched together. Submit a request from any thread; then wait for it, poll it, read its
 * text as it comes, or be called back; cancel it whenever you like; free it when you are done with it.
 *
 * THREADS. Every function may be called from any thread, at any time. An engine computes on a thread of
 * its own (MINIPAGED_MODE_THREAD), or only inside minipaged_engine_step (MINIPAGED_MODE_STEP). Submit,
 * cancel, wait, poll, read, result and free functions never touch the Python interpreter inside and do
 * not wait for the engine; tokenize, detokenize, chat_prompt, stats, create and destroy take its global
 * lock, and stats waits for the end of the running step. The interpreter is never torn down; what it
 * holds is given back to the system when the process ends. create runs Python on the calling thread, and may
 * compile: give that thread a stack as main has it, 8 MiB. pthread_cancel takes effect after a call, not in it.
 *
 * CALLBACKS run on one dispatcher thread of the engine (in step mode: on the thread inside
 * minipaged_engine_step), never on the compute thread, in token order within a request, one at a time
 * within an engine. A callback may call anything but what waits: create, destroy, step, and wait, read or
 * next with a timeout other than 0, return MINIPAGED_ERROR_BUSY there. It must not throw, longjmp or end
 * its thread. A slow one delays the others; compute goes on, but where it takes every core each step first
 * waits up to a millisecond for callbacks that are due.
 *
 * STATUS. Functions return int32_t: 0 is success, a positive value is information (nothing failed), a
 * negative value is an error. Values are never renumbered. minipaged_error() is the text of the calling
 * thread's latest error, with the value seen, the limit and the remedy. A call that fails changes nothing.
 *
 * OWNERSHIP. Inputs are copied before a call returns. Strings come back in the caller's buffers. Nothing
 * but an engine and its requests has to be freed, and destroying an engine frees its requests. A request
 * is a 64-bit number: a stale one, or one of another engine, gives MINIPAGED_ERROR_NOT_FOUND. So does an
 * engine that was destroyed: MINIPAGED_ERROR_ENGINE. NULL where this manual does not allow it gives
 * MINIPAGED_ERROR_ARGUMENT.
 *
 * STRINGS are UTF-8. Functions that return text or tokens take (buffer, capacity, length): *length, which
 * may be NULL, receives how much there is (without the final NUL of a text), in bytes or tokens; with
 * capacity 0 (buffer may be NULL then) that is all they do and they return MINIPAGED_OK; with too little
 * capacity they write nothing and return MINIPAGED_ERROR_BUFFER. A text needs length + 1 bytes.
 *
 * STRUCTS begin with struct_size and are made with their INIT macro. Fields are only ever appended: a
 * library newer than the program takes defaults for fields the program does not know; a library older than
 * the program refuses (MINIPAGED_ERROR_STRUCT) a struct whose unknown fields are not zero.
 *
 * FORK. A child process has no engine thread: there, every call with an engine of the parent returns
 * MINIPAGED_ERROR_FORKED. Create engines after forking.
 *
 * Unix only. The header is C99 and C++98; include minipaged.hpp for a C++17 interface.
 */
#ifndef MINIPAGED_H
#define MINIPAGED_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- versions -------------------------------------------------------------------------------------- */

/* The version of this interface, which is not the version of the package: a program built with one
 * version runs with every library of the same MAJOR and the same or a higher MINOR. */
#define MINIPAGED_API_MAJOR 1
#define MINIPAGED_API_MINOR 0
#define MINIPAGED_API_PATCH 0
#define MINIPAGED_API_VERSION (MINIPAGED_API_MAJOR * 1000000 + MINIPAGED_API_MINOR * 1000 + MINIPAGED_API_PATCH)

/* MINIPAGED_API_VERSION of the library that is loaded. Needs no Python, never fails. */
int32_t minipaged_api_version(void);

/* Version of the minipaged package the library was built from, such as "0.1.0". Needs no Python. */
const char *minipaged_version(void);

/* ---- status ---------------------------------------------------------------------------------------- */

#define MINIPAGED_OK 0
#define MINIPAGED_TIMEOUT 1 /* the time was over first; nothing is wrong */
#define MINIPAGED_DONE 2    /* all output of this request was read; or a step found nothing to do */

#define MINIPAGED_ERROR_INTERNAL (-1)             /* a bug in minipaged, please report it */
#define MINIPAGED_ERROR_ARGUMENT (-2)             /* NULL, an impossible number, malformed JSON */
#define MINIPAGED_ERROR_ENGINE (-3)               /* not an engine, or one that was destroyed */
#define MINIPAGED_ERROR_NOT_FOUND (-4)            /* this engine has no such request (freed, or foreign) */
#define MINIPAGED_ERROR_STRUCT (-5)               /* struct_size is impossible, or unknown fields are set */
#define MINIPAGED_ERROR_UTF8 (-6)                 /* a text is not UTF-8 */
#define MINIPAGED_ERROR_BUFFER (-7)               /* the buffer is too small; *length says what is needed */
#define MINIPAGED_ERROR_BUSY (-8)                 /* called where it would wait for itself */
#define MINIPAGED_ERROR_FORKED (-9)               /* this process is a fork of the engine's */
#define MINIPAGED_ERROR_MEMORY (-10)              /* out of memory */
#define MINIPAGED_ERROR_PYTHON (-11)              /* the interpreter inside cannot start */
#define MINIPAGED_ERROR_PACKAGE (-12)             /* a Python package is missing or broken */
#define MINIPAGED_ERROR_CONFIG (-13)              /* an engine option is unknown or out of range */
#define MINIPAGED_ERROR_PARAMETER (-14)           /* a sampling parameter is unknown or out of range */
#define MINIPAGED_ERROR_REQUEST (-15)             /* a request that cannot run, for another reason than these: */
#define MINIPAGED_ERROR_PROMPT_TOO_LONG (-16)     /* prompt plus max_tokens exceed max_model_len */
#define MINIPAGED_ERROR_POOL_TOO_SMALL (-17)      /* it needs more KV blocks than there are */
#define MINIPAGED_ERROR_TOKEN_RANGE (-18)         /* a token id is outside the vocabulary */
#define MINIPAGED_ERROR_MODEL_NOT_FOUND (-19)     /* neither a known model name nor a path with a model */
#define MINIPAGED_ERROR_MODEL_FORMAT (-20)        /* a model file is malformed */
#define MINIPAGED_ERROR_MODEL_UNSUPPORTED (-21)   /* the architecture is not implemented */
#define MINIPAGED_ERROR_TOKENIZER (-22)           /* no tokenizer or chat template, or it failed on this input */
#define MINIPAGED_ERROR_DOWNLOAD (-23)            /* a model could not be pulled */
#define MINIPAGED_ERROR_BACKEND_UNAVAILABLE (-24) /* the device cannot be used on this machine */
#define MINIPAGED_ERROR_ENGINE_DIED (-25)         /* the engine's thread stopped; only destroy helps */
#define MINIPAGED_ERROR_NUMERICAL (-26)           /* the model computed NaN or infinity for this request */
#define MINIPAGED_ERROR_NOT_FINISHED (-27)        /* a result was asked for before the request ended */
#define MINIPAGED_ERROR_MODE (-28)                /* this engine was created in the other mode */

/* The name of a status, such as "MINIPAGED_ERROR_BUSY"; "unknown status" for any other number. Static,
 * needs no Python. */
const char *minipaged_status_name(int32_t status);

/* The text of this thread's latest call that returned an error; "" if none did. Valid until the thread's
 * next failing call; calls that succeed leave it alone. Needs no Python. */
const char *minipaged_error(void);

/* ---- constants ------------------------------------------------------------------------------------- */

#define MINIPAGED_UNSET (-2147483647 - 1) /* a number that was not given: the default applies */
#define MINIPAGED_ZSTRING ((size_t)-1)    /* as the length of a text: it ends with NUL */
#define MINIPAGED_FOREVER (-1)            /* as timeout_ms: wait until it happens */
#define MINIPAGED_PROMPT (-1)             /* as the choice of minipaged_request_logprobs: the prompt's tokens */

#define MINIPAGED_MODE_THREAD 0 /* the engine computes on a thread of its own */
#define MINIPAGED_MODE_STEP 1   /* no thread is started; minipaged_engine_step computes */

/* Why a choice, or a request, ended. */
#define MINIPAGED_FINISH_NONE 0   /* it has not ended */
#define MINIPAGED_FINISH_STOP 1   /* end-of-sequence, a stop token or a stop string */
#define MINIPAGED_FINISH_LENGTH 2 /* max_tokens */
#define MINIPAGED_FINISH_ABORT 3  /* cancelled, or the engine was destroyed */
#define MINIPAGED_FINISH_ERROR 4  /* refused or failed: see status */

#define MINIPAGED_LOG_DEBUG 10
#define MINIPAGED_LOG_INFO 20
#define MINIPAGED_LOG_WARNING 30
#define MINIPAGED_LOG_ERROR 40

/* ---- types ----------------------------------------------------------------------------------------- */

typedef struct minipaged_engine minipaged_engine; /* opaque, and no pointer into memory: never dereferenced */
typedef uint64_t minipaged_request;               /* never 0, never used twice in a process */

/* What is new in one choice of a request. In a callback, token_ids and text belong to the library and are
 * valid until the callback returns. */
typedef struct minipaged_chunk {
    uint32_t struct_size;
    int32_t choice;            /* from 0 */
    minipaged_request request; /* whose output this is */
    const int32_t *token_ids;  /* new tokens: none, one or several */
    uint64_t num_tokens;
    const char *text; /* new text, never half a character; ends with NUL; may lag behind the tokens */
    uint64_t text_length;
    int32_t choice_finish_reason; /* MINIPAGED_FINISH_*; not NONE in the last chunk of each choice */
    int32_t finished;             /* 1 in the last chunk of the request, exactly once; else 0 */
    int32_t status;               /* with finished: MINIPAGED_OK, or the error that ended the request */
    int32_t reserved;
    const char *error;   /* with finished and an error: its text; else "" */
    int64_t produced_ns; /* when the newest token was sampled, CLOCK_MONOTONIC; 0 if there is none yet */
} minipaged_chunk;

/* Called with each chunk. A value other than 0 cancels the request, which then ends with one more chunk
 * (finished, MINIPAGED_FINISH_ABORT). */
typedef int32_t (*minipaged_chunk_fn)(const minipaged_chunk *chunk, void *user_data);

/* Called exactly once for a request that was submitted with it, after its last callback and when it has been
 * freed, on the dispatcher thread or on the one that destroys the engine. May call nothing of this library. */
typedef void (*minipaged_free_fn)(void *user_data);

/* Called with each message of the library's log: see minipaged_set_log_callback. */
typedef void (*minipaged_log_fn)(int32_t level, const char *message, void *user_data);

/* Options of an engine. NULL strings and MINIPAGED_UNSET numbers take the defaults of the Python class
 * EngineConfig, which also describes each option. */
typedef struct minipaged_engine_options {
    uint32_t struct_size;
    int32_t mode;                /* MINIPAGED_MODE_THREAD or MINIPAGED_MODE_STEP */
    const char *device;          /* "auto", "reference", "cpu", "cuda" */
    const char *dtype;           /* "auto", "float32", "bfloat16", "float16" */
    const char *quantization;    /* "int8", "int4" */
    const char *kv_cache_dtype;  /* "auto", "float32", "bfloat16", "float16", "int8" */
    const char *policy;          /* "fcfs", "priority", "static" */
    int64_t num_blocks;          /* KV blocks in the pool */
    int64_t kv_cache_memory;     /* bytes for the pool, where num_blocks is not given */
    int64_t max_model_len;       /* tokens of prompt and output together */
    int64_t swap_space;          /* bytes of host memory for preempted KV */
    uint64_t seed;               /* of requests that bring none */
    int32_t block_size;          /* tokens a block */
    int32_t max_num_seqs;        /* sequences in one step */
    int32_t max_num_batched_tokens; /* tokens in one step */
    int32_t num_threads;            /* compute threads */
    int32_t enable_prefix_caching;  /* 0 or 1 */
    int32_t reserved;
    const char *json; /* a JSON object with any other options of EngineConfig */
} minipaged_engine_options;

#define MINIPAGED_ENGINE_OPTIONS_INIT                                                                          \
    {                                                                                                          \
        sizeof(minipaged_engine_options), MINIPAGED_MODE_THREAD, NULL, NULL, NULL, NULL, NULL,                 \
            MINIPAGED_UNSET, MINIPAGED_UNSET, MINIPAGED_UNSET, MINIPAGED_UNSET, 0, MINIPAGED_UNSET,            \
            MINIPAGED_UNSET, MINIPAGED_UNSET, MINIPAGED_UNSET, MINIPAGED_UNSET, 0, NULL                        \
    }

/* How a request is continued: the fields of the Python class SamplingParams, which describes each. What is
 * MINIPAGED_UNSET or NULL follows the model's own recommendation, or else that class's default. */
typedef struct minipaged_sampling {
    uint32_t struct_size;
    int32_t n;          /* choices returned */
    int64_t max_tokens; /* generated at most; 0: as many as max_model_len leaves room for; default 16 */
    int64_t min_tokens;
    double temperature; /* 0 is greedy */
    double top_p;
    double min_p;
    double presence_penalty;
    double frequency_penalty;
    double repetition_penalty;
    int32_t top_k;
    int32_t has_seed; /* 1: seed makes the random numbers a function of (seed, position) alone */
    uint64_t seed;
    int32_t ignore_eos;                 /* 0 or 1, as the next two */
    int32_t include_stop_str_in_output; /* leave the stop string in the text */
    int32_t skip_special_tokens;        /* leave special tokens out of the text */
    int32_t logprobs;                   /* log-probabilities of the chosen and of this many likeliest tokens */
    int32_t prompt_logprobs;            /* the same for the prompt's tokens */
    int32_t best_of;                    /* sequences generated, of which the n best are returned */
    int32_t beam_width;                 /* beam search with this many beams; 0 or 1: none */
    int32_t early_stopping;             /* of beam search: 0, 1, or 2 for "never" */
    double length_penalty;              /* of beam search */
    const char *const *stop;            /* strings that end the text, not part of it */
    uint64_t num_stop;
    const char *const *bad_words; /* strings that must not be generated */
    uint64_t num_bad_words;
    const int32_t *stop_token_ids; /* tokens that end the text */
    uint64_t num_stop_token_ids;
    const int32_t *allowed_token_ids; /* only these may be generated */
    uint64_t num_allowed_token_ids;
    const int32_t *logit_bias_ids; /* tokens whose logits are changed... */
    const double *logit_bias;      /* ...by these numbers */
    uint64_t num_logit_bias;
    const char *grammar_kind; /* "json" (a schema), "json_object", "regex", "choice" (a JSON list), "grammar" */
    const char *grammar;      /* its source, as grammar_kind says; NULL for "json_object" */
    const char *json;         /* a JSON object with any other fields of SamplingParams */
} minipaged_sampling;

#define MINIPAGED_SAMPLING_INIT                                                                                \
    {                                                                                                          \
        sizeof(minipaged_sampling), MINIPAGED_UNSET, MINIPAGED_UNSET, MINIPAGED_UNSET, MINIPAGED_UNSET,        \
            MINIPAGED_UNSET, MINIPAGED_UNSET, MINIPAGED_UNSET, MINIPAGED_UNSET, MINIPAGED_UNSET,               \
            MINIPAGED_UNSET, 0, 0, MINIPAGED_UNSET, MINIPAGED_UNSET, MINIPAGED_UNSET, MINIPAGED_UNSET,         \
            MINIPAGED_UNSET, MINIPAGED_UNSET, MINIPAGED_UNSET, MINIPAGED_UNSET, MINIPAGED_UNSET, NULL, 0,      \
            NULL, 0, NULL, 0, NULL, 0, NULL, NULL, 0, NULL, NULL, NULL                                         \
    }

/* Everything about a request but its prompt and its sampling. */
typedef struct minipaged_request_options {
    uint32_t struct_size;
    int32_t priority;            /* lower runs first, where policy is "priority" */
    const char *cache_salt;      /* cached prefixes are shared only between requests with the same salt */
    minipaged_chunk_fn callback; /* NULL: the output is waited for, or read */
    void *user_data;             /* given to callback */
    int32_t stream;              /* 1: output can be read token by token; a callback implies it; default 0 */
    int32_t auto_free;           /* 1: the request frees itself after its last callback */
    minipaged_free_fn free_user_data; /* NULL, or called with user_data when it is not needed any more */
} minipaged_request_options;

#define MINIPAGED_REQUEST_OPTIONS_INIT { sizeof(minipaged_request_options), 0, NULL, NULL, NULL, 0, 0, NULL }

/* State of a request. Times are CLOCK_MONOTONIC nanoseconds, 0 if not reached. */
typedef struct minipaged_request_info {
    uint32_t struct_size;
    int32_t finished;      /* 1: the request has ended, and nothing below changes any more */
    int32_t status;        /* MINIPAGED_OK, or the error that ended it */
    int32_t finish_reason; /* of the first choice */
    int32_t num_choices;   /* that have output; all of them, once finished */
    int32_t num_preemptions;
    int64_t num_prompt_tokens; /* these three are known once finished */
    int64_t num_cached_tokens; /* prompt tokens whose KV was found in the prefix cache */
    int64_t num_generated_tokens;
    int64_t submitted_ns;
    int64_t first_scheduled_ns;
    int64_t first_token_ns;
    int64_t finished_ns;
} minipaged_request_info;

#define MINIPAGED_REQUEST_INFO_INIT { sizeof(minipaged_request_info), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }

/* One choice of a finished request. */
typedef struct minipaged_choice_info {
    uint32_t struct_size;
    int32_t finish_reason;      /* MINIPAGED_FINISH_* */
    int32_t stop_token_id;      /* the stop token that ended it; -1 if none did */
    int32_t has_logprobs;       /* 1: there are log-probabilities, and cumulative_logprob is one */
    int64_t num_tokens;
    int64_t text_length;        /* bytes, without the final NUL */
    double cumulative_logprob;  /* sum over its tokens, natural logarithm */
    double beam_score;          /* of beam search; 0 otherwise */
} minipaged_choice_info;

#define MINIPAGED_CHOICE_INFO_INIT { sizeof(minipaged_choice_info), 0, 0, 0, 0, 0, 0.0, 0.0 }

/* Log-probability (natural logarithm) of a token; rank 1 is the likeliest. This struct never grows. */
typedef struct minipaged_logprob {
    int32_t token_id;
    int32_t rank;
    double logprob;
} minipaged_logprob;

/* What minipaged_request_read fills: the caller's buffers, in and out. */
typedef struct minipaged_reader {
    uint32_t struct_size;
    int32_t choice;          /* out: whose output this is */
    int32_t *token_ids;      /* in: buffer, or NULL to leave tokens out */
    uint64_t token_capacity; /* in: its size in tokens, at least 1 */
    uint64_t num_tokens;     /* out */
    char *text;              /* in: buffer, or NULL to leave the text out */
    uint64_t text_capacity;  /* in: its size in bytes, at least 5 */
    uint64_t text_length;    /* out: bytes, without the final NUL that is always there */
    int32_t choice_finish_reason; /* out: not NONE with the last output of this choice */
    int32_t reserved;
} minipaged_reader;

#define MINIPAGED_READER_INIT { sizeof(minipaged_reader), 0, NULL, 0, 0, NULL, 0, 0, 0, 0 }

/* Facts about the model of an engine. */
typedef struct minipaged_model_info {
    uint32_t struct_size;
    int32_t vocab_size;
    int32_t num_layers;
    int32_t hidden_size;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t has_chat_template; /* 0 or 1 */
    int32_t bos_token_id;      /* -1: none */
    int32_t eos_token_id;      /* the first of them; -1: none */
    int64_t max_model_len;     /* of this engine */
    char architecture[64];     /* such as "LlamaForCausalLM" */
    char device[16];           /* "reference", "cpu" or "cuda" */
} minipaged_model_info;

#define MINIPAGED_MODEL_INFO_INIT { sizeof(minipaged_model_info), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, {0}, {0} }

/* Counters since the engine was created, and gauges of this moment. */
typedef struct minipaged_stats {
    uint32_t struct_size;
    int32_t block_size;
    int64_t num_requests_held; /* submitted and not freed yet */
    int64_t num_requests_waiting;
    int64_t num_requests_running;
    int64_t num_requests_finished;
    int64_t num_steps;
    int64_t num_prompt_tokens_computed;
    int64_t num_prompt_tokens_cached;
    int64_t num_generated_tokens;
    int64_t num_preemptions;
    int64_t num_blocks_total;
    int64_t num_blocks_used;
    int64_t num_blocks_cached;
    int64_t num_blocks_evicted;
    int64_t num_blocks_copied;
    int64_t kv_cache_bytes;
    int64_t weight_bytes;
    double step_seconds;
} minipaged_stats;

#define MINIPAGED_STATS_INIT { sizeof(minipaged_stats), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0 }

/* ---- engines --------------------------------------------------------------------------------------- */

/* Load a model and make it ready for requests. Takes as long as loading takes (and starts the Python
 * interpreter, once in a process).
 *   engine   receives the handle, NULL on failure; destroy it with minipaged_engine_destroy.
 *   model    a name that `minipaged models` lists ("tiny" needs no file), or the path of a model.
 *   options  NULL for the defaults.
 * Errors: ARGUMENT, STRUCT, UTF8, BUSY (inside a callback), FORKED, MEMORY, PYTHON, PACKAGE, CONFIG,
 * MODEL_*, TOKENIZER, DOWNLOAD, BACKEND_UNAVAILABLE. */
int32_t minipaged_engine_create(minipaged_engine **engine, const char *model,
                                const minipaged_engine_options *options);

/* End an engine: what is unfinished ends as with cancel (last callbacks included), threads that wait are
 * woken, all requests are freed and the model's memory is given back. Then the handle is dead: using it
 * again, here too, gives MINIPAGED_ERROR_ENGINE. NULL is harmless.
 * Errors: ENGINE, BUSY (inside a callback, or while another thread is in minipaged_engine_step), FORKED. */
int32_t minipaged_engine_destroy(minipaged_engine *engine);

/* Facts about the model. Errors: ARGUMENT, STRUCT, ENGINE, FORKED. */
int32_t minipaged_engine_model_info(minipaged_engine *engine, minipaged_model_info *info);

/* Counters and gauges. Errors: ARGUMENT, STRUCT, ENGINE, FORKED, ENGINE_DIED. */
int32_t minipaged_engine_stats(minipaged_engine *engine, minipaged_stats *stats);

/* All that the Python class EngineStats holds, as a JSON object (which has more than minipaged_stats).
 * Errors: as minipaged_engine_stats, and BUFFER. */
int32_t minipaged_engine_stats_json(minipaged_engine *engine, char *buffer, size_t capacity, size_t *length);

/* Step mode: admit what was submitted and cancelled, compute one step, run the callbacks that are due, all
 * on this thread. Returns MINIPAGED_DONE if there was nothing to do.
 * Errors: ENGINE, FORKED, MODE, BUSY (inside a callback, or another thread is in it), ENGINE_DIED. */
int32_t minipaged_engine_step(minipaged_engine *engine);

/* ---- text and tokens ------------------------------------------------------------------------------- */

/* Token ids of a text; add_special_tokens other than 0 adds BOS and such, as for a prompt.
 * Errors: ARGUMENT, ENGINE, FORKED, UTF8, BUFFER, TOKENIZER. */
int32_t minipaged_tokenize(minipaged_engine *engine, const char *text, size_t text_length,
                           int32_t add_special_tokens, int32_t *token_ids, size_t capacity, size_t *num_tokens);

/* The text of tokens. Errors: ARGUMENT, ENGINE, FORKED, BUFFER, TOKEN_RANGE. */
int32_t minipaged_detokenize(minipaged_engine *engine, const int32_t *token_ids, size_t num_tokens,
                             int32_t skip_special_tokens, char *buffer, size_t capacity, size_t *length);

/* The text that the model's chat template makes of a conversation.
 *   json  a JSON list of {"role": ..., "content": ...}, or an object {"messages": [...], "tools": [...],
 *         "add_generation_prompt": true}, of which the last two may be missing.
 * Errors: ARGUMENT (malformed JSON), ENGINE, FORKED, UTF8, BUFFER, TOKENIZER (the model has no template). */
int32_t minipaged_chat_prompt(minipaged_engine *engine, const char *json, size_t json_length, char *buffer,
                              size_t capacity, size_t *length);

/* ---- requests -------------------------------------------------------------------------------------- */

/* Submit a request, and return at once. What can be seen without the model is checked here: pointers,
 * sizes, UTF-8. Whatever else is wrong with it (parameters out of range, a prompt that is too long, an
 * unknown token) ends the request, alone, with that error: minipaged_wait returns it, the last chunk and
 * minipaged_request_info carry it.
 *   request   receives the number of the request, 0 on failure. Free it with minipaged_request_free.
 *   sampling  NULL for the model's defaults.
 *   options   NULL for the defaults: no callback, no stream.
 * Errors: ARGUMENT, STRUCT, ENGINE, FORKED, UTF8, MEMORY. */
int32_t minipaged_submit_text(minipaged_request *request, minipaged_engine *engine, const char *text,
                              size_t text_length, const minipaged_sampling *sampling,
                              const minipaged_request_options *options);

/* The same for a prompt of tokens. */
int32_t minipaged_submit_tokens(minipaged_request *request, minipaged_engine *engine, const int32_t *token_ids,
                                size_t num_tokens, const minipaged_sampling *sampling,
                                const minipaged_request_options *options);

/* The same for a conversation: json is what minipaged_chat_prompt takes. */
int32_t minipaged_submit_chat(minipaged_request *request, minipaged_engine *engine, const char *json,
                              size_t json_length, const minipaged_sampling *sampling,
                              const minipaged_request_options *options);

/* Ask a request to end; it does so soon, with MINIPAGED_FINISH_ABORT and what it has until then. A request
 * that has ended is left as it is. Errors: ENGINE, FORKED, NOT_FOUND. */
int32_t minipaged_cancel(minipaged_engine *engine, minipaged_request request);

/* Wait until a request has ended, and its last callback, if it has one, has returned. Returns MINIPAGED_OK (aborted requests too), MINIPAGED_TIMEOUT, or the
 * error that ended the request.
 *   timeout_ms  MINIPAGED_FOREVER, or 0 to only look. In step mode another thread has to step meanwhile.
 * Errors: ENGINE, FORKED, NOT_FOUND, BUSY (inside a callback), and every error a request can end with. */
int32_t minipaged_wait(minipaged_engine *engine, minipaged_request request, int64_t timeout_ms);

/* The number of some request without callback that has output not read yet, or has ended, since it was last
 * returned from here; MINIPAGED_TIMEOUT if there is none within the time. What a server polls.
 * Errors: ARGUMENT, ENGINE, FORKED, BUSY (inside a callback). */
int32_t minipaged_next(minipaged_request *request, minipaged_engine *engine, int64_t timeout_ms);

/* Read new output of a request submitted without callback (with stream = 1: while it is generated). Each
 * call returns output of one choice, as much as the buffers take and as there is; every token and every
 * byte is returned once. Returns MINIPAGED_OK, MINIPAGED_TIMEOUT, or MINIPAGED_DONE when the request has
 * ended and everything was read; if it ended with an error, that error instead.
 * Errors: as minipaged_wait; ARGUMENT, STRUCT, BUFFER (a buffer under the minimum; or it has a callback). */
int32_t minipaged_request_read(minipaged_engine *engine, minipaged_request request, minipaged_reader *reader,
                               int64_t timeout_ms);

/* The state of a request, at any time. Errors: ARGUMENT, STRUCT, ENGINE, FORKED, NOT_FOUND. */
int32_t minipaged_request_poll(minipaged_engine *engine, minipaged_request request, minipaged_request_info *info);

/* Give a request back; its number is dead then. One that has not ended is cancelled. Its callback is not
 * called again after this returns, but it may be running at that moment on the dispatcher thread:
 * free_user_data tells when it is not.
 * Errors: ENGINE, FORKED, NOT_FOUND. */
int32_t minipaged_request_free(minipaged_engine *engine, minipaged_request request);

/* ---- results, once a request has ended --------------------------------------------------------------
 * choice counts from 0; with best_of and beam search the best comes first. A request that was refused has
 * no choices. Errors of all: ARGUMENT, ENGINE, FORKED, NOT_FOUND, NOT_FINISHED; BUFFER; STRUCT. */

int32_t minipaged_request_choice(minipaged_engine *engine, minipaged_request request, int32_t choice,
                                 minipaged_choice_info *info);

int32_t minipaged_request_text(minipaged_engine *engine, minipaged_request request, int32_t choice, char *buffer,
                               size_t capacity, size_t *length);

int32_t minipaged_request_tokens(minipaged_engine *engine, minipaged_request request, int32_t choice,
                                 int32_t *token_ids, size_t capacity, size_t *num_tokens);

/* The stop string that ended a choice; "" if none did. */
int32_t minipaged_request_stop_string(minipaged_engine *engine, minipaged_request request, int32_t choice,
                                      char *buffer, size_t capacity, size_t *length);

/* Log-probabilities at one position of a choice, or of the prompt (choice MINIPAGED_PROMPT): the token that
 * is there first, then the likeliest ones in order (without repeating it). None where they were not asked
 * for, beyond the end, and for the first token of a prompt. Also while the request runs, for what was given
 * out already: never NOT_FINISHED. */
int32_t minipaged_request_logprobs(minipaged_engine *engine, minipaged_request request, int32_t choice,
                                   size_t position, minipaged_logprob *logprobs, size_t capacity, size_t *count);

/* The text of the error that ended a request; "" if none did (yet: never NOT_FINISHED). */
int32_t minipaged_request_error(minipaged_engine *engine, minipaged_request request, char *buffer, size_t capacity,
                                size_t *length);

/* ---- log ------------------------------------------------------------------------------------------- */

/* Have messages of at least this level (MINIPAGED_LOG_*) delivered to callback: on the dispatcher thread of
 * an engine, or on the calling thread inside create, step and other calls; one at a time. NULL ends it: after
 * this returns no call begins, and none is running unless this is called from the callback itself.
 * One callback a process. Errors: FORKED. */
int32_t minipaged_set_log_callback(minipaged_log_fn callback, int32_t level, void *user_data);

#ifdef __cplusplus
}
#endif

#endif /* MINIPAGED_H */
