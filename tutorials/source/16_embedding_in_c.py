# %% [markdown] en
# # 16 · Embedding the engine in C
#
# **Goal.** A C program that links `libminipaged`, runs four requests as one batch and handles errors; and why such an
# interface can grow for years without breaking programs. About 12 minutes. You should be able to read C.
#
# The library is built when minipaged is installed, if a C compiler and Python's headers are there (Linux). Where they
# are not, this notebook says so and goes on; the exercise needs neither.

# %% [markdown] tr
# # 16 · Motoru C'ye gömmek
#
# **Amaç.** `libminipaged` ile bağlanan, dört isteği tek yığın hâlinde çalıştıran ve hataları ele alan bir C programı
# yazmak; böyle bir arayüzün, programları bozmadan yıllarca nasıl büyüyebildiğini anlamak. Yaklaşık 12 dakika. C
# okuyabilmeniz yeterli.
#
# Kitaplık, minipaged kurulurken derlenir; bunun için bir C derleyicisi ile Python'ın başlık dosyaları gerekir
# (Linux). Bunlar yoksa not defteri bunu söyleyip devam eder; alıştırma ikisini de istemez.

# %%
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minipaged import LLM, SamplingParams
from minipaged.cli.config import paths
from minipaged.errors import BackendUnavailableError
from tutorials.course import check

# %% [markdown] en
# ## Naive: start a process for each prompt
#
# Every program can run another one. `minipaged generate` answers a prompt and ends. How long does that take, and how
# much of it is the answer?

# %% [markdown] tr
# ## İlk akla gelen çözüm: her istem için bir süreç başlatmak
#
# Her program bir başkasını çalıştırabilir. `minipaged generate` bir istemi yanıtlayıp biter. Bu ne kadar sürüyor,
# sürenin ne kadarı yanıtın kendisine gidiyor?

# %% [varies]
PROMPTS = ["ROMEO:", "JULIET:", "First Citizen:", "Where is the king?"]
NUM_TOKENS = 12

started = time.perf_counter()
command = [sys.executable, "-m", "minipaged", "generate", "--model", "tiny", "--device", "reference"]
command += ["--num-threads", "1", "--temperature", "0", "--max-tokens", str(NUM_TOKENS), PROMPTS[0]]
finished = subprocess.run(command, capture_output=True, text=True, check=True)
process_seconds = time.perf_counter() - started

with LLM("tiny", device="reference", num_threads=1) as llm:
    greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    llm.generate(PROMPTS, greedy)
    started = time.perf_counter()
    outputs = llm.generate(PROMPTS, greedy)
    batch_seconds = time.perf_counter() - started
expected = [output.outputs[0].text for output in outputs]
print(f"one process, one prompt: {process_seconds:.2f} s; four prompts in a running engine: {batch_seconds:.2f} s")
assert finished.stdout.strip()
assert batch_seconds < process_seconds

# %% [markdown] en
# Nearly all of it is starting: an interpreter, a model, a pool. And four processes share nothing: no weights, no
# batch, no prefix cache.
#
# ## New: the engine inside your program
#
# ```
# your program ──▶ libminipaged.so ──▶ an embedded Python ──▶ the same engine
#      ▲  engine *, request ids, UTF-8            │ its own thread, all requests in one batch
#      └────────── wait, poll, read, callback ────┘
# ```
#
# Python is inside, but you never see it: the header is C99, handles are opaque, and what goes in is copied. Three
# habits make it safe. Every function returns a status: 0, positive (information) or negative (an error whose text is
# `minipaged_error()`). A request is a 64-bit number, so a stale one is an error rather than a crash. Structs begin
# with their size.

# %% [markdown] tr
# Sürenin neredeyse tamamı başlatmaya gidiyor: yorumlayıcı, model, havuz. Üstelik dört süreç hiçbir şey paylaşmıyor:
# ne ağırlıkları, ne yığını, ne önek önbelleğini.
#
# ## Yeni çözüm: motor programınızın içinde
#
# ```
# your program ──▶ libminipaged.so ──▶ an embedded Python ──▶ the same engine
#      ▲  engine *, request ids, UTF-8            │ its own thread, all requests in one batch
#      └────────── wait, poll, read, callback ────┘
# ```
#
# İçeride Python var, ama onu hiç görmezsiniz: başlık dosyası C99'dur, tutamaçlar (handle) opaktır, verdikleriniz
# kopyalanır. Üç alışkanlık bunu güvenli kılar. Her fonksiyon bir durum döndürür: 0, artı (bilgi) ya da eksi (metni
# `minipaged_error()` olan hata). İstek 64 bitlik bir sayıdır; eskimiş bir istek çökme değil, hata üretir. Yapılar
# (struct) kendi boylarıyla başlar.

# %%
PROGRAM = r"""
#include <minipaged.h>
#include <stdio.h>

int main(int argc, char **argv)
{
    minipaged_engine *engine = NULL;
    minipaged_engine_options options = MINIPAGED_ENGINE_OPTIONS_INIT;
    minipaged_sampling sampling = MINIPAGED_SAMPLING_INIT;
    minipaged_request requests[16];
    char text[4096];
    int i, failed, n = argc - 1;

    options.device = "reference";
    options.num_threads = 1;
    sampling.temperature = 0;
    sampling.max_tokens = 12;
    failed = n > 16 || minipaged_engine_create(&engine, "tiny", &options);
    for (i = 0; i < n && !failed; i++)   /* submit all of them: one batch */
        failed = minipaged_submit_text(&requests[i], engine, argv[i + 1], MINIPAGED_ZSTRING, &sampling, NULL);
    for (i = 0; i < n && !failed; i++) {
        failed = minipaged_wait(engine, requests[i], MINIPAGED_FOREVER) ||
                 minipaged_request_text(engine, requests[i], 0, text, sizeof text, NULL);
        if (!failed)
            printf("%s%c", text, 0);
    }
    if (failed)
        fprintf(stderr, "%s\n", minipaged_error());
    minipaged_engine_destroy(engine);    /* frees the requests too; NULL is harmless */
    return failed != 0;
}
"""


def why_not():
    """What is missing for a C program, or None."""
    if shutil.which("cc") is None:
        return "there is no C compiler (cc) here"
    try:
        paths()
    except BackendUnavailableError as error:
        return str(error)
    return None


def build_and_run(source, *arguments):
    """Compile as strict C99 with the flags of `minipaged config --cflags --libs`, and run."""
    flags = paths()
    # Finds the minipaged of this notebook, wherever it is installed.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    with tempfile.TemporaryDirectory() as folder:
        file, program = Path(folder, "program.c"), Path(folder, "program")
        file.write_text(source)
        compile_it = ["cc", "-std=c99", "-Wall", "-Werror", str(file), *flags["cflags"].split(), *flags["libs"].split()]
        subprocess.run([*compile_it, "-o", str(program)], check=True)
        return subprocess.run([str(program), *arguments], capture_output=True, text=True, env=environment)


# %% [varies]
missing = why_not()
if missing:
    print("The C program cannot be built on this machine:", missing)
else:
    done = build_and_run(PROGRAM, *PROMPTS)
    texts = done.stdout.split("\0")[:-1]
    for prompt, text in zip(PROMPTS, texts, strict=True):
        print(repr(prompt + text))
    assert done.returncode == 0 and texts == expected  # the same tokens as from Python

# %% [markdown] en
# The C program said the same as Python, token for token. And when something is wrong? The status is negative, and the
# text names what was seen, the limit and the remedy; the process lives on.

# %% [markdown] tr
# C programı, token token Python'la aynı şeyi söyledi. Peki bir şey ters giderse? Durum eksi olur; metin, görülen
# değeri, sınırı ve çaresini söyler; süreç yaşamayı sürdürür.

# %% [varies]
if missing:
    print("not run:", missing)
else:
    done = build_and_run(PROGRAM.replace("sampling.max_tokens = 12", "sampling.max_tokens = 100000"), PROMPTS[0])
    print("exit status", done.returncode, "-", done.stderr.strip())
    assert done.returncode == 1 and "max_model_len" in done.stderr

# %% [markdown] en
# ## Exercise: structs that may grow
#
# Programs and library are updated at different times. The rule of the header: fields are only appended, and each
# struct begins with the size that the **program** was compiled with. A newer library meets a smaller struct and fills
# in defaults. An older library meets a larger one, and must refuse it if a field that it does not know is set,
# because ignoring it silently would be wrong.

# %% [markdown] tr
# ## Alıştırma: büyüyebilen yapılar
#
# Programlarla kitaplık farklı zamanlarda güncellenir. Başlık dosyasının kuralı: alanlar yalnızca sona eklenir ve her
# yapı, **programın** derlendiği boyla başlar. Daha yeni bir kitaplık daha küçük bir yapıyla karşılaşırsa kalanı
# varsayılanlarla doldurur. Daha eski bir kitaplık daha büyük bir yapıyla karşılaşır ve bilmediği bir alan doluysa onu
# geri çevirmek zorundadır; sessizce yok saymak yanlış olurdu.

# %% [exercise] accept_struct
def accept_struct(given, defaults):
    """What a library makes of a program's struct.

    given     bytes   the program's struct; its first 4 bytes, little-endian, are its size
    defaults  bytes   the library's own struct, every field at its default
    returns   bytes, as long as defaults: its first 4 bytes are those of defaults, then the fields that both know, as
              given, then the defaults of the fields that the program does not know
    raises    ValueError if the size is below 4, or a byte behind what the library knows is not zero
    (roughly 8 lines)
    """
    raise NotImplementedError


# %% [solution] accept_struct
def accept_struct(given, defaults):
    size = int.from_bytes(given[:4], "little")
    if size < 4:
        raise ValueError(f"struct_size is {size}; it is at least 4")
    if any(given[len(defaults) : size]):
        raise ValueError("a field that this library does not know is set; use a newer library")
    known = min(size, len(defaults))
    return defaults[:4] + given[4:known] + defaults[known:]


# %% [check] accept_struct
def check_accept_struct(accept_struct):
    def struct(*fields, size=None):
        size = 4 + len(fields) if size is None else size
        return size.to_bytes(4, "little") + bytes(fields)

    defaults = struct(1, 2, 3, 4)
    same = accept_struct(struct(9, 8, 7, 6), defaults)
    assert same == struct(9, 8, 7, 6), f"program and library of one version: all fields as given, not {list(same)}"
    small = accept_struct(struct(9, 8), defaults)
    assert len(small) == 8, f"the library works with its own struct of 8 bytes; you returned {len(small)} bytes"
    assert small[4:] == bytes([9, 8, 3, 4]), (
        f"an older program knows two fields: [9, 8] as given, [3, 4] by default; you returned {list(small[4:])}"
    )
    assert small[:4] == defaults[:4], "the first four bytes are the library's own size"
    stray = accept_struct(struct(9, 8, 77, 77, size=6), defaults)
    assert stray[4:] == bytes([9, 8, 3, 4]), "only struct_size bytes are the program's; what lies behind is not its own"
    try:
        large = accept_struct(struct(9, 8, 7, 6, 0, 0), defaults)
    except ValueError:
        raise AssertionError("a newer program that leaves the unknown fields at zero must be accepted") from None
    assert large == struct(9, 8, 7, 6), f"what the library does not know is left out; you returned {list(large)}"
    impossible = (struct(9, 8, 7, 6, 0, 5), "an unknown field is set"), (struct(size=3), "struct_size 3 is impossible")
    for bad, why in impossible:
        try:
            accept_struct(bad, defaults)
        except ValueError:
            continue
        raise AssertionError(f"{why}, so ValueError must be raised; nothing was")


check("accept_struct", check_accept_struct, accept_struct)


# %% [wrong] accept_struct: must be accepted
def accept_struct(given, defaults):  # refuses every newer program
    size = int.from_bytes(given[:4], "little")
    if not 4 <= size <= len(defaults):
        raise ValueError("wrong size")
    return defaults[:4] + given[4:size] + defaults[size:]


# %% [wrong] accept_struct: an unknown field is set, so ValueError must be raised
def accept_struct(given, defaults):  # ignores what it does not know
    size = int.from_bytes(given[:4], "little")
    if size < 4:
        raise ValueError("wrong size")
    known = min(size, len(defaults))
    return defaults[:4] + given[4:known] + defaults[known:]


# %% [wrong] accept_struct: \[9, 8\] as given, \[3, 4\] by default
def accept_struct(given, defaults):  # zeros instead of defaults
    size = int.from_bytes(given[:4], "little")
    if size < 4 or any(given[len(defaults) : size]):
        raise ValueError("refused")
    return defaults[:4] + given[4 : min(size, len(defaults))].ljust(len(defaults) - 4, b"\0")


# %% [wrong] accept_struct: only struct_size bytes are the program's
def accept_struct(given, defaults):  # goes by the bytes there are, not by struct_size
    if int.from_bytes(given[:4], "little") < 4 or any(given[len(defaults) :]):
        raise ValueError("refused")
    known = min(len(given), len(defaults))
    return defaults[:4] + given[4:known] + defaults[known:]


# %% [markdown] en
# ## What to read next
#
# - [`minipaged.h`](../../capi/include/minipaged.h): the header is the manual, and
#   [`minipaged.hpp`](../../capi/include/minipaged.hpp) wraps it for C++17.
# - [`examples`](../../capi/examples): 64 threads on one engine, a chat that Ctrl-C interrupts, a polling server, and
#   the same in C++, Rust and Node.
# - [`abi`](../../capi/abi): symbols, sizes and offsets as they were released; a test compares.
#
# Next: [17, a day in production](17_a_day_in_production.ipynb).

# %% [markdown] tr
# ## Sırada ne okumalı?
#
# - [`minipaged.h`](../../capi/include/minipaged.h): başlık dosyası aynı zamanda kılavuzdur;
#   [`minipaged.hpp`](../../capi/include/minipaged.hpp) onu C++17 için sarar.
# - [`examples`](../../capi/examples): tek motorda 64 iş parçacığı, Ctrl-C ile kesilebilen bir sohbet, yoklamayla
#   çalışan bir sunucu ve aynısının C++, Rust ve Node hâli.
# - [`abi`](../../capi/abi): yayımlandıkları hâliyle simgeler, boylar ve konumlar; bir test bunları karşılaştırır.
#
# Sonraki adım: [17, üretimde bir gün](17_a_day_in_production.ipynb).
