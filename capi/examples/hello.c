/* Continue a text. Usage: hello MODEL [PROMPT]   (the model "tiny" needs no download) */
#include <minipaged.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv)
{
    minipaged_engine *engine = NULL;
    minipaged_request request;
    minipaged_sampling sampling = MINIPAGED_SAMPLING_INIT;
    const char *prompt = argc > 2 ? argv[2] : "Where is the king?";
    char text[4096];
    int failed;

    if (argc < 2) {
        fprintf(stderr, "usage: %s MODEL [PROMPT]\n", argv[0]);
        return 2;
    }
    sampling.temperature = 0;
    sampling.max_tokens = 40;
    failed = minipaged_engine_create(&engine, argv[1], NULL) ||
             minipaged_submit_text(&request, engine, prompt, MINIPAGED_ZSTRING, &sampling, NULL) ||
             minipaged_wait(engine, request, MINIPAGED_FOREVER) ||
             minipaged_request_text(engine, request, 0, text, sizeof text, NULL);
    if (failed)
        fprintf(stderr, "hello: %s\n", minipaged_error());
    else
        printf("%s%s\n", prompt, text);
    minipaged_engine_destroy(engine); /* frees the request too */
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
