/* Talk with a model. Usage: chat MODEL   (Ctrl-C stops an answer, Ctrl-D leaves)
 *
 * Answers are streamed by callback. For a model without chat template the text itself is continued. */
#define _POSIX_C_SOURCE 200809L
#include <minipaged.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static volatile sig_atomic_t interrupted;

static void on_interrupt(int number)
{
    (void)number;
    interrupted = 1;
}

static int32_t on_chunk(const minipaged_chunk *chunk, void *user_data)
{
    (void)user_data;
    fwrite(chunk->text, 1, (size_t)chunk->text_length, stdout);
    fflush(stdout);
    return 0;
}

/* The conversation so far, as JSON text: a growing list of messages, without its last bracket. */
typedef struct conversation {
    char *json;
    size_t size;
} conversation;

static int append(conversation *c, const char *text)
{
    size_t length = strlen(text);
    char *larger = (char *)realloc(c->json, c->size + length + 1);
    if (!larger)
        return 0;
    memcpy(larger + c->size, text, length + 1);
    c->json = larger;
    c->size += length;
    return 1;
}

static int append_message(conversation *c, const char *role, const char *text)
{
    char escaped[8];
    int ok = append(c, c->size ? ", {\"role\": \"" : "[{\"role\": \"") && append(c, role) &&
             append(c, "\", \"content\": \"");
    for (; ok && *text; text++) {
        if ((unsigned char)*text < 0x20 || *text == '"' || *text == '\\')
            sprintf(escaped, "\\u%04x", (unsigned)(unsigned char)*text);
        else
            sprintf(escaped, "%c", *text);
        ok = append(c, escaped);
    }
    return ok && append(c, "\"}");
}

/* Submit the conversation (or, without template, the last line) and wait, looking for Ctrl-C now and then. */
static int answer(minipaged_engine *engine, conversation *c, const char *line, int has_template)
{
    minipaged_sampling sampling = MINIPAGED_SAMPLING_INIT;
    minipaged_request_options options = MINIPAGED_REQUEST_OPTIONS_INIT;
    minipaged_request request;
    int32_t status;
    size_t length;
    char *text, *prompt;

    sampling.max_tokens = 200;
    options.callback = on_chunk;
    if (has_template) {
        prompt = (char *)malloc(c->size + 2);
        if (!prompt)
            return 0;
        memcpy(prompt, c->json, c->size);
        memcpy(prompt + c->size, "]", 2);
        status = minipaged_submit_chat(&request, engine, prompt, MINIPAGED_ZSTRING, &sampling, &options);
        free(prompt);
    } else {
        status = minipaged_submit_text(&request, engine, line, MINIPAGED_ZSTRING, &sampling, &options);
    }
    if (status)
        return 0;
    interrupted = 0;
    while ((status = minipaged_wait(engine, request, 50)) == MINIPAGED_TIMEOUT)
        if (interrupted)
            minipaged_cancel(engine, request);
    if (status == MINIPAGED_OK && (status = minipaged_request_text(engine, request, 0, NULL, 0, &length)) == 0) {
        text = (char *)malloc(length + 1);
        if (!text || minipaged_request_text(engine, request, 0, text, length + 1, NULL) ||
            !append_message(c, "assistant", text))
            status = MINIPAGED_ERROR_MEMORY;
        free(text);
    }
    minipaged_request_free(engine, request);
    printf("\n");
    return status == MINIPAGED_OK;
}

int main(int argc, char **argv)
{
    minipaged_engine *engine = NULL;
    minipaged_model_info info = MINIPAGED_MODEL_INFO_INIT;
    conversation c = {NULL, 0};
    struct sigaction action;
    char line[4096];
    int ok;

    if (argc != 2) {
        fprintf(stderr, "usage: %s MODEL\n", argv[0]);
        return 2;
    }
    memset(&action, 0, sizeof action);
    action.sa_handler = on_interrupt;
    sigaction(SIGINT, &action, NULL);
    ok = minipaged_engine_create(&engine, argv[1], NULL) == 0 && minipaged_engine_model_info(engine, &info) == 0;
    while (ok) {
        printf("> ");
        fflush(stdout);
        if (!fgets(line, sizeof line, stdin)) {
            if (!interrupted)
                break;
            interrupted = 0; /* Ctrl-C at the prompt: a new line, please */
            clearerr(stdin);
            printf("\n");
            continue;
        }
        line[strcspn(line, "\n")] = 0;
        if (*line)
            ok = append_message(&c, "user", line) && answer(engine, &c, line, info.has_chat_template);
    }
    if (!ok)
        fprintf(stderr, "chat: %s\n", *minipaged_error() ? minipaged_error() : "out of memory");
    printf("\n");
    free(c.json);
    minipaged_engine_destroy(engine);
    return ok ? EXIT_SUCCESS : EXIT_FAILURE;
}
