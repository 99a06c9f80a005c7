/* 64 threads, one engine: all their requests are batched together.
 * Usage: many_threads MODEL [THREADS [REQUESTS_EACH]] */
#define _POSIX_C_SOURCE 200809L
#include <minipaged.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct worker {
    pthread_t thread;
    minipaged_engine *engine;
    int number, num_requests;
    int failed;
    long num_tokens;
} worker;

/* One request after the other, each waited for: as a server's connection would. */
static void *work(void *argument)
{
    worker *self = (worker *)argument;
    int i;
    for (i = 0; i < self->num_requests && !self->failed; i++) {
        minipaged_sampling sampling = MINIPAGED_SAMPLING_INIT;
        minipaged_request_info info = MINIPAGED_REQUEST_INFO_INIT;
        minipaged_request request = 0;
        char prompt[64];
        sprintf(prompt, "SCENE %d. Enter %d lords.\n", self->number, i);
        sampling.temperature = 0;
        sampling.max_tokens = 8 + (self->number * 7 + i * 3) % 24;
        if (minipaged_submit_text(&request, self->engine, prompt, MINIPAGED_ZSTRING, &sampling, NULL) ||
            minipaged_wait(self->engine, request, MINIPAGED_FOREVER) ||
            minipaged_request_poll(self->engine, request, &info)) {
            fprintf(stderr, "thread %d: %s\n", self->number, minipaged_error());
            self->failed = 1;
        }
        self->num_tokens += (long)info.num_generated_tokens;
        if (request)
            minipaged_request_free(self->engine, request);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    minipaged_engine *engine = NULL;
    minipaged_stats stats = MINIPAGED_STATS_INIT;
    int num_threads = argc > 2 ? atoi(argv[2]) : 64, num_requests = argc > 3 ? atoi(argv[3]) : 4;
    int started = 0, failed = 0, i;
    long num_tokens = 0;
    worker *workers;

    if (argc < 2 || num_threads < 1) {
        fprintf(stderr, "usage: %s MODEL [THREADS [REQUESTS_EACH]]\n", argv[0]);
        return 2;
    }
    workers = (worker *)calloc((size_t)num_threads, sizeof *workers);
    if (!workers || minipaged_engine_create(&engine, argv[1], NULL)) {
        fprintf(stderr, "many_threads: %s\n", workers ? minipaged_error() : "out of memory");
        free(workers);
        return EXIT_FAILURE;
    }
    for (; started < num_threads; started++) {
        worker *w = &workers[started];
        w->engine = engine;
        w->number = started;
        w->num_requests = num_requests;
        if (pthread_create(&w->thread, NULL, work, w))
            break;
    }
    for (i = 0; i < started; i++) {
        pthread_join(workers[i].thread, NULL);
        failed |= workers[i].failed;
        num_tokens += workers[i].num_tokens;
    }
    failed |= started < num_threads;
    if (!failed && minipaged_engine_stats(engine, &stats)) {
        fprintf(stderr, "many_threads: %s\n", minipaged_error());
        failed = 1;
    }
    if (!failed)
        printf("%d threads, %lld requests, %ld tokens in %lld steps; %lld requests and %lld blocks left over\n",
               started, (long long)stats.num_requests_finished, num_tokens, (long long)stats.num_steps,
               (long long)stats.num_requests_held, (long long)stats.num_blocks_used);
    failed |= stats.num_requests_held || stats.num_blocks_used;
    minipaged_engine_destroy(engine);
    free(workers);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
