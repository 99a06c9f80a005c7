/* Requests: found by number, filled by the engine, ended exactly once.
 *
 * A record lives while its caller has not freed it, the engine may still write to it, a thread waits on it
 * or a callback of it runs; mpx_request_collect deletes it when none of these holds any more. */

#include "internal.h"


mpx_request *mpx_request_new(void)
{
    mpx_request *request = calloc(1, sizeof *request);
    if (request)
        mpx_cond_init(&request->changed);
    return request;
}

static void destroy_choice(mpx_choice *choice)
{
    free(choice->token_ids);
    free(choice->text);
    free(choice->stop_string);
    free(choice->logprobs);
    free(choice->logprob_ends);
}

void mpx_request_destroy(mpx_request *request)
{
    for (size_t i = 0; i < request->num_choices; i++)
        destroy_choice(&request->choices[i]);
    destroy_choice(&request->prompt);
    if (request->free_user_data)
        request->free_user_data(request->user_data);
    free(request->choices);
    free(request->error);
    pthread_cond_destroy(&request->changed);
    free(request);
}

/* ---- finding ---- */

static mpx_request **bucket(const mpx_engine *engine, uint64_t id)
{
    return &engine->buckets[id & (engine->num_buckets - 1)]; /* numbers count up: they spread by themselves */
}

static void grow(mpx_engine *engine)
{
    size_t old = engine->num_buckets;
    mpx_request **buckets = engine->buckets, **larger = calloc(old * 2, sizeof *larger);
    if (!larger)
        return; /* longer chains are slower, not wrong */
    engine->buckets = larger;
    engine->num_buckets = old * 2;
    for (size_t i = 0; i < old; i++)
        while (buckets[i]) {
            mpx_request *request = buckets[i], **to = bucket(engine, request->id);
            buckets[i] = request->hash_next;
            request->hash_next = *to;
            *to = request;
        }
    free(buckets);
}

int mpx_request_insert(mpx_engine *engine, mpx_request *request)
{
    mpx_request **to;
    if (engine->closing)
        return 0;
    if (engine->num_records >= engine->num_buckets)
        grow(engine);
    request->id = engine->serial << 40 | ++engine->last_request; /* 2^24 engines of 2^40 requests each */
    to = bucket(engine, request->id);
    request->hash_next = *to;
    *to = request;
    engine->num_records++;
    engine->num_held++;
    return 1;
}

mpx_request *mpx_request_find(mpx_engine *engine, uint64_t id)
{
    mpx_request *request = *bucket(engine, id);
    while (request && request->id != id)
        request = request->hash_next;
    return request;
}

mpx_request *mpx_request_get(mpx_engine *engine, uint64_t id)
{
    mpx_request *request = mpx_request_find(engine, id);
    if (request && !request->freed)
        return request;
    mpx_fail(MINIPAGED_ERROR_NOT_FOUND,
             "this engine has no request %llu: it was freed, belongs to another engine, or never existed.",
             (unsigned long long)id);
    return NULL;
}

void mpx_request_collect(mpx_engine *engine, mpx_request *request)
{
    mpx_request **link;
    if (!request->freed || !request->ended || request->waiters || request->dispatching)
        return;
    for (link = bucket(engine, request->id); *link != request; link = &(*link)->hash_next)
        ;
    *link = request->hash_next;
    engine->num_records--;
    if (request->free_user_data) { /* the caller's code: for the dispatcher, without a lock */
        request->hash_next = engine->dead;
        engine->dead = request;
        pthread_cond_signal(&engine->calls_changed);
    } else
        mpx_request_destroy(request);
}

/* ---- news ---- */

int mpx_choice_has_news(const mpx_choice *choice)
{
    return choice->tokens_read < choice->num_tokens || choice->text_read < choice->text_size ||
           (choice->finish_reason && !choice->finish_told);
}

mpx_choice *mpx_request_news(mpx_request *request)
{
    for (size_t i = 0; i < request->num_choices; i++)
        if (mpx_choice_has_news(&request->choices[i]))
            return &request->choices[i];
    return NULL;
}

void mpx_list_remove(mpx_list *list, mpx_request *request)
{
    *(request->previous ? &request->previous->next : &list->first) = request->next;
    *(request->next ? &request->next->previous : &list->last) = request->previous;
    request->next = request->previous = NULL;
    request->in_list = 0;
}

/* Have whoever wants to know of new output or of the end woken, by mpx_unlock. */
static void tell(mpx_engine *engine, mpx_request *request)
{
    mpx_list *list = request->callback ? &engine->calls : &engine->ready;
    pthread_cond_broadcast(&request->changed);
    if (request->freed || request->in_list)
        return;
    request->previous = list->last;
    *(list->last ? &list->last->next : &list->first) = request;
    list->last = request;
    request->in_list = 1;
    *(request->callback ? &engine->calls_told : &engine->ready_told) = 1;
}

/* Whoever is woken needs the lock, and may take this thread's core at once: so the lock goes first. */
void mpx_unlock(mpx_engine *engine)
{
    int calls = engine->calls_told, ready = engine->ready_told;
    engine->calls_told = engine->ready_told = 0;
    pthread_mutex_unlock(&engine->lock);
    if (calls)
        pthread_cond_signal(&engine->calls_changed);
    if (ready)
        pthread_cond_signal(&engine->ready_changed);
}

/* ---- what callers do ---- */

int32_t mpx_request_cancel(mpx_engine *engine, mpx_request *request)
{
    mpx_command *command;
    if (request->ended || request->cancelled || engine->closing)
        return MINIPAGED_OK;
    command = calloc(1, sizeof *command);
    if (!command)
        return mpx_fail(MINIPAGED_ERROR_MEMORY, "out of memory.");
    command->request = request->id;
    request->cancelled = 1;
    mpx_command_add(engine, command);
    return MINIPAGED_OK;
}

int32_t mpx_request_release(mpx_engine *engine, mpx_request *request)
{
    int32_t status = mpx_request_cancel(engine, request);
    if (status)
        return status;
    if (request->in_list)
        mpx_list_remove(request->callback ? &engine->calls : &engine->ready, request);
    request->freed = 1;
    engine->num_held--;
    pthread_cond_broadcast(&request->changed);
    mpx_request_collect(engine, request);
    return MINIPAGED_OK;
}

/* ---- what the engine does ---- */

/* Room for `more` elements of `unit` bytes behind `count`; 0 if there is no memory. */
static int reserve(void *array, size_t *capacity, size_t count, size_t more, size_t unit)
{
    void *old, *larger;
    size_t wanted = count + more;
    if (wanted <= *capacity)
        return 1;
    wanted = wanted < 16 ? 16 : wanted + wanted / 2;
    memcpy(&old, array, sizeof old);
    larger = realloc(old, wanted * unit);
    if (!larger)
        return 0;
    memcpy(array, &larger, sizeof larger);
    *capacity = wanted;
    return 1;
}

static char *copy_text(const char *text, size_t size)
{
    char *copy = malloc(size + 1);
    if (copy) {
        if (size)
            memcpy(copy, text, size);
        copy[size] = 0;
    }
    return copy;
}

static mpx_choice *choice_of(mpx_request *request, int32_t index)
{
    if (index == MINIPAGED_PROMPT)
        return &request->prompt;
    while (request->num_choices <= (size_t)index) {
        mpx_choice *choices = realloc(request->choices, (request->num_choices + 1) * sizeof *choices);
        if (!choices)
            return NULL;
        request->choices = choices;
        memset(&choices[request->num_choices], 0, sizeof *choices);
        choices[request->num_choices++].stop_token_id = -1;
    }
    return &request->choices[index];
}

/* Lock the engine and find the record and choice to write to; NULL (unlocked) if nobody wants it any more.
 * Without memory the request ends with that error. */
static mpx_choice *begin(mpx_engine *engine, uint64_t id, int32_t index, mpx_request **request)
{
    mpx_choice *choice;
    pthread_mutex_lock(&engine->lock);
    *request = mpx_request_find(engine, id);
    if (*request && !(*request)->ended) {
        choice = choice_of(*request, index);
        if (choice)
            return choice;
        mpx_request_end(engine, *request, MINIPAGED_ERROR_MEMORY, "out of memory.", 14);
    }
    mpx_unlock(engine);
    return NULL;
}

static void out_of_memory(mpx_engine *engine, mpx_request *request)
{
    mpx_request_cancel(engine, request);
    mpx_request_end(engine, request, MINIPAGED_ERROR_MEMORY, "out of memory.", 14);
}

void mpx_push(mpx_engine *engine, uint64_t id, int32_t index, const int32_t *token_ids, size_t num_tokens,
              const char *text, size_t size, int64_t sampled_ns, int32_t now)
{
    mpx_request *request;
    mpx_choice *choice = begin(engine, id, index, &request);
    if (!choice)
        return;
    if (!reserve(&choice->token_ids, &choice->token_capacity, choice->num_tokens, num_tokens, sizeof(int32_t)) ||
        !reserve(&choice->text, &choice->text_capacity, choice->text_size, size + 1, 1)) {
        out_of_memory(engine, request);
    } else {
        if (num_tokens)
            memcpy(choice->token_ids + choice->num_tokens, token_ids, num_tokens * sizeof(int32_t));
        memcpy(choice->text + choice->text_size, text, size);
        choice->num_tokens += num_tokens;
        choice->text_size += size;
        choice->text[choice->text_size] = 0;
        request->produced_ns = sampled_ns;
        if (now)
            tell(engine, request);
    }
    mpx_unlock(engine);
}

void mpx_push_logprobs(mpx_engine *engine, uint64_t id, int32_t index, const minipaged_logprob *entries,
                       size_t num_entries, const size_t *counts, size_t num_positions)
{
    mpx_request *request;
    mpx_choice *choice = begin(engine, id, index, &request);
    if (!choice)
        return;
    if (!reserve(&choice->logprobs, &choice->logprob_capacity, choice->num_logprobs, num_entries,
                 sizeof(minipaged_logprob)) ||
        !reserve(&choice->logprob_ends, &choice->position_capacity, choice->num_positions, num_positions,
                 sizeof(size_t))) {
        out_of_memory(engine, request);
    } else {
        if (num_entries)
            memcpy(choice->logprobs + choice->num_logprobs, entries, num_entries * sizeof *entries);
        for (size_t i = 0; i < num_positions; i++) {
            choice->num_logprobs += counts[i];
            choice->logprob_ends[choice->num_positions++] = choice->num_logprobs;
        }
    }
    mpx_unlock(engine);
}

void mpx_end_choice(mpx_engine *engine, uint64_t id, int32_t index, int32_t finish_reason, int32_t stop_token_id,
                    const char *stop_string, size_t size, int32_t has_logprobs, double cumulative_logprob,
                    double beam_score)
{
    mpx_request *request;
    mpx_choice *choice = begin(engine, id, index, &request);
    if (!choice)
        return;
    choice->stop_string = copy_text(stop_string, size);
    if (!choice->stop_string) {
        out_of_memory(engine, request);
    } else {
        choice->stop_size = size;
        choice->finish_reason = finish_reason;
        choice->stop_token_id = stop_token_id;
        choice->has_logprobs = has_logprobs;
        choice->cumulative_logprob = cumulative_logprob;
        choice->beam_score = beam_score;
    }
    mpx_unlock(engine);
}

void mpx_request_end(mpx_engine *engine, mpx_request *request, int32_t status, const char *error, size_t size)
{
    if (request->ended)
        return;
    request->status = status;
    request->error = copy_text(error, size);
    request->error_size = request->error ? size : 0;
    for (size_t i = 0; i < request->num_choices; i++)
        if (!request->choices[i].finish_reason)
            request->choices[i].finish_reason = status ? MINIPAGED_FINISH_ERROR : MINIPAGED_FINISH_ABORT;
    request->info.finished_ns = mpx_now_ns();
    request->ended = 1;
    tell(engine, request);
    mpx_request_collect(engine, request);
}

void mpx_end(mpx_engine *engine, uint64_t id, int32_t status, const char *error, size_t size,
             const minipaged_request_info *facts)
{
    mpx_request *request;
    pthread_mutex_lock(&engine->lock);
    request = mpx_request_find(engine, id);
    if (request && !request->ended) {
        request->info.num_prompt_tokens = facts->num_prompt_tokens;
        request->info.num_cached_tokens = facts->num_cached_tokens;
        request->info.num_preemptions = facts->num_preemptions;
        request->info.first_scheduled_ns = facts->first_scheduled_ns;
        request->info.first_token_ns = facts->first_token_ns;
        mpx_request_end(engine, request, status, error, size);
    }
    mpx_unlock(engine);
}
