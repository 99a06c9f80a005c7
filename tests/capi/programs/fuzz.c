/* Random call sequences: whatever is called with whatever, in whatever order, is answered by a known status,
 * by a text where it is an error, and never by a crash.
 * Usage: fuzz MODEL SEQUENCES [SEED] */
#define _GNU_SOURCE
#include <minipaged.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NUM_ENGINES = 3, NUM_REQUESTS = 12 };

static const char *model;
static uint64_t state;
static minipaged_engine *engines[NUM_ENGINES]; /* live ones, one in step mode; NULL: none */
static minipaged_engine *stale;
static minipaged_request requests[NUM_REQUESTS]; /* of any engine, freed ones too */
static long calls[64], num_errors, num_callbacks;
static int num_failures;

static uint64_t draw(uint64_t limit)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (state >> 33) % limit;
}

static int one_in(uint64_t n)
{
    return draw(n) == 0;
}

static minipaged_engine *any_engine(void)
{
    if (one_in(12))
        return one_in(2) ? NULL : one_in(2) ? stale : (minipaged_engine *)(uintptr_t)(draw(1 << 20) << draw(40));
    return engines[draw(NUM_ENGINES)];
}

static minipaged_request any_request(void)
{
    if (one_in(10))
        return one_in(2) ? draw(4) : draw(1u << 30) << draw(34);
    return requests[draw(NUM_REQUESTS)];
}

static const char *any_text(size_t *length)
{
    static const char *const texts[] = {"ROMEO:\n", "", "x", "\xff\xfe", "\xed\xa0\x80", "caf\xc3\xa9", "[1]", "{}",
                                        "[{\"role\": \"user\", \"content\": \"hi\"}]", "{\"messages\": 3}",
                                        "{\"n\": 2}", "\"\\ud800\"", "[[[[[[[[", "{\"temperature\": 1e999}", "null"};
    const char *text = texts[draw(sizeof texts / sizeof *texts)];
    *length = one_in(3) ? draw(strlen(text) + 1) : MINIPAGED_ZSTRING;
    return one_in(15) ? NULL : text;
}

static int32_t any_int(void)
{
    static const int32_t values[] = {0, 1, 2, 3, -1, -2, 5, 16, 40, 1000, INT32_MAX, MINIPAGED_UNSET, INT32_MIN + 1};
    return values[draw(sizeof values / sizeof *values)];
}

static double any_double(void)
{
    static const double values[] = {0, 1, -1, 0.5, 2, 1e308, 1e-300, 100, -0.0, MINIPAGED_UNSET};
    double zero = 0;
    return one_in(20) ? 1 / zero : one_in(20) ? zero / zero : values[draw(sizeof values / sizeof *values)];
}

static uint32_t any_size(size_t size)
{
    return one_in(8) ? (uint32_t)(one_in(2) ? draw(size + 8) : draw(UINT32_MAX)) : (uint32_t)size;
}

static int32_t on_chunk(const minipaged_chunk *chunk, void *user_data)
{
    /* NULL where the options were those of a caller that does not know user_data */
    minipaged_engine *engine = user_data ? __atomic_load_n((minipaged_engine **)user_data, __ATOMIC_RELAXED) : NULL;
    __atomic_fetch_add(&num_callbacks, 1, __ATOMIC_RELAXED);
    if (chunk->struct_size != sizeof *chunk || !chunk->text || chunk->text[chunk->text_length] || !chunk->error)
        __atomic_fetch_add(&num_failures, 1, __ATOMIC_RELAXED);
    switch (chunk->request % 8) { /* calls back into the library, allowed or not */
    case 0:
        return 1;
    case 1:
        return minipaged_engine_destroy(engine) == MINIPAGED_OK && engine; /* BUSY, or the engine is gone */
    case 2:
        minipaged_wait(engine, chunk->request, MINIPAGED_FOREVER);
        break;
    case 3:
        minipaged_cancel(engine, chunk->request);
        break;
    case 4:
        minipaged_engine_step(engine);
        break;
    case 5:
        if (chunk->finished)
            minipaged_request_free(engine, chunk->request);
        break;
    }
    return 0;
}

static int32_t submit(void)
{
    static minipaged_engine *of[NUM_ENGINES]; /* user data must outlive the call */
    static const char *const stops[] = {"\n", "the", NULL, "\xc3", ""};
    static const int32_t ids[] = {1, 5, 1000000, -3, 44, 2, 7};
    static const double biases[] = {5, -100, 1e9};
    static const char *const kinds[] = {"regex", "json", "json_object", "choice", "grammar", "nonsense"};
    minipaged_sampling sampling = MINIPAGED_SAMPLING_INIT;
    minipaged_request_options options = MINIPAGED_REQUEST_OPTIONS_INIT;
    minipaged_engine *engine = any_engine();
    const minipaged_sampling *s = one_in(4) ? NULL : &sampling;
    const minipaged_request_options *o = one_in(4) ? NULL : &options;
    minipaged_request request, *to = one_in(30) ? NULL : &request;
    size_t length, place = draw(NUM_ENGINES);
    const char *text = any_text(&length);
    int32_t status;
    __atomic_store_n(&of[place], engine, __ATOMIC_RELAXED);
    sampling.struct_size = any_size(sizeof sampling);
    options.struct_size = any_size(sizeof options);
    if (sampling.struct_size > sizeof sampling)
        sampling.struct_size = sizeof sampling * 5000; /* refused before the tail is looked at */
    if (options.struct_size > sizeof options)
        options.struct_size = UINT32_MAX;
    sampling.max_tokens = one_in(3) ? any_int() : (int64_t)draw(20) + 1;
    if (one_in(3))
        sampling.temperature = any_double();
    if (one_in(6))
        sampling.n = any_int() % 5;
    if (one_in(8))
        sampling.logprobs = any_int();
    if (one_in(8))
        sampling.prompt_logprobs = any_int();
    if (one_in(8))
        sampling.top_p = any_double(), sampling.top_k = any_int(), sampling.repetition_penalty = any_double();
    if (one_in(8))
        sampling.stop = stops, sampling.num_stop = draw(6);
    if (one_in(8))
        sampling.bad_words = one_in(4) ? NULL : stops, sampling.num_bad_words = draw(3);
    if (one_in(8))
        sampling.stop_token_ids = ids, sampling.num_stop_token_ids = draw(8);
    if (one_in(8))
        sampling.allowed_token_ids = ids, sampling.num_allowed_token_ids = draw(8);
    if (one_in(8))
        sampling.logit_bias_ids = ids, sampling.logit_bias = one_in(4) ? NULL : biases, sampling.num_logit_bias = draw(4);
    if (one_in(10))
        sampling.grammar_kind = kinds[draw(6)], sampling.grammar = one_in(3) ? NULL : "[a-c]{1,3}";
    if (one_in(10))
        sampling.beam_width = any_int() % 4, sampling.early_stopping = any_int();
    if (one_in(8))
        sampling.json = any_text(&length);
    length = one_in(3) ? draw(2) : MINIPAGED_ZSTRING;
    if (text && length != MINIPAGED_ZSTRING && length > strlen(text))
        length = strlen(text);
    options.priority = any_int();
    options.cache_salt = one_in(4) ? "salt" : NULL;
    options.stream = (int32_t)draw(2);
    if (one_in(3))
        options.callback = on_chunk, options.user_data = &of[place], options.auto_free = (int32_t)draw(2);
    else
        options.auto_free = one_in(10);
    switch (draw(3)) {
    case 0:
        status = minipaged_submit_text(to, engine, text, length, s, o);
        break;
    case 1:
        status = minipaged_submit_tokens(to, engine, one_in(10) ? NULL : ids, draw(8), s, o);
        break;
    default:
        status = minipaged_submit_chat(to, engine, text, length, s, o);
    }
    if (status == MINIPAGED_OK)
        requests[draw(NUM_REQUESTS)] = request;
    return status;
}

static int32_t create(void)
{
    static const char *const jsons[] = {"{\"block_size\": 4}", "{\"nonsense\": 1}", "[]", "{", "{\"num_blocks\": -1}",
                                        "{\"model\": \"x\"}", NULL};
    minipaged_engine_options options = MINIPAGED_ENGINE_OPTIONS_INIT;
    minipaged_engine *made = (minipaged_engine *)&options, **to = one_in(20) ? NULL : &made;
    size_t place = draw(NUM_ENGINES);
    int32_t status;
    options.struct_size = any_size(sizeof options);
    if (options.struct_size > sizeof options)
        options.struct_size = UINT32_MAX;
    options.mode = place == 0 ? MINIPAGED_MODE_STEP : one_in(10) ? any_int() : MINIPAGED_MODE_THREAD;
    options.device = one_in(8) ? "toaster" : "reference";
    options.num_blocks = one_in(8) ? any_int() : 24;
    options.max_model_len = 64;
    if (one_in(4))
        options.json = jsons[draw(7)];
    if (one_in(8))
        options.max_num_seqs = any_int();
    status = minipaged_engine_create(to, one_in(8) ? "/nonexistent" : one_in(20) ? NULL : model, &options);
    if (status == MINIPAGED_OK) {
        stale = engines[place] ? engines[place] : stale;
        if (engines[place] && minipaged_engine_destroy(engines[place]))
            num_failures++;
        engines[place] = made;
    } else if (to && made)
        num_failures++; /* NULL on failure */
    return status;
}

/* One random call; its status. */
static int32_t call(int which)
{
    minipaged_engine *engine = any_engine();
    minipaged_request request = any_request();
    char text[64];
    int32_t tokens[16];
    size_t length, size, *out = one_in(3) ? NULL : &size;
    const char *given = any_text(&length);
    char *to = one_in(6) ? NULL : text;
    size_t room = draw(sizeof text + 1), places = draw(17);
    if (given && length == MINIPAGED_ZSTRING)
        length = strlen(given);
    switch (which) {
    case 0:
    case 1:
    case 2:
    case 3:
        return submit();
    case 4:
        return minipaged_cancel(engine, request);
    case 5:
        return minipaged_wait(engine, request, engine == engines[0] ? 0 : (int64_t)draw(30));
    case 6: {
        minipaged_request_info info = MINIPAGED_REQUEST_INFO_INIT;
        info.struct_size = any_size(sizeof info);
        return minipaged_request_poll(engine, request, one_in(20) ? NULL : &info);
    }
    case 7: {
        minipaged_reader reader = MINIPAGED_READER_INIT;
        reader.struct_size = any_size(sizeof reader);
        reader.token_ids = one_in(4) ? NULL : tokens;
        reader.token_capacity = places;
        reader.text = to;
        reader.text_capacity = room;
        return minipaged_request_read(engine, request, one_in(20) ? NULL : &reader, (int64_t)draw(10));
    }
    case 8:
        return minipaged_request_free(engine, request);
    case 9: {
        minipaged_choice_info info = MINIPAGED_CHOICE_INFO_INIT;
        info.struct_size = any_size(sizeof info);
        return minipaged_request_choice(engine, request, any_int(), one_in(20) ? NULL : &info);
    }
    case 10:
        return minipaged_request_text(engine, request, any_int() % 2, to, room, out);
    case 11:
        return minipaged_request_tokens(engine, request, any_int() % 2, one_in(6) ? NULL : tokens, places, out);
    case 12:
        return minipaged_request_stop_string(engine, request, any_int() % 2, to, room, out);
    case 13: {
        minipaged_logprob logprobs[16];
        return minipaged_request_logprobs(engine, request, any_int() % 2, draw(20), one_in(6) ? NULL : logprobs, places,
                                          out);
    }
    case 14:
        return minipaged_request_error(engine, request, to, room, out);
    case 15:
        return minipaged_next(one_in(20) ? NULL : &request, engine, (int64_t)draw(5));
    case 16:
        return minipaged_tokenize(engine, given, length, any_int(), one_in(6) ? NULL : tokens, places, out);
    case 17: {
        int32_t ids[4] = {1, 70, any_int(), 3};
        return minipaged_detokenize(engine, one_in(10) ? NULL : ids, draw(5), any_int(), to, room, out);
    }
    case 18:
        return minipaged_chat_prompt(engine, given, length, to, room, out);
    case 19: {
        minipaged_stats stats = MINIPAGED_STATS_INIT;
        stats.struct_size = any_size(sizeof stats);
        return minipaged_engine_stats(engine, one_in(20) ? NULL : &stats);
    }
    case 20:
        return minipaged_engine_stats_json(engine, to, room, out);
    case 21: {
        minipaged_model_info info = MINIPAGED_MODEL_INFO_INIT;
        info.struct_size = any_size(sizeof info);
        return minipaged_engine_model_info(engine, one_in(20) ? NULL : &info);
    }
    case 22:
    case 23:
        return minipaged_engine_step(one_in(3) ? engine : engines[0]);
    case 24:
        return one_in(60) ? create() : MINIPAGED_OK;
    case 25:
        if (one_in(200)) {
            size_t place = draw(NUM_ENGINES);
            int32_t status = minipaged_engine_destroy(engines[place]);
            stale = engines[place] ? engines[place] : stale;
            engines[place] = NULL;
            return status;
        }
        return minipaged_engine_destroy(one_in(2) ? NULL : stale);
    default:
        return minipaged_set_log_callback(NULL, any_int(), NULL);
    }
}

int main(int argc, char **argv)
{
    long num_sequences = argc > 2 ? atol(argv[2]) : 100, sequence;
    int i;
    if (argc < 2)
        return 2;
    model = argv[1];
    state = argc > 3 ? strtoull(argv[3], NULL, 10) : 1;
    for (sequence = 0; sequence < num_sequences; sequence++) {
        int num_calls = 1 + (int)draw(12);
        if (sequence % 50 == 0)
            for (i = 0; i < NUM_ENGINES; i++)
                while (!engines[i])
                    create();
        for (i = 0; i < num_calls; i++) {
            int which = (int)draw(27);
            int32_t status;
            calls[which]++;
            status = call(which);
            if (status == MINIPAGED_ERROR_INTERNAL || !strcmp(minipaged_status_name(status), "unknown status") ||
                (status < 0 && !*minipaged_error())) {
                fprintf(stderr, "sequence %ld, call %d: %s: %s\n", sequence, which, minipaged_status_name(status),
                        minipaged_error());
                num_failures++;
            }
            num_errors += status < 0;
        }
    }
    for (i = 0; i < NUM_ENGINES; i++) {
        minipaged_stats stats = MINIPAGED_STATS_INIT;
        if (engines[i] && minipaged_engine_stats(engines[i], &stats) && minipaged_engine_stats(engines[i], &stats))
            num_failures++;
        if (minipaged_engine_destroy(engines[i]))
            num_failures++;
    }
    printf("%ld sequences, %ld errors answered, %ld callbacks, %d failures\n", num_sequences, num_errors, num_callbacks,
           num_failures);
    return num_failures ? 1 : 0;
}
