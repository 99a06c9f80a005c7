/* What a process can do to the library besides calling it well. Usage: lifecycle WHAT MODEL [N] */
#define _GNU_SOURCE
#include <minipaged.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *model;

static minipaged_engine *create(void)
{
    minipaged_engine *engine = NULL;
    minipaged_engine_options options = MINIPAGED_ENGINE_OPTIONS_INIT;
    int32_t status;
    options.device = "reference";
    options.num_blocks = 64;
    status = minipaged_engine_create(&engine, model, &options);
    if (status)
        printf("%s: %s\n", minipaged_status_name(status), minipaged_error());
    return engine;
}

static int32_t submit(minipaged_engine *engine, minipaged_request *request, minipaged_chunk_fn callback)
{
    minipaged_sampling sampling = MINIPAGED_SAMPLING_INIT;
    minipaged_request_options options = MINIPAGED_REQUEST_OPTIONS_INIT;
    sampling.temperature = 0;
    sampling.max_tokens = 200;
    sampling.ignore_eos = 1;
    options.callback = callback;
    return minipaged_submit_text(request, engine, "ROMEO:\n", MINIPAGED_ZSTRING, &sampling, &options);
}

/* Every call of a forked child is refused; the child ends in order, and the parent goes on. */
static int fork_it(void)
{
    minipaged_engine *engine = create(), *other = NULL;
    minipaged_request request, second;
    minipaged_stats stats = MINIPAGED_STATS_INIT;
    int status = 0;
    pid_t child;
    if (!engine || submit(engine, &request, NULL))
        return 1;
    child = fork();
    if (child == 0) {
        int ok = submit(engine, &second, NULL) == MINIPAGED_ERROR_FORKED &&
                 minipaged_wait(engine, request, MINIPAGED_FOREVER) == MINIPAGED_ERROR_FORKED &&
                 minipaged_cancel(engine, request) == MINIPAGED_ERROR_FORKED &&
                 minipaged_request_free(engine, request) == MINIPAGED_ERROR_FORKED &&
                 minipaged_engine_stats(engine, &stats) == MINIPAGED_ERROR_FORKED &&
                 minipaged_engine_step(engine) == MINIPAGED_ERROR_FORKED &&
                 minipaged_next(&second, engine, MINIPAGED_FOREVER) == MINIPAGED_ERROR_FORKED &&
                 minipaged_tokenize(engine, "x", 1, 0, NULL, 0, NULL) == MINIPAGED_ERROR_FORKED &&
                 minipaged_engine_create(&other, model, NULL) == MINIPAGED_ERROR_FORKED &&
                 minipaged_set_log_callback(NULL, 0, NULL) == MINIPAGED_ERROR_FORKED &&
                 minipaged_engine_destroy(engine) == MINIPAGED_ERROR_FORKED && strstr(minipaged_error(), "fork");
        exit(ok ? 0 : 3);
    }
    if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status))
        return 2;
    if (minipaged_wait(engine, request, MINIPAGED_FOREVER) || minipaged_engine_destroy(engine))
        return 3;
    return 0;
}

/* A fork before the first engine is an ordinary process. */
static int fork_first(void)
{
    int status = 0;
    pid_t child = fork();
    if (child == 0) {
        minipaged_engine *engine = create();
        exit(engine && !minipaged_engine_destroy(engine) ? 0 : 3);
    }
    return child < 0 || waitpid(child, &status, 0) != child || status ? 1 : 0;
}

static int32_t exit_now(const minipaged_chunk *chunk, void *user_data)
{
    (void)chunk;
    (void)user_data;
    exit(0);
}

static int32_t ignore(const minipaged_chunk *chunk, void *user_data)
{
    (void)chunk;
    (void)user_data;
    return 0;
}

static void *wait_for_ever(void *argument)
{
    void **both = (void **)argument;
    minipaged_request request;
    memcpy(&request, both[1], sizeof request);
    minipaged_wait((minipaged_engine *)both[0], request, MINIPAGED_FOREVER);
    pthread_testcancel();
    return NULL;
}

/* A thread that is cancelled while it waits keeps nothing that others need. */
static int cancel_a_waiting_thread(void)
{
    minipaged_engine *engine = create();
    minipaged_request request, next;
    void *both[2], *ended;
    pthread_t thread;
    if (!engine || submit(engine, &request, NULL))
        return 1;
    both[0] = engine;
    both[1] = &request;
    if (pthread_create(&thread, NULL, wait_for_ever, both))
        return 2;
    usleep(2000);
    pthread_cancel(thread);
    if (submit(engine, &next, NULL) || minipaged_wait(engine, next, MINIPAGED_FOREVER) ||
        minipaged_wait(engine, request, MINIPAGED_FOREVER))
        return 3;
    if (pthread_join(thread, &ended) || ended != PTHREAD_CANCELED)
        return 4;
    return minipaged_engine_destroy(engine) != 0;
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

/* Create and destroy, two engines at a time, with something running; memory and threads must not grow. */
static int again_and_again(int times)
{
    long half = 0, end;
    int i;
    for (i = 0; i < times; i++) {
        minipaged_engine *one = create(), *two = create();
        minipaged_request request;
        if (!one || !two || submit(one, &request, ignore) || submit(two, &request, NULL) ||
            minipaged_engine_destroy(i % 2 ? one : two) || minipaged_engine_destroy(i % 2 ? two : one))
            return 1;
        if (i == times / 2)
            half = resident_kib();
    }
    end = resident_kib();
    printf("resident %ld KiB at half time, %ld KiB at the end (%+.2f%%)\n", half, end,
           100.0 * (double)(end - half) / (double)half);
    return times >= 50 && (double)(end - half) > 0.01 * (double)half;
}

int main(int argc, char **argv)
{
    const char *what = argc > 2 ? argv[1] : "";
    minipaged_engine *engine;
    minipaged_request request;
    if (argc < 3)
        return 64;
    model = argv[2];
    if (!strcmp(what, "fork"))
        return fork_it();
    if (!strcmp(what, "fork-first"))
        return fork_first();
    if (!strcmp(what, "cancel"))
        return cancel_a_waiting_thread();
    if (!strcmp(what, "again"))
        return again_and_again(argc > 3 ? atoi(argv[3]) : 10);
    engine = create();
    if (!strcmp(what, "create"))
        return engine ? minipaged_engine_destroy(engine) != 0 : 1;
    if (!strcmp(what, "create-twice")) /* a second attempt gives the same answer */
        return create() || engine ? 0 : 1;
    if (!engine)
        return 1;
    if (!strcmp(what, "exit")) { /* with everything still there */
        int i;
        for (i = 0; i < 8; i++)
            if (submit(engine, &request, i % 2 ? ignore : NULL))
                return 2;
        usleep(30000);
        exit(0);
    }
    if (!strcmp(what, "exit-in-callback")) {
        if (submit(engine, &request, exit_now))
            return 2;
        minipaged_wait(engine, request, MINIPAGED_FOREVER);
        sleep(20); /* the callback ends the process meanwhile */
        return 3;
    }
    return 64;
}
