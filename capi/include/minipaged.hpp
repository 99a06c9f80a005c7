// minipaged.hpp: minipaged.h for C++17, with resources that free themselves and exceptions. Header only.
//
//     minipaged::engine engine("tiny");
//     std::cout << engine.generate("ROMEO:", {.max_tokens = 40}) << '\n';            // C++20 spelling
//
//     auto request = engine.submit("ROMEO:", sampling, [](const minipaged::chunk &c) {
//         std::cout << c.text << std::flush;
//         return true;                                                             // false cancels it
//     });
//     request.wait();
//
// Every call that fails throws minipaged::error. Threads, ownership and errors are as minipaged.h says; an
// engine must outlive its requests' last use, but destroying it first is harmless.
#ifndef MINIPAGED_HPP
#define MINIPAGED_HPP

#include "minipaged.h"

#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace minipaged {

// A call that failed: what() is the library's text.
class error : public std::runtime_error {
public:
    error(std::int32_t status, const std::string &text) : std::runtime_error(text), status_(status) {}
    std::int32_t status() const noexcept { return status_; }
    const char *status_name() const noexcept { return minipaged_status_name(status_); }

private:
    std::int32_t status_;
};

namespace detail {

// Throw for an error; give back what is information.
inline std::int32_t check(std::int32_t status)
{
    if (status < 0)
        throw error(status, minipaged_error());
    return status;
}

// Call a function of the form (buffer, capacity, length) twice: for the length, and for the content.
template <class Container, class Function>
Container content(std::size_t extra, Function function)
{
    Container result;
    std::size_t length = 0;
    check(function(nullptr, 0, &length));
    for (;;) { // between the calls there may have come more
        result.resize(length + extra);
        const std::int32_t status = function(result.data(), result.size(), &length);
        if (status == MINIPAGED_ERROR_BUFFER)
            continue;
        check(status);
        result.resize(length);
        return result;
    }
}

} // namespace detail

// How a request is continued; what has no value follows the model's recommendation. See minipaged_sampling.
struct sampling {
    std::optional<std::int32_t> n;
    std::optional<std::int64_t> max_tokens, min_tokens;
    std::optional<double> temperature, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty;
    std::optional<std::int32_t> top_k;
    std::optional<std::uint64_t> seed;
    std::optional<bool> ignore_eos, include_stop_str_in_output, skip_special_tokens;
    std::optional<std::int32_t> logprobs, prompt_logprobs, best_of, beam_width, early_stopping;
    std::optional<double> length_penalty;
    std::vector<std::string> stop, bad_words;
    std::vector<std::int32_t> stop_token_ids, allowed_token_ids;
    std::map<std::int32_t, double> logit_bias;
    std::string grammar_kind, grammar;
    std::string json; // an object with any other fields
};

// Everything about a request but its prompt and its sampling.
struct request_options {
    std::int32_t priority = 0;
    std::optional<std::string> cache_salt;
    bool stream = false; // output can be read while it is generated; a callback implies it
};

// What is new in one choice of a request; valid until the callback returns.
struct chunk {
    minipaged_request request;
    std::int32_t choice;
    std::string_view text;
    const std::int32_t *token_ids;
    std::size_t num_tokens;
    std::int32_t finish_reason; // of the choice: MINIPAGED_FINISH_*
    bool finished;              // the request's last chunk
    std::int32_t status;        // with finished: MINIPAGED_OK or what ended it
    std::string_view error;
};

// Called on the engine's dispatcher thread; false, or an exception, cancels the request.
using callback = std::function<bool(const chunk &)>;

// A request that frees itself, and with that ends itself, when it goes out of scope.
class request {
public:
    request(request &&other) noexcept { *this = std::move(other); }
    request &operator=(request &&other) noexcept
    {
        if (this != &other) {
            free();
            engine_ = std::exchange(other.engine_, nullptr);
            id_ = std::exchange(other.id_, 0);
            call_ = std::move(other.call_);
        }
        return *this;
    }
    ~request() { free(); }

    minipaged_request id() const noexcept { return id_; }

    // Wait for the end; false if the time was over first. Throws what ended the request, and what a callback
    // of it threw.
    bool wait(std::int64_t timeout_ms = MINIPAGED_FOREVER)
    {
        const std::int32_t status = minipaged_wait(engine_, id_, timeout_ms);
        if (status == MINIPAGED_TIMEOUT)
            return false;
        if (std::exception_ptr thrown = call_ ? call_->thrown() : nullptr)
            std::rethrow_exception(thrown);
        detail::check(status);
        return true;
    }

    void cancel() { detail::check(minipaged_cancel(engine_, id_)); }

    minipaged_request_info info() const
    {
        minipaged_request_info info = MINIPAGED_REQUEST_INFO_INIT;
        detail::check(minipaged_request_poll(engine_, id_, &info));
        return info;
    }

    minipaged_choice_info choice(std::int32_t index = 0) const
    {
        minipaged_choice_info info = MINIPAGED_CHOICE_INFO_INIT;
        detail::check(minipaged_request_choice(engine_, id_, index, &info));
        return info;
    }

    std::string text(std::int32_t index = 0) const
    {
        return detail::content<std::string>(1, [&](char *to, std::size_t capacity, std::size_t *length) {
            return minipaged_request_text(engine_, id_, index, to, capacity, length);
        });
    }

    std::vector<std::int32_t> tokens(std::int32_t index = 0) const
    {
        return detail::content<std::vector<std::int32_t>>(
            0, [&](std::int32_t *to, std::size_t capacity, std::size_t *length) {
                return minipaged_request_tokens(engine_, id_, index, to, capacity, length);
            });
    }

    // At one position of a choice (or of the prompt, MINIPAGED_PROMPT): the token there, then the likeliest.
    std::vector<minipaged_logprob> logprobs(std::int32_t index, std::size_t position) const
    {
        return detail::content<std::vector<minipaged_logprob>>(
            0, [&](minipaged_logprob *to, std::size_t capacity, std::size_t *length) {
                return minipaged_request_logprobs(engine_, id_, index, position, to, capacity, length);
            });
    }

private:
    friend class engine;

    // The user's function, and what it threw; shared with the library, which may be inside it when the request
    // is freed.
    class call {
    public:
        explicit call(callback function) : function_(std::move(function)) {}
        std::exception_ptr thrown()
        {
            const std::lock_guard<std::mutex> guard(lock_);
            return thrown_;
        }

        static std::int32_t run(const minipaged_chunk *c, void *user_data)
        {
            auto *holder = static_cast<std::shared_ptr<call> *>(user_data);
            std::int32_t stop = 0;
            try {
                const chunk given{c->request,   c->choice,     {c->text, static_cast<std::size_t>(c->text_length)},
                                  c->token_ids, static_cast<std::size_t>(c->num_tokens), c->choice_finish_reason,
                                  c->finished != 0, c->status, c->error};
                stop = !(*holder)->function_(given);
            } catch (...) {
                const std::lock_guard<std::mutex> guard((*holder)->lock_);
                if (!(*holder)->thrown_)
                    (*holder)->thrown_ = std::current_exception();
                stop = 1;
            }
            return stop;
        }
        static void free(void *user_data) { delete static_cast<std::shared_ptr<call> *>(user_data); }

    private:
        callback function_;
        std::mutex lock_;
        std::exception_ptr thrown_;
    };

    request(minipaged_engine *engine, minipaged_request id, std::shared_ptr<call> call)
        : engine_(engine), id_(id), call_(std::move(call))
    {
    }

    void free() noexcept
    {
        if (id_)
            minipaged_request_free(engine_, id_);
        id_ = 0;
    }

    minipaged_engine *engine_ = nullptr;
    minipaged_request id_ = 0;
    std::shared_ptr<call> call_;
};

// A model that serves requests; destroyed with the object.
class engine {
public:
    explicit engine(const std::string &model, const minipaged_engine_options &options = MINIPAGED_ENGINE_OPTIONS_INIT)
    {
        detail::check(minipaged_engine_create(&handle_, model.c_str(), &options));
    }
    engine(engine &&other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
    engine &operator=(engine &&other) noexcept
    {
        if (this != &other) {
            minipaged_engine_destroy(handle_);
            handle_ = std::exchange(other.handle_, nullptr);
        }
        return *this;
    }
    ~engine() { minipaged_engine_destroy(handle_); }

    minipaged_engine *handle() const noexcept { return handle_; }

    request submit(std::string_view text, const sampling &how = {}, callback function = {},
                   const request_options &options = {})
    {
        return submit_with(minipaged_submit_text, text.data() ? text.data() : "", text.size(), how,
                           std::move(function), options);
    }
    request submit(const std::vector<std::int32_t> &token_ids, const sampling &how = {}, callback function = {},
                   const request_options &options = {})
    {
        return submit_with(minipaged_submit_tokens, token_ids.data(), token_ids.size(), how, std::move(function),
                           options);
    }
    // A conversation as JSON: see minipaged_chat_prompt.
    request submit_chat(std::string_view json, const sampling &how = {}, callback function = {},
                        const request_options &options = {})
    {
        return submit_with(minipaged_submit_chat, json.data() ? json.data() : "", json.size(), how,
                           std::move(function), options);
    }

    // Continue a text and wait for it.
    std::string generate(std::string_view text, const sampling &how = {})
    {
        request running = submit(text, how);
        running.wait();
        return running.text();
    }

    // Step mode: compute once; false if there was nothing to do.
    bool step() { return detail::check(minipaged_engine_step(handle_)) == MINIPAGED_OK; }

    minipaged_model_info model_info() const
    {
        minipaged_model_info info = MINIPAGED_MODEL_INFO_INIT;
        detail::check(minipaged_engine_model_info(handle_, &info));
        return info;
    }
    minipaged_stats stats() const
    {
        minipaged_stats stats = MINIPAGED_STATS_INIT;
        detail::check(minipaged_engine_stats(handle_, &stats));
        return stats;
    }

    std::vector<std::int32_t> tokenize(std::string_view text, bool add_special_tokens = true) const
    {
        return detail::content<std::vector<std::int32_t>>(
            0, [&](std::int32_t *to, std::size_t capacity, std::size_t *length) {
                return minipaged_tokenize(handle_, text.data() ? text.data() : "", text.size(), add_special_tokens,
                                          to, capacity, length);
            });
    }
    std::string detokenize(const std::vector<std::int32_t> &token_ids, bool skip_special_tokens = true) const
    {
        return detail::content<std::string>(1, [&](char *to, std::size_t capacity, std::size_t *length) {
            return minipaged_detokenize(handle_, token_ids.data(), token_ids.size(), skip_special_tokens, to, capacity,
                                        length);
        });
    }
    std::string chat_prompt(std::string_view json) const
    {
        return detail::content<std::string>(1, [&](char *to, std::size_t capacity, std::size_t *length) {
            return minipaged_chat_prompt(handle_, json.data() ? json.data() : "", json.size(), to, capacity, length);
        });
    }

private:
    template <class Submit, class Data>
    request submit_with(Submit function, const Data *data, std::size_t size, const sampling &how, callback on_chunk,
                        const request_options &options)
    {
        minipaged_sampling c = MINIPAGED_SAMPLING_INIT;
        set(c.n, how.n), set(c.max_tokens, how.max_tokens), set(c.min_tokens, how.min_tokens);
        set(c.temperature, how.temperature), set(c.top_p, how.top_p), set(c.min_p, how.min_p);
        set(c.presence_penalty, how.presence_penalty), set(c.frequency_penalty, how.frequency_penalty);
        set(c.repetition_penalty, how.repetition_penalty), set(c.top_k, how.top_k);
        set(c.ignore_eos, how.ignore_eos), set(c.include_stop_str_in_output, how.include_stop_str_in_output);
        set(c.skip_special_tokens, how.skip_special_tokens), set(c.logprobs, how.logprobs);
        set(c.prompt_logprobs, how.prompt_logprobs), set(c.best_of, how.best_of), set(c.beam_width, how.beam_width);
        set(c.early_stopping, how.early_stopping), set(c.length_penalty, how.length_penalty);
        c.has_seed = how.seed.has_value();
        set(c.seed, how.seed);
        const std::vector<const char *> stop = pointers(how.stop), bad_words = pointers(how.bad_words);
        set_list(c.stop, c.num_stop, stop), set_list(c.bad_words, c.num_bad_words, bad_words);
        set_list(c.stop_token_ids, c.num_stop_token_ids, how.stop_token_ids);
        set_list(c.allowed_token_ids, c.num_allowed_token_ids, how.allowed_token_ids);
        std::vector<std::int32_t> bias_ids;
        std::vector<double> biases;
        for (const auto &[token_id, bias] : how.logit_bias) {
            bias_ids.push_back(token_id);
            biases.push_back(bias);
        }
        c.logit_bias_ids = bias_ids.data();
        set_list(c.logit_bias, c.num_logit_bias, biases);
        c.grammar_kind = how.grammar_kind.empty() ? nullptr : how.grammar_kind.c_str();
        c.grammar = how.grammar.empty() ? nullptr : how.grammar.c_str();
        c.json = how.json.empty() ? nullptr : how.json.c_str();

        minipaged_request_options o = MINIPAGED_REQUEST_OPTIONS_INIT;
        o.priority = options.priority;
        o.cache_salt = options.cache_salt ? options.cache_salt->c_str() : nullptr;
        o.stream = options.stream;
        std::shared_ptr<request::call> call;
        std::unique_ptr<std::shared_ptr<request::call>> holder;
        if (on_chunk) {
            call = std::make_shared<request::call>(std::move(on_chunk));
            holder = std::make_unique<std::shared_ptr<request::call>>(call);
            o.callback = request::call::run;
            o.user_data = holder.get();
            o.free_user_data = request::call::free;
        }
        minipaged_request id = 0;
        detail::check(function(&id, handle_, data, size, &c, &o));
        holder.release(); // the library calls request::call::free with it
        return request(handle_, id, std::move(call));
    }

    template <class Field, class Value>
    static void set(Field &field, const std::optional<Value> &value)
    {
        if (value)
            field = *value;
    }
    template <class Field, class Value>
    static void set_list(Field &field, std::uint64_t &count, const std::vector<Value> &values)
    {
        field = values.empty() ? nullptr : values.data();
        count = values.size();
    }
    static std::vector<const char *> pointers(const std::vector<std::string> &texts)
    {
        std::vector<const char *> result;
        for (const std::string &text : texts)
            result.push_back(text.c_str());
        return result;
    }

    minipaged_engine *handle_ = nullptr;
};

} // namespace minipaged

#endif // MINIPAGED_HPP
