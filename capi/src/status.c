/* Status names, the thread's error text, UTF-8, clocks, and whether this process is a fork. */

#include "internal.h"

#include <stdarg.h>
#include <stdio.h>

static __thread char error_text[4096];

/* ---- errors ---- */

static const char *const error_names[] = {
    "MINIPAGED_OK",
    "MINIPAGED_ERROR_INTERNAL",
    "MINIPAGED_ERROR_ARGUMENT",
    "MINIPAGED_ERROR_ENGINE",
    "MINIPAGED_ERROR_NOT_FOUND",
    "MINIPAGED_ERROR_STRUCT",
    "MINIPAGED_ERROR_UTF8",
    "MINIPAGED_ERROR_BUFFER",
    "MINIPAGED_ERROR_BUSY",
    "MINIPAGED_ERROR_FORKED",
    "MINIPAGED_ERROR_MEMORY",
    "MINIPAGED_ERROR_PYTHON",
    "MINIPAGED_ERROR_PACKAGE",
    "MINIPAGED_ERROR_CONFIG",
    "MINIPAGED_ERROR_PARAMETER",
    "MINIPAGED_ERROR_REQUEST",
    "MINIPAGED_ERROR_PROMPT_TOO_LONG",
    "MINIPAGED_ERROR_POOL_TOO_SMALL",
    "MINIPAGED_ERROR_TOKEN_RANGE",
    "MINIPAGED_ERROR_MODEL_NOT_FOUND",
    "MINIPAGED_ERROR_MODEL_FORMAT",
    "MINIPAGED_ERROR_MODEL_UNSUPPORTED",
    "MINIPAGED_ERROR_TOKENIZER",
    "MINIPAGED_ERROR_DOWNLOAD",
    "MINIPAGED_ERROR_BACKEND_UNAVAILABLE",
    "MINIPAGED_ERROR_ENGINE_DIED",
    "MINIPAGED_ERROR_NUMERICAL",
    "MINIPAGED_ERROR_NOT_FINISHED",
    "MINIPAGED_ERROR_MODE",
};

MPX_EXPORT const char *minipaged_status_name(int32_t status)
{
    const int32_t count = (int32_t)(sizeof error_names / sizeof *error_names);
    if (status == MINIPAGED_TIMEOUT)
        return "MINIPAGED_TIMEOUT";
    if (status == MINIPAGED_DONE)
        return "MINIPAGED_DONE";
    return status <= 0 && status > -count ? error_names[-status] : "unknown status";
}

MPX_EXPORT const char *minipaged_error(void)
{
    return error_text;
}

MPX_EXPORT int32_t minipaged_api_version(void)
{
    return MINIPAGED_API_VERSION;
}

MPX_EXPORT const char *minipaged_version(void)
{
    return MINIPAGED_PACKAGE_VERSION;
}

const char *mpx_build_version(void)
{
    return MINIPAGED_PACKAGE_VERSION;
}

int32_t mpx_fail(int32_t status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error_text, sizeof error_text, format, arguments);
    va_end(arguments);
    return status;
}

int32_t mpx_fail_text(int32_t status, const char *text, size_t size)
{
    if (size >= sizeof error_text) {
        size = sizeof error_text - 1;
        while (size && ((unsigned char)text[size] & 0xC0) == 0x80) /* not inside a character */
            size--;
    }
    memcpy(error_text, text, size);
    error_text[size] = 0;
    return status;
}

/* ---- text ---- */

/* Well-formed UTF-8 as in table 3-7 of the Unicode standard: no overlong forms, no surrogates. */
int mpx_is_utf8(const char *text, size_t size)
{
    const unsigned char *p = (const unsigned char *)text, *end = p + size;
    while (p < end) {
        unsigned char low = 0x80, high = 0xBF;
        int rest;
        if (*p < 0x80) {
            p++;
            continue;
        }
        if (*p >= 0xC2 && *p <= 0xDF)
            rest = 1;
        else if (*p >= 0xE0 && *p <= 0xEF) {
            rest = 2;
            low = *p == 0xE0 ? 0xA0 : low;
            high = *p == 0xED ? 0x9F : high;
        } else if (*p >= 0xF0 && *p <= 0xF4) {
            rest = 3;
            low = *p == 0xF0 ? 0x90 : low;
            high = *p == 0xF4 ? 0x8F : high;
        } else
            return 0;
        if (end - p <= rest || p[1] < low || p[1] > high)
            return 0;
        for (int i = 2; i <= rest; i++)
            if (p[i] < 0x80 || p[i] > 0xBF)
                return 0;
        p += rest + 1;
    }
    return 1;
}

int32_t mpx_check_text(const char *what, const char *text, size_t *size)
{
    if (!text)
        return mpx_fail(MINIPAGED_ERROR_ARGUMENT, "%s is NULL; it must be UTF-8 text.", what);
    if (*size == MINIPAGED_ZSTRING)
        *size = strlen(text);
    else if (*size > PTRDIFF_MAX)
        return mpx_fail(MINIPAGED_ERROR_ARGUMENT, "%s has a length of %zu, more than memory can hold.", what, *size);
    if (!mpx_is_utf8(text, *size))
        return mpx_fail(MINIPAGED_ERROR_UTF8, "%s is not valid UTF-8; convert it first.", what);
    return MINIPAGED_OK;
}

/* The rule of (buffer, capacity, length) for `count` units of `unit` bytes. */
int32_t mpx_copy_out(const void *data, size_t count, size_t unit, int is_text, void *buffer, size_t capacity,
                     size_t *length)
{
    if (length)
        *length = count;
    if (!capacity)
        return MINIPAGED_OK;
    if (!buffer)
        return mpx_fail(MINIPAGED_ERROR_ARGUMENT, "the buffer is NULL, but its capacity is %zu.", capacity);
    if (capacity < count + (is_text ? 1 : 0))
        return mpx_fail(MINIPAGED_ERROR_BUFFER, "the buffer has room for %zu %s, but %zu are needed.", capacity,
                        is_text ? "bytes" : "entries", count + (is_text ? 1 : 0));
    if (count)
        memcpy(buffer, data, count * unit);
    if (is_text)
        ((char *)buffer)[count] = 0;
    return MINIPAGED_OK;
}

/* ---- time ---- */

int64_t mpx_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

struct timespec mpx_deadline(int64_t timeout_ms)
{
    const int64_t longest = (int64_t)1000 * 60 * 60 * 24 * 365 * 10; /* milliseconds; time_t must not overflow */
    return mpx_deadline_ns((timeout_ms > longest ? longest : timeout_ms) * 1000000);
}

struct timespec mpx_deadline_ns(int64_t timeout_ns)
{
    int64_t ns = mpx_now_ns() + timeout_ns;
    struct timespec deadline;
    deadline.tv_sec = (time_t)(ns / 1000000000);
    deadline.tv_nsec = (long)(ns % 1000000000);
    return deadline;
}

void mpx_cond_init(pthread_cond_t *cond)
{
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(cond, &attributes);
    pthread_condattr_destroy(&attributes);
}

/* ---- fork ---- */

static int started, forked;

static void in_child(void)
{
    forked = started;
}

void mpx_mark_started(void)
{
    __atomic_store_n(&started, 1, __ATOMIC_RELAXED);
}

__attribute__((constructor)) static void watch_forks(void)
{
    pthread_atfork(NULL, NULL, in_child);
}

int mpx_forked(void)
{
    return __atomic_load_n(&forked, __ATOMIC_RELAXED);
}

int32_t mpx_fail_forked(void)
{
    return mpx_fail(MINIPAGED_ERROR_FORKED,
                    "this process is a fork of the one that created the engine: neither its threads nor its "
                    "interpreter work here. Create engines after forking, or use exec.");
}
