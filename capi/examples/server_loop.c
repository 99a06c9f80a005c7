/* The loop of a server that never blocks on one client: requests come in while others run, and one thread
 * reads whichever has new output. Here each line of stdin is a client's request.
 * Usage: server_loop MODEL < prompts.txt */
#include <minipaged.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_RUNNING = 32 };

typedef struct client {
    minipaged_request request; /* 0: this place is free */
    int number;
} client;

static client *find(client *clients, minipaged_request request)
{
    int i;
    for (i = 0; i < MAX_RUNNING; i++)
        if (clients[i].request == request)
            return &clients[i];
    return NULL;
}

/* Submit the next line of stdin. 1: done; 0: there is none; -1: failed. */
static int accept_client(minipaged_engine *engine, client *place, int number)
{
    minipaged_sampling sampling = MINIPAGED_SAMPLING_INIT;
    minipaged_request_options options = MINIPAGED_REQUEST_OPTIONS_INIT;
    char line[4096];
    do {
        if (!fgets(line, sizeof line, stdin))
            return 0;
        line[strcspn(line, "\n")] = 0;
    } while (!*line);
    sampling.temperature = 0;
    sampling.max_tokens = 24;
    options.stream = 1;
    if (minipaged_submit_text(&place->request, engine, line, MINIPAGED_ZSTRING, &sampling, &options))
        return -1;
    place->number = number;
    return 1;
}

/* Pass on what is there. 1: the client is served; 0: more will come; -1: its request failed. */
static int serve(minipaged_engine *engine, const client *c)
{
    char text[256];
    minipaged_reader reader = MINIPAGED_READER_INIT;
    int32_t status;
    reader.text = text;
    reader.text_capacity = sizeof text;
    while ((status = minipaged_request_read(engine, c->request, &reader, 0)) == MINIPAGED_OK)
        if (reader.text_length)
            printf("[%d] %s\n", c->number, text);
    return status == MINIPAGED_TIMEOUT ? 0 : status == MINIPAGED_DONE ? 1 : -1;
}

int main(int argc, char **argv)
{
    minipaged_engine *engine = NULL;
    client clients[MAX_RUNNING], *c;
    int num_running = 0, num_accepted = 0, num_failed = 0, more = 1, served;
    int32_t status;

    if (argc != 2) {
        fprintf(stderr, "usage: %s MODEL < prompts.txt\n", argv[0]);
        return 2;
    }
    memset(clients, 0, sizeof clients);
    if (minipaged_engine_create(&engine, argv[1], NULL)) {
        fprintf(stderr, "server_loop: %s\n", minipaged_error());
        return EXIT_FAILURE;
    }
    for (;;) {
        minipaged_request request;
        while (more > 0 && num_running < MAX_RUNNING) {
            more = accept_client(engine, find(clients, 0), num_accepted);
            num_running += more > 0;
            num_accepted += more > 0;
        }
        if (more < 0 || (!more && !num_running))
            break;
        status = minipaged_next(&request, engine, 1000); /* a real server polls its sockets here too */
        if (status == MINIPAGED_TIMEOUT)
            continue;
        if (status) {
            more = -1;
            break;
        }
        c = find(clients, request);
        if (!c || (served = serve(engine, c)) == 0)
            continue;
        if (served < 0) { /* this client's problem alone */
            fprintf(stderr, "[%d] %s\n", c->number, minipaged_error());
            num_failed++;
        }
        minipaged_request_free(engine, request);
        c->request = 0;
        num_running--;
    }
    if (more < 0)
        fprintf(stderr, "server_loop: %s\n", minipaged_error());
    printf("%d requests served, %d failed\n", num_accepted - num_failed, num_failed);
    minipaged_engine_destroy(engine);
    return more < 0 || num_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
