/* A plug-in's way: the library opened at run time, with its symbols kept local. Usage: dlopen LIBRARY MODEL */
#include <dlfcn.h>
#include <minipaged.h>
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv)
{
    int32_t (*create)(minipaged_engine **, const char *, const minipaged_engine_options *);
    int32_t (*destroy)(minipaged_engine *);
    int32_t (*version)(void);
    const char *(*error)(void);
    minipaged_engine *engine;
    void *library, *symbol;
    int failed;
    if (argc != 3)
        return 64;
    library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        puts(dlerror());
        return 1;
    }
#define GET(function, name) (symbol = dlsym(library, name), memcpy(&function, &symbol, sizeof symbol))
    GET(create, "minipaged_engine_create");
    GET(destroy, "minipaged_engine_destroy");
    GET(version, "minipaged_api_version");
    GET(error, "minipaged_error");
    printf("interface %d\n", (int)version());
    failed = create(&engine, argv[2], NULL);
    if (failed)
        puts(error());
    else
        failed = destroy(engine);
    dlclose(library); /* harmless: it stays, as the interpreter does */
    return failed ? 1 : 0;
}
