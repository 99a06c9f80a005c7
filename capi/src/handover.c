/* What the engine's thread hands over, as functions of Python: the module _minipaged_native.
 *
 * Unlike the functions that cffi makes these keep the interpreter's lock: letting go of it at each token would
 * hand it to whoever waits, in the middle of a step's results, and take up to milliseconds to come back. What
 * they lock for themselves is never held while anybody waits for the interpreter. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
/* Python.h first: it may define feature macros */
#include "internal.h"

static mpx_engine *engine_of(unsigned long long address)
{
    return (mpx_engine *)(uintptr_t)address;
}

static PyObject *done(void)
{
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

/* push(engine, request, choice, token_ids, text, sampled_ns, tell) */
static PyObject *push(PyObject *self, PyObject *arguments)
{
    unsigned long long engine, request;
    long long sampled_ns;
    int choice, tell;
    PyObject *list;
    const char *text;
    Py_ssize_t size, count;
    int32_t few[64], *token_ids = few;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KKiO!y#Lp", &engine, &request, &choice, &PyList_Type, &list, &text, &size,
                          &sampled_ns, &tell))
        return NULL;
    count = PyList_GET_SIZE(list);
    if (count > 64 && !(token_ids = PyMem_Malloc((size_t)count * sizeof *token_ids)))
        return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++)
        token_ids[i] = (int32_t)PyLong_AsLong(PyList_GET_ITEM(list, i));
    if (!PyErr_Occurred())
        mpx_push(engine_of(engine), request, choice, token_ids, (size_t)count, text, (size_t)size, sampled_ns, tell);
    if (token_ids != few)
        PyMem_Free(token_ids);
    return done();
}

/* push_logprobs(engine, request, choice, entries, counts): entries (token id, rank, log-probability) of all
 * positions, and how many each position has. */
static PyObject *push_logprobs(PyObject *self, PyObject *arguments)
{
    unsigned long long engine, request;
    int choice;
    PyObject *entries, *counts;
    minipaged_logprob *logprobs;
    size_t *numbers, num_entries, num_positions;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KKiO!O!", &engine, &request, &choice, &PyList_Type, &entries, &PyList_Type,
                          &counts))
        return NULL;
    num_entries = (size_t)PyList_GET_SIZE(entries);
    num_positions = (size_t)PyList_GET_SIZE(counts);
    logprobs = PyMem_Malloc((num_entries + 1) * sizeof *logprobs);
    numbers = PyMem_Malloc((num_positions + 1) * sizeof *numbers);
    if (!logprobs || !numbers)
        PyErr_NoMemory();
    for (size_t i = 0; !PyErr_Occurred() && i < num_entries; i++)
        PyArg_ParseTuple(PyList_GET_ITEM(entries, (Py_ssize_t)i), "iid", &logprobs[i].token_id, &logprobs[i].rank,
                         &logprobs[i].logprob);
    for (size_t i = 0; !PyErr_Occurred() && i < num_positions; i++)
        numbers[i] = PyLong_AsSize_t(PyList_GET_ITEM(counts, (Py_ssize_t)i));
    if (!PyErr_Occurred())
        mpx_push_logprobs(engine_of(engine), request, choice, logprobs, num_entries, numbers, num_positions);
    PyMem_Free(logprobs);
    PyMem_Free(numbers);
    return done();
}

/* end_choice(engine, request, choice, finish_reason, stop_token_id, stop_string, has_logprobs,
 *            cumulative_logprob, beam_score) */
static PyObject *end_choice(PyObject *self, PyObject *arguments)
{
    unsigned long long engine, request;
    int choice, finish_reason, stop_token_id, has_logprobs;
    const char *stop;
    Py_ssize_t size;
    double cumulative_logprob, beam_score;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KKiiiy#pdd", &engine, &request, &choice, &finish_reason, &stop_token_id, &stop,
                          &size, &has_logprobs, &cumulative_logprob, &beam_score))
        return NULL;
    mpx_end_choice(engine_of(engine), request, choice, finish_reason, stop_token_id, stop, (size_t)size, has_logprobs,
                   cumulative_logprob, beam_score);
    Py_RETURN_NONE;
}

/* end(engine, request, status, error, num_prompt_tokens, num_cached_tokens, num_preemptions,
 *     first_scheduled_ns, first_token_ns) */
static PyObject *end(PyObject *self, PyObject *arguments)
{
    unsigned long long engine, request;
    minipaged_request_info facts = MINIPAGED_REQUEST_INFO_INIT;
    int status, num_preemptions;
    long long num_prompt_tokens, num_cached_tokens, first_scheduled_ns, first_token_ns;
    const char *error;
    Py_ssize_t size;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KKiy#LLiLL", &engine, &request, &status, &error, &size, &num_prompt_tokens,
                          &num_cached_tokens, &num_preemptions, &first_scheduled_ns, &first_token_ns))
        return NULL;
    facts.num_prompt_tokens = num_prompt_tokens;
    facts.num_cached_tokens = num_cached_tokens;
    facts.num_preemptions = num_preemptions;
    facts.first_scheduled_ns = first_scheduled_ns;
    facts.first_token_ns = first_token_ns;
    mpx_end(engine_of(engine), request, status, error, (size_t)size, &facts);
    Py_RETURN_NONE;
}

/* settle(engine): between two steps. Here the interpreter's lock is let go of, if there is anything to wait for:
 * a callback may need it. */
static PyObject *settle(PyObject *self, PyObject *address)
{
    mpx_engine *engine = engine_of(PyLong_AsUnsignedLongLong(address));
    int due;
    (void)self;
    if (PyErr_Occurred())
        return NULL;
    pthread_mutex_lock(&engine->lock);
    due = engine->calls.first || engine->calling;
    pthread_mutex_unlock(&engine->lock);
    if (due) {
        Py_BEGIN_ALLOW_THREADS;
        mpx_settle(engine);
        Py_END_ALLOW_THREADS;
    }
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {{"push", push, METH_VARARGS, NULL},
                                  {"push_logprobs", push_logprobs, METH_VARARGS, NULL},
                                  {"end_choice", end_choice, METH_VARARGS, NULL},
                                  {"end", end, METH_VARARGS, NULL},
                                  {"settle", settle, METH_O, NULL},
                                  {NULL, NULL, 0, NULL}};

int32_t mpx_handover_start(void)
{
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *module = PyImport_AddModule("_minipaged_native"); /* borrowed */
    int failure = !module || PyModule_AddFunctions(module, functions) < 0;
    PyErr_Clear();
    PyGILState_Release(state);
    return failure ? mpx_fail(MINIPAGED_ERROR_MEMORY, "out of memory.") : MINIPAGED_OK;
}
