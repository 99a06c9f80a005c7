/* Engines by handle, and the queue of what each is asked to do.
 *
 * A handle is the engine's number, shaped as a pointer and never dereferenced: one that is stale, foreign or
 * garbage is looked up and not found. Whoever found an engine holds a reference, so its memory outlives
 * every call that is under way when it is destroyed. */

#include "internal.h"

static pthread_mutex_t registry_lock = PTHREAD_MUTEX_INITIALIZER;
static mpx_engine *registry;
static uint64_t last_serial;

minipaged_engine *mpx_engine_handle(const mpx_engine *engine)
{
    return (minipaged_engine *)(uintptr_t)(engine->serial * 16 + 1); /* odd: no pointer that malloc returned */
}

int32_t mpx_engine_new(mpx_engine **engine, int32_t mode)
{
    mpx_engine *made = calloc(1, sizeof *made);
    if (made) {
        made->num_buckets = 64;
        made->buckets = calloc(made->num_buckets, sizeof *made->buckets);
    }
    if (!made || !made->buckets) {
        free(made);
        return mpx_fail(MINIPAGED_ERROR_MEMORY, "out of memory.");
    }
    made->mode = mode;
    made->references = 1;
    pthread_mutex_init(&made->lock, NULL);
    mpx_cond_init(&made->commands_changed);
    mpx_cond_init(&made->calls_changed);
    mpx_cond_init(&made->calls_done);
    mpx_cond_init(&made->ready_changed);
    pthread_mutex_lock(&registry_lock);
    made->serial = ++last_serial;
    pthread_mutex_unlock(&registry_lock);
    *engine = made;
    return MINIPAGED_OK;
}

void mpx_engine_publish(mpx_engine *engine)
{
    pthread_mutex_lock(&registry_lock);
    engine->registry_next = registry; /* with the reference of its creator */
    registry = engine;
    pthread_mutex_unlock(&registry_lock);
}

int32_t mpx_engine_get(mpx_engine **engine, minipaged_engine *handle)
{
    mpx_engine *found;
    *engine = NULL;
    if (mpx_forked())
        return mpx_fail_forked();
    if (!handle)
        return mpx_fail(MINIPAGED_ERROR_ARGUMENT, "the engine is NULL; create one with minipaged_engine_create.");
    pthread_mutex_lock(&registry_lock);
    for (found = registry; found && mpx_engine_handle(found) != handle; found = found->registry_next)
        ;
    if (found)
        found->references++;
    pthread_mutex_unlock(&registry_lock);
    if (!found)
        return mpx_fail(MINIPAGED_ERROR_ENGINE, "this is no engine, or one that was destroyed.");
    *engine = found;
    return MINIPAGED_OK;
}

mpx_engine *mpx_engine_any(void)
{
    mpx_engine *found;
    pthread_mutex_lock(&registry_lock);
    found = registry;
    if (found)
        found->references++;
    pthread_mutex_unlock(&registry_lock);
    return found;
}

int mpx_engine_withdraw(mpx_engine *engine)
{
    mpx_engine **link;
    int found;
    pthread_mutex_lock(&registry_lock);
    for (link = &registry; *link && *link != engine; link = &(*link)->registry_next)
        ;
    found = *link != NULL;
    if (found) {
        *link = engine->registry_next;
        engine->references--; /* the registry's own; the caller holds another */
    }
    pthread_mutex_unlock(&registry_lock);
    return found;
}

void mpx_engine_put(mpx_engine *engine)
{
    int references;
    pthread_mutex_lock(&registry_lock);
    references = --engine->references;
    pthread_mutex_unlock(&registry_lock);
    if (references)
        return;
    mpx_destroy_dead(engine->dead);
    for (size_t i = 0; i < engine->num_buckets; i++)
        while (engine->buckets[i]) {
            mpx_request *request = engine->buckets[i];
            engine->buckets[i] = request->hash_next;
            mpx_request_destroy(request);
        }
    while (engine->first_command) {
        mpx_command *command = engine->first_command;
        engine->first_command = command->next;
        mpx_free_command(command);
    }
    free(engine->buckets);
    pthread_cond_destroy(&engine->commands_changed);
    pthread_cond_destroy(&engine->calls_changed);
    pthread_cond_destroy(&engine->calls_done);
    pthread_cond_destroy(&engine->ready_changed);
    pthread_mutex_destroy(&engine->lock);
    free(engine);
}

/* ---- commands ---- */

void mpx_command_add(mpx_engine *engine, mpx_command *command)
{
    command->next = NULL;
    if (engine->last_command)
        engine->last_command->next = command;
    else
        engine->first_command = command;
    engine->last_command = command;
    pthread_cond_signal(&engine->commands_changed);
}

/* The next command; NULL if the engine is closing, or if there is none and `wait` is 0. */
mpx_command *mpx_next_command(void *handle, int32_t wait)
{
    mpx_engine *engine = handle;
    mpx_command *command;
    pthread_mutex_lock(&engine->lock);
    while (wait && !engine->first_command && !engine->closing)
        pthread_cond_wait(&engine->commands_changed, &engine->lock);
    command = engine->closing ? NULL : engine->first_command;
    if (command) {
        engine->first_command = command->next;
        if (!command->next)
            engine->last_command = NULL;
    }
    pthread_mutex_unlock(&engine->lock);
    return command;
}

void mpx_free_command(mpx_command *command)
{
    free(command); /* one block holds all it points to */
}
