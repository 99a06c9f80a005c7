/* What the C side and bindings/ know of each other. Python's cffi reads this file as it stands (no
 * directives below the guard), so every declaration is plain C. */

/* Where a call into Python puts its outcome; made by the caller with status MINIPAGED_ERROR_INTERNAL, so that
 * a call that never reaches Python has failed. */
typedef struct mpx_reply {
    int32_t status;
    int32_t number;
    char *data; /* malloc'ed by mpx_reply_data; the caller of Python frees it */
    size_t size;
} mpx_reply;

/* Something an engine is asked to do, in the order of the calls. */
typedef struct mpx_command {
    struct mpx_command *next;
    uint64_t request;
    int32_t kind;    /* 0: cancel; 1: text, 2: tokens, 3: chat JSON to continue */
    int32_t priority;
    int32_t stream;
    int32_t has_salt;
    const char *data; /* text, int32_t tokens or JSON */
    size_t size;      /* bytes */
    const char *sampling; /* JSON object: the fields that were set in minipaged_sampling */
    size_t sampling_size;
    const char *extra; /* the JSON that the caller gave in minipaged_sampling.json; "" if none */
    size_t extra_size;
    const char *salt;
    size_t salt_size;
} mpx_command;

/* ---- C functions that bindings/ calls (they let go of the interpreter lock meanwhile) ---- */

void mpx_reply_error(mpx_reply *reply, int32_t status, const char *text, size_t size);
void mpx_reply_data(mpx_reply *reply, const char *data, size_t size);
void mpx_start_error(int32_t status, const char *text, size_t size);
const char *mpx_build_version(void);
int32_t mpx_own_interpreter(void);

mpx_command *mpx_next_command(void *engine, int32_t wait);
void mpx_free_command(mpx_command *command);
void mpx_log(int32_t level, const char *text, size_t size);
int32_t mpx_log_level(void);
void mpx_close_all(void);
