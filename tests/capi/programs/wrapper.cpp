// The C++ wrapper: values, errors, exceptions in callbacks, and what happens when things go out of scope.
#include <minipaged.hpp>

#include <chrono>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#define CHECK(condition)                                                                                       \
    do {                                                                                                       \
        if (!(condition)) {                                                                                    \
            std::fprintf(stderr, "line %d: %s\n", __LINE__, #condition);                                       \
            return 1;                                                                                          \
        }                                                                                                      \
    } while (0)

int main(int, char **argv)
{
    minipaged_engine_options options = MINIPAGED_ENGINE_OPTIONS_INIT;
    options.device = "reference";
    options.num_blocks = 128;
    minipaged::engine engine(argv[1], options);
    minipaged::sampling greedy;
    greedy.temperature = 0;
    greedy.max_tokens = 12;
    greedy.logprobs = 1;

    // The same by text, by tokens, and by callback.
    minipaged::request one = engine.submit("ROMEO:\n", greedy);
    minipaged::request two = engine.submit(engine.tokenize("ROMEO:\n"), greedy);
    std::string heard;
    minipaged::request three = engine.submit("ROMEO:\n", greedy, [&](const minipaged::chunk &chunk) {
        heard += chunk.text;
        return true;
    });
    CHECK(one.wait() && two.wait() && three.wait());
    CHECK(one.tokens() == two.tokens() && one.tokens().size() == 12);
    CHECK(heard == one.text() && engine.generate("ROMEO:\n", greedy) == heard);
    CHECK(one.logprobs(0, 0).at(0).token_id == one.tokens()[0] && one.choice().has_logprobs);
    CHECK(engine.detokenize(engine.tokenize("Caf\xc3\xa9")) == "Caf\xc3\xa9");
    CHECK(engine.tokenize("").empty() && engine.detokenize({}).empty());

    // Errors carry status and text.
    try {
        greedy.top_p = 7;
        engine.generate("x", greedy);
        CHECK(!"no error");
    } catch (const minipaged::error &error) {
        CHECK(error.status() == MINIPAGED_ERROR_PARAMETER && std::string(error.what()).find("top_p is 7") == 0);
    }
    greedy.top_p.reset();

    // A callback that throws cancels its request; wait gives the exception back.
    greedy.max_tokens = 300;
    greedy.ignore_eos = true;
    greedy.stop = {"never written by this model"};
    greedy.logit_bias = {{5, -10.0}};
    minipaged::request thrown = engine.submit("LONG\n", greedy, [](const minipaged::chunk &) -> bool {
        throw std::runtime_error("enough");
    });
    try {
        thrown.wait();
        CHECK(!"no exception");
    } catch (const std::runtime_error &error) {
        CHECK(std::string(error.what()) == "enough");
    }

    // Going out of scope ends a request, and what its function holds is given back.
    std::shared_ptr<int> held = std::make_shared<int>(1);
    {
        minipaged::request dropped = engine.submit("LONG\n", greedy, [held](const minipaged::chunk &) { return true; });
        minipaged::request moved = std::move(dropped);
        CHECK(dropped.id() == 0 && moved.id() != 0);
    }
    for (int i = 0; i < 2000 && (held.use_count() > 1 || engine.stats().num_blocks_used); i++)
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
    CHECK(held.use_count() == 1 && engine.stats().num_blocks_used == 0);

    // An engine that ends first.
    minipaged::request orphan = engine.submit("LONG\n", greedy, [held](const minipaged::chunk &) { return true; });
    engine = minipaged::engine(argv[1], options);
    CHECK(held.use_count() == 2 || held.use_count() == 1);
    std::puts("ok");
    return 0;
}
