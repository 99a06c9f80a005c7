/* Speed of the library. Usage: timing MODEL, then commands on stdin, each answered by one line:
 *   round USERS LENGTH       seconds for USERS requests of LENGTH tokens at once, waited for
 *   latency USERS SUBMITS    beside USERS busy streams: submit, and from sampling a token to its callback */
#define _GNU_SOURCE
#include <minipaged.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MAX_SAMPLES = 1 << 20, MAX_USERS = 256, MAX_SUBMITS = 4096 };

static minipaged_engine *engine;
static double delays[MAX_SAMPLES]; /* microseconds from sampling a token to its callback */
static long num_delays, num_late; /* late: a newer token was there when its callback came */

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_quantiles(const char *name, double *samples, long count)
{
    qsort(samples, (size_t)count, sizeof *samples, by_value);
    if (count)
        printf("\"%s\": {\"count\": %ld, \"median\": %.1f, \"p99\": %.1f, \"max\": %.1f}", name, count,
               samples[count / 2], samples[count * 99 / 100], samples[count - 1]);
}

static void fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, minipaged_error());
    exit(1);
}

static int32_t on_busy(const minipaged_chunk *chunk, void *user_data)
{
    int64_t now = now_ns();
    (void)user_data;
    if (chunk->num_tokens && num_delays < MAX_SAMPLES) {
        delays[num_delays++] = (double)(now - chunk->produced_ns) / 1e3;
        num_late += (long)chunk->num_tokens - 1;
    }
    return 0;
}

static int32_t on_first(const minipaged_chunk *chunk, void *user_data)
{
    int64_t *arrived = (int64_t *)user_data;
    if (chunk->num_tokens && !*arrived)
        *arrived = now_ns();
    return 0;
}

static void submit(minipaged_request *request, int number, int length, minipaged_chunk_fn callback, void *user_data)
{
    minipaged_sampling sampling = MINIPAGED_SAMPLING_INIT;
    minipaged_request_options options = MINIPAGED_REQUEST_OPTIONS_INIT;
    char text[512];
    sprintf(text, "Letter %d. It was a fine morning in the old town, and the people went about their work as they "
                  "had always done, when something unusual happened.", number);
    sampling.temperature = 0;
    sampling.max_tokens = length;
    sampling.ignore_eos = 1;
    options.callback = callback;
    options.user_data = user_data;
    if (minipaged_submit_text(request, engine, text, MINIPAGED_ZSTRING, &sampling, &options))
        fail("submit");
}

static void wait_and_free(minipaged_request request)
{
    if (minipaged_wait(engine, request, MINIPAGED_FOREVER) || minipaged_request_free(engine, request))
        fail("wait");
}

static void round_of(int users, int length)
{
    minipaged_request requests[MAX_USERS];
    int64_t started = now_ns();
    int i;
    for (i = 0; i < users; i++)
        submit(&requests[i], i, length, NULL, NULL);
    for (i = 0; i < users; i++)
        wait_and_free(requests[i]);
    printf("%.6f\n", (double)(now_ns() - started) / 1e9);
}

static void latency(int users, int submits)
{
    static double took[MAX_SUBMITS], first[MAX_SUBMITS];
    static int64_t arrived[MAX_SUBMITS];
    minipaged_request busy[MAX_USERS], requests[MAX_SUBMITS];
    int i;
    long num_first = 0;
    num_delays = num_late = 0;
    for (i = 0; i < users; i++)
        submit(&busy[i], i, 900, on_busy, NULL);
    usleep(1000000);
    for (i = 0; i < submits; i++) {
        int64_t started = now_ns();
        arrived[i] = 0;
        submit(&requests[i], users + i, 1, on_first, &arrived[i]);
        took[i] = (double)(now_ns() - started) / 1e3;
        usleep(50000);
    }
    for (i = 0; i < submits; i++) {
        minipaged_request_info info = MINIPAGED_REQUEST_INFO_INIT;
        if (minipaged_wait(engine, requests[i], MINIPAGED_FOREVER) ||
            minipaged_request_poll(engine, requests[i], &info))
            fail("first token");
        first[num_first++] = (double)(arrived[i] - info.first_token_ns) / 1e3;
        minipaged_request_free(engine, requests[i]);
    }
    for (i = 0; i < users; i++)
        if (minipaged_cancel(engine, busy[i]))
            fail("cancel");
    for (i = 0; i < users; i++)
        wait_and_free(busy[i]);
    printf("{");
    print_quantiles("submit_us", took, submits);
    printf(", ");
    print_quantiles("first_token_to_callback_us", first, num_first);
    printf(", ");
    print_quantiles("token_to_callback_us", delays, num_delays);
    printf(", \"late\": %ld}\n", num_late);
}

int main(int argc, char **argv)
{
    minipaged_engine_options options = MINIPAGED_ENGINE_OPTIONS_INIT;
    char what[16];
    int users, number;
    if (argc < 2)
        return 64;
    options.max_num_seqs = 64;
    options.max_model_len = 1024;
    options.enable_prefix_caching = 0;
    options.json = argc > 2 ? argv[2] : NULL;
    if (minipaged_engine_create(&engine, argv[1], &options))
        fail("create");
    while (scanf("%15s %d %d", what, &users, &number) == 3) {
        if (!strcmp(what, "round") && users <= MAX_USERS)
            round_of(users, number);
        else if (!strcmp(what, "latency") && users <= MAX_USERS && number <= MAX_SUBMITS)
            latency(users, number);
        else
            return 64;
        fflush(stdout);
    }
    return minipaged_engine_destroy(engine) != 0;
}
