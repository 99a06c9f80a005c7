/* Starting the interpreter: once in a process, in the environment that this library is installed in.
 *
 * The library finds its own path, from that the virtual environment around it (pyvenv.cfg), and starts Python
 * as that environment's own executable would, without looking at PYTHON* variables, which may be meant for
 * another Python. Nothing has to be set. A host that runs Python already keeps its interpreter. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
/* Python.h first: it may define feature macros */
#include "internal.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int running, failed; /* failed: Python does not survive a second attempt */
static int own; /* this library started the interpreter */
static int32_t start_status;
static char start_text[4096];

void mpx_start_error(int32_t status, const char *text, size_t size)
{
    start_status = mpx_fail_text(status, text, size);
}

int32_t mpx_own_interpreter(void)
{
    return own;
}

static int exists(const char *path)
{
    return access(path, F_OK) == 0;
}

/* Cut the last component off a path; 0 if there is none. */
static int parent(char *path)
{
    char *slash = strrchr(path, '/');
    if (!slash || slash == path)
        return 0;
    *slash = 0;
    return 1;
}

/* The directory that holds the package minipaged in which this library lies: .../site-packages. */
static int32_t find_packages(char *path)
{
    Dl_info info;
    if (!dladdr((void *)(uintptr_t)find_packages, &info) || !info.dli_fname || !realpath(info.dli_fname, path) ||
        !parent(path) || !parent(path) || !parent(path) || !parent(path)) /* minipaged/clib/lib/libminipaged.so.1 */
        return mpx_fail(MINIPAGED_ERROR_PYTHON, "libminipaged cannot find out where it is installed.");
    return MINIPAGED_OK;
}

/* The Python executable of the environment: MINIPAGED_PYTHON if set; else that of the virtual environment
 * around the packages; else the one the library was built with. */
static int32_t find_executable(char *path, const char *packages)
{
    const char *chosen = getenv("MINIPAGED_PYTHON");
    char folder[PATH_MAX];
    if (chosen && *chosen) {
        snprintf(path, PATH_MAX, "%s", chosen);
        if (!exists(path))
            return mpx_fail(MINIPAGED_ERROR_PYTHON, "MINIPAGED_PYTHON is %s, which does not exist.", path);
        return MINIPAGED_OK;
    }
    snprintf(folder, sizeof folder, "%s", packages);
    do {
        char candidate[PATH_MAX + 32];
        snprintf(candidate, sizeof candidate, "%s/pyvenv.cfg", folder);
        if (!exists(candidate))
            continue;
        snprintf(candidate, sizeof candidate, "%s/bin/python", folder);
        if (exists(candidate) && strlen(candidate) < PATH_MAX) {
            strcpy(path, candidate);
            return MINIPAGED_OK;
        }
    } while (parent(folder));
    snprintf(path, PATH_MAX, "%s", MINIPAGED_PYTHON_EXECUTABLE);
    if (!exists(path))
        return mpx_fail(MINIPAGED_ERROR_PYTHON,
                        "the Python this library was built with, %s, is not there any more; reinstall minipaged, or "
                        "set MINIPAGED_PYTHON to the Python executable of its environment.",
                        path);
    return MINIPAGED_OK;
}

/* Extension modules take Python's symbols from the global scope, where libpython is not if this library was
 * loaded with RTLD_LOCAL. */
static void promote_libpython(void)
{
    Dl_info info;
    if (dladdr((void *)(uintptr_t)Py_IsInitialized, &info) && info.dli_fname)
        dlopen(info.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
}

static int32_t cannot_start(const char *executable, PyStatus status)
{
    failed = 1;
    return mpx_fail(MINIPAGED_ERROR_PYTHON, "the Python of %s cannot start: %s.", executable,
                    status.err_msg ? status.err_msg : "it gave no reason");
}

static int32_t initialize(const char *executable)
{
    PyPreConfig before;
    PyConfig config;
    PyStatus status;
    PyPreConfig_InitIsolatedConfig(&before);
    before.utf8_mode = 1; /* a C program that sets no locale has one in which paths are ASCII */
    status = Py_PreInitialize(&before);
    if (PyStatus_Exception(status))
        return cannot_start(executable, status);
    PyConfig_InitIsolatedConfig(&config);
    config.install_signal_handlers = 0;
    status = PyConfig_SetBytesString(&config, &config.program_name, executable);
    if (!PyStatus_Exception(status))
        status = PyConfig_SetBytesString(&config, &config.executable, executable);
    if (!PyStatus_Exception(status))
        status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    if (PyStatus_Exception(status))
        return cannot_start(executable, status);
    PyEval_SaveThread();
    own = 1;
    return MINIPAGED_OK;
}

/* Import a module; else keep what Python says about it. */
static int can_import(const char *name, char *reason, size_t size)
{
    PyObject *type, *value, *traceback, *text;
    PyObject *module = PyImport_ImportModule(name);
    if (module) {
        Py_DECREF(module);
        return 1;
    }
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    text = value ? PyObject_Str(value) : NULL;
    snprintf(reason, size, "%s", text && PyUnicode_AsUTF8(text) ? PyUnicode_AsUTF8(text) : "unknown error");
    PyErr_Clear();
    Py_XDECREF(text);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    return 0;
}

static void add_packages(const char *packages)
{
    PyObject *site = PyImport_ImportModule("site");
    PyObject *done = site ? PyObject_CallMethod(site, "addsitedir", "s", packages) : NULL;
    PyErr_Clear();
    Py_XDECREF(done);
    Py_XDECREF(site);
}

static int32_t check_packages(const char *packages)
{
    static const char *const names[] = {"_cffi_backend", "minipaged"};
    char reason[2048];
    int32_t status = MINIPAGED_OK;
    PyGILState_STATE state = PyGILState_Ensure();
    for (size_t i = 0; !status && i < sizeof names / sizeof *names; i++)
        if (!can_import(names[i], reason, sizeof reason)) {
            add_packages(packages); /* installed with --user or --target, or loaded by another environment's Python */
            if (!can_import(names[i], reason, sizeof reason))
                status = mpx_fail(MINIPAGED_ERROR_PACKAGE,
                                  "Python cannot import %s: %s. Install minipaged and what it depends on in the "
                                  "environment of %s.",
                                  names[i], reason, packages);
        }
    PyGILState_Release(state);
    return status;
}

static int32_t start(void)
{
    char packages[PATH_MAX], executable[PATH_MAX];
    int32_t status;
    if ((status = find_packages(packages)))
        return status;
    promote_libpython();
    if (!Py_IsInitialized() &&
        ((status = find_executable(executable, packages)) || (status = initialize(executable))))
        return status;
    mpx_mark_started();
    if ((status = check_packages(packages)) || (status = mpx_handover_start()))
        return status;
    if (mpx_cffi_start() < 0 || start_status) {
        failed = 1;
        return start_status ? start_status
                            : mpx_fail(MINIPAGED_ERROR_PYTHON, "the Python side could not start; see stderr.");
    }
    return MINIPAGED_OK;
}

int32_t mpx_python_start(void)
{
    int32_t status = MINIPAGED_OK;
    pthread_mutex_lock(&lock);
    if (failed) {
        status = mpx_fail_text(start_status, start_text, strlen(start_text));
    } else if (!running) {
        status = start();
        running = !status;
        if (failed) {
            start_status = status;
            snprintf(start_text, sizeof start_text, "%s", minipaged_error());
        }
    }
    pthread_mutex_unlock(&lock);
    return status;
}
