/* Many threads, random lengths, cancels, early frees and destroys: every request ends exactly once, with the
 * tokens it has alone, and nothing is left over.
 * Usage: soak MODEL SECONDS [THREADS [REQUESTS]]   (SECONDS 0: one round; else memory of the second half is
 * compared with that at its beginning; a process that is stopped does not age meanwhile) */
#define _GNU_SOURCE
#include <minipaged.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { NUM_PROMPTS = 24, MAX_LENGTH = 40 };

static minipaged_engine *engine;
static const char *model;
static int num_requests;
static int32_t alone[NUM_PROMPTS][MAX_LENGTH];
static int num_failures, num_user_data, num_ends;

#define FAIL(...)                                                                                              \
    do {                                                                                                       \
        __atomic_fetch_add(&num_failures, 1, __ATOMIC_SEQ_CST);                                                \
        fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);                                                        \
        fprintf(stderr, __VA_ARGS__);                                                                          \
        fprintf(stderr, " (%s)\n", minipaged_error());                                                         \
    } while (0)

typedef struct listener { /* user data of one request */
    int prompt, num_tokens, num_ends, stop_at, num_chunks;
    int32_t tokens[MAX_LENGTH];
} listener;

static void free_listener(void *user_data)
{
    listener *self = (listener *)user_data;
    __atomic_fetch_add(&num_ends, self->num_ends, __ATOMIC_SEQ_CST);
    free(self);
    __atomic_fetch_sub(&num_user_data, 1, __ATOMIC_SEQ_CST);
}

static int32_t listen(const minipaged_chunk *chunk, void *user_data)
{
    listener *self = (listener *)user_data;
    uint64_t i;
    if (self->num_ends)
        FAIL("a chunk after the last one");
    for (i = 0; i < chunk->num_tokens; i++) {
        if (self->num_tokens >= MAX_LENGTH || chunk->token_ids[i] != alone[self->prompt][self->num_tokens])
            FAIL("prompt %d, token %d differs from alone", self->prompt, self->num_tokens);
        self->tokens[self->num_tokens++ % MAX_LENGTH] = chunk->token_ids[i];
    }
    self->num_ends += chunk->finished;
    return self->stop_at && ++self->num_chunks >= self->stop_at;
}

static int32_t submit(minipaged_engine *to, minipaged_request *request, int prompt, int length, listener *hears,
                      int auto_free)
{
    minipaged_sampling sampling = MINIPAGED_SAMPLING_INIT;
    minipaged_request_options options = MINIPAGED_REQUEST_OPTIONS_INIT;
    char text[64];
    sprintf(text, "ACT %d.\nEnter a lord, and %d others.\n", prompt % 5, prompt);
    sampling.max_tokens = length;
    sampling.ignore_eos = 1;
    sampling.temperature = prompt % 2 ? 0.9 : 0;
    sampling.has_seed = 1;
    sampling.seed = (uint64_t)prompt;
    options.stream = 1;
    if (hears) {
        hears->prompt = prompt;
        options.callback = listen;
        options.user_data = hears;
        options.free_user_data = free_listener;
        options.auto_free = auto_free;
    }
    return minipaged_submit_text(request, to, text, MINIPAGED_ZSTRING, &sampling, &options);
}

static listener *new_listener(void)
{
    listener *made = (listener *)calloc(1, sizeof *made);
    if (!made)
        abort();
    __atomic_fetch_add(&num_user_data, 1, __ATOMIC_SEQ_CST);
    return made;
}

static void check_tokens(minipaged_request request, int prompt, int length, int whole)
{
    int32_t tokens[MAX_LENGTH];
    size_t count = 0;
    int32_t status = minipaged_request_tokens(engine, request, 0, tokens, MAX_LENGTH, &count);
    if (status == MINIPAGED_ERROR_ARGUMENT && !whole)
        return; /* cancelled before its first token: it has no choices */
    if (status || count > (size_t)length || (whole && count != (size_t)length) ||
        memcmp(tokens, alone[prompt], count * sizeof *tokens))
        FAIL("prompt %d: %zu tokens of %d, or other ones than alone", prompt, count, length);
}

static void read_all(minipaged_request request, int prompt, int length)
{
    minipaged_reader reader = MINIPAGED_READER_INIT;
    int32_t tokens[3], status;
    char text[7];
    size_t done = 0, text_size = 0, whole = 0;
    reader.token_ids = tokens;
    reader.token_capacity = 3;
    reader.text = text;
    reader.text_capacity = sizeof text;
    while ((status = minipaged_request_read(engine, request, &reader, 600000)) == MINIPAGED_OK) {
        if (done + reader.num_tokens > (size_t)length ||
            memcmp(tokens, alone[prompt] + done, (size_t)reader.num_tokens * sizeof *tokens))
            FAIL("prompt %d: tokens read differ from alone", prompt);
        done += (size_t)reader.num_tokens;
        text_size += (size_t)reader.text_length;
    }
    minipaged_request_text(engine, request, 0, NULL, 0, &whole);
    if (status != MINIPAGED_DONE || done != (size_t)length || text_size != whole)
        FAIL("prompt %d: read %zu tokens of %d, %zu bytes of %zu, status %d", prompt, done, length, text_size, whole,
             status);
}

static void *work(void *argument)
{
    unsigned seed = (unsigned)(size_t)argument;
    int i;
    for (i = 0; i < num_requests; i++) {
        int prompt = rand_r(&seed) % NUM_PROMPTS, length = 1 + rand_r(&seed) % MAX_LENGTH;
        int kind = rand_r(&seed) % 8, heard = kind >= 4;
        listener *hears = heard ? new_listener() : NULL;
        minipaged_request request;
        int32_t status;
        if (kind == 5)
            hears->stop_at = 1 + rand_r(&seed) % 8;
        if (submit(engine, &request, prompt, length, hears, kind == 4)) {
            FAIL("submit");
            continue;
        }
        if (kind == 4) /* nobody waits: it frees itself */
            continue;
        if (kind == 1 || kind == 6) { /* cancel, maybe before it began, maybe after its end */
            usleep((unsigned)rand_r(&seed) % 20000);
            if (minipaged_cancel(engine, request))
                FAIL("cancel");
        } else if (kind == 2 || kind == 7) { /* free, whatever it is doing */
            usleep((unsigned)rand_r(&seed) % 20000);
            if (minipaged_request_free(engine, request))
                FAIL("free");
            if (minipaged_wait(engine, request, 0) != MINIPAGED_ERROR_NOT_FOUND)
                FAIL("a freed request is still known");
            continue;
        } else if (kind == 3) {
            read_all(request, prompt, length);
        }
        if ((status = minipaged_wait(engine, request, MINIPAGED_FOREVER)))
            FAIL("wait: %d", status);
        if (hears && hears->num_ends != 1)
            FAIL("%d last chunks", hears->num_ends);
        check_tokens(request, prompt, length, kind == 0 || kind == 3);
        if (minipaged_request_free(engine, request) || minipaged_request_free(engine, request) == MINIPAGED_OK)
            FAIL("free once, and only once");
    }
    return NULL;
}

/* An engine that is destroyed while its requests run and a thread waits. */
static void *wait_for(void *argument)
{
    minipaged_request *request = (minipaged_request *)argument;
    minipaged_engine *other;
    memcpy(&other, request + 1, sizeof other);
    minipaged_wait(other, *request, MINIPAGED_FOREVER); /* ended, freed or no engine: it has to return */
    return NULL;
}

static void destroy_early(void)
{
    struct {
        minipaged_request request;
        minipaged_engine *engine;
    } one;
    minipaged_engine_options options = MINIPAGED_ENGINE_OPTIONS_INIT;
    pthread_t thread;
    int i;
    options.device = "reference";
    options.num_blocks = 64;
    if (minipaged_engine_create(&one.engine, model, &options)) {
        FAIL("create");
        return;
    }
    for (i = 0; i < 8; i++)
        if (submit(one.engine, &one.request, i * 2, MAX_LENGTH, new_listener(), i % 2))
            FAIL("submit");
    if (submit(one.engine, &one.request, 0, MAX_LENGTH, NULL, 0))
        FAIL("submit");
    pthread_create(&thread, NULL, wait_for, &one);
    usleep(10000);
    if (minipaged_engine_destroy(one.engine))
        FAIL("destroy");
    if (minipaged_engine_destroy(one.engine) != MINIPAGED_ERROR_ENGINE)
        FAIL("destroyed twice");
    pthread_join(thread, NULL);
}

static int tenths; /* of seconds that this process had */

static void *grow_older(void *unused)
{
    for (;;) {
        usleep(100000);
        __atomic_store_n(&tenths, __atomic_load_n(&tenths, __ATOMIC_RELAXED) + 1, __ATOMIC_RELAXED);
    }
    return unused;
}

static double age(void)
{
    return __atomic_load_n(&tenths, __ATOMIC_RELAXED) / 10.0;
}

static long resident_kib(void)
{
    long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (!file || fscanf(file, "%*d %ld", &pages) != 1)
        pages = 0;
    if (file)
        fclose(file);
    return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

static void measure_alone(void)
{
    int prompt;
    for (prompt = 0; prompt < NUM_PROMPTS; prompt++) {
        minipaged_request request;
        size_t count = 0;
        if (submit(engine, &request, prompt, MAX_LENGTH, NULL, 0) ||
            minipaged_wait(engine, request, MINIPAGED_FOREVER) ||
            minipaged_request_tokens(engine, request, 0, alone[prompt], MAX_LENGTH, &count) ||
            count != MAX_LENGTH || minipaged_request_free(engine, request))
            FAIL("alone");
    }
}

static void round_of(int num_threads, int number)
{
    pthread_t threads[256];
    minipaged_stats stats = MINIPAGED_STATS_INIT;
    int i;
    for (i = 0; i < num_threads; i++)
        pthread_create(&threads[i], NULL, work, (void *)(size_t)(number * 1000 + i + 1));
    destroy_early();
    for (i = 0; i < num_threads; i++)
        pthread_join(threads[i], NULL);
    for (i = 0; i < 1000; i++) { /* what was freed or frees itself may need a moment to end */
        if (minipaged_engine_stats(engine, &stats))
            FAIL("stats");
        if (!stats.num_requests_held && !stats.num_blocks_used && !__atomic_load_n(&num_user_data, __ATOMIC_SEQ_CST))
            break;
        usleep(10000);
    }
    if (stats.num_requests_held || stats.num_blocks_used || num_user_data)
        FAIL("left over: %lld requests, %lld blocks, %d user data", (long long)stats.num_requests_held,
             (long long)stats.num_blocks_used, num_user_data);
}

int main(int argc, char **argv)
{
    double seconds = argc > 2 ? atof(argv[2]) : 0;
    int num_threads = argc > 3 ? atoi(argv[3]) : 64, number = 0;
    minipaged_engine_options options = MINIPAGED_ENGINE_OPTIONS_INIT;
    pthread_t clock;
    long half = 0, end;
    if (argc < 2 || num_threads < 1 || num_threads > 256)
        return 2;
    model = argv[1];
    num_requests = argc > 4 ? atoi(argv[4]) : 20;
    options.device = getenv("SOAK_DEVICE") ? getenv("SOAK_DEVICE") : "reference";
    options.num_blocks = 128; /* too few for 64 at once: some wait, some are preempted */
    options.json = "{\"check_integrity\": true}";
    if (minipaged_engine_create(&engine, model, &options)) {
        fprintf(stderr, "%s\n", minipaged_error());
        return 1;
    }
    measure_alone();
    pthread_create(&clock, NULL, grow_older, NULL);
    do {
        round_of(num_threads, ++number);
        end = resident_kib();
        if (!half && age() >= seconds / 2)
            half = end;
        if (getenv("SOAK_VERBOSE"))
            fprintf(stderr, "%d rounds, %.0f s, resident %ld KiB\n", number, age(), end);
    } while (age() < seconds && !num_failures);
    if (minipaged_engine_destroy(engine))
        FAIL("destroy");
    printf("%d rounds of %d threads x %d requests, %d failures; resident %ld KiB at half time, %ld KiB at the end "
           "(%+.2f%%)\n",
           number, num_threads, num_requests, num_failures, half, end, 100.0 * (double)(end - half) / (double)half);
    if (seconds >= 60 && (double)(end - half) > 0.01 * (double)half)
        FAIL("memory grew by more than 1%% in the second half");
    return num_failures ? 1 : 0;
}
