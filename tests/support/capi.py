"""The C library built from this checkout, called in-process through cffi or by programs in C."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import cffi
import pytest

from minipaged import LLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "capi"))

import build_capi  # noqa: E402

STRICT = ("-g", "-pedantic", "-Wall", "-Wextra", "-Werror", "-pthread")
PROGRAMS = ROOT / "tests" / "capi" / "programs"
PROMPTS = ["ROMEO:\n", "Where is the king?", "SCENE 2. A street.\n", "Caf\u00e9 \u2603 \U0001f600"]
EXAMPLES = ROOT / "capi" / "examples"


class Build:
    """A build of the library, and what runs programs against it."""

    def __init__(self, root: Path, cflags: tuple[str, ...] = ()):
        self.root = root
        self.cflags = cflags
        # As it is installed: the library finds its packages four folders up.
        for package in ("minipaged", "cuda_kernels"):
            (root / package).symlink_to(ROOT / package)
        try:
            self.library = build_capi.build(root / "build" / "clib", list(cflags))
        except build_capi.CannotBuild as error:
            pytest.skip(f"libminipaged cannot be built here: {error}")
        self.include = self.library.parents[1] / "include"

    def compile(self, source: Path, *flags: str) -> Path:
        """Compile and link one program; warnings are errors."""
        program = self.root / f"{source.stem}{source.suffix.replace('.', '_')}"
        cplusplus = source.suffix == ".cpp"
        standard = "-std=c++17" if cplusplus else "-std=gnu11" if PROGRAMS in source.parents else "-std=c99"
        link = (f"-L{self.library.parent}", f"-Wl,-rpath,{self.library.parent}", f"-l:{self.library.name}")
        compiler = "c++" if cplusplus else "cc"
        includes = f"-I{self.include}"
        command = [compiler, standard, *STRICT, *self.cflags, *flags, includes, str(source), "-o", str(program), *link]
        subprocess.run(command, check=True)
        return program

    def run(self, program: Path, *arguments: str, timeout: float = 120, env: dict | None = None, **options):
        """Run a program with nothing set that could help it find Python or minipaged."""
        keep = ("PATH", "HOME", "MINIPAGED_HOME", "XDG_CACHE_HOME", "LANG", "OPENBLAS_NUM_THREADS")
        environment = {name: os.environ[name] for name in keep if name in os.environ} | (env or {})
        options = {"capture_output": True, "text": True, "errors": "replace"} | options
        return subprocess.run([str(program), *arguments], timeout=timeout, env=environment, **options)


class Api:
    """The header's functions and constants by their names without prefix; errors come back as they are."""

    def __init__(self, library: Path):
        header = build_capi.header_text()
        self.ffi = cffi.FFI()
        self.ffi.cdef(build_capi.declarations(header))
        self.lib = self.ffi.dlopen(str(library))  # RTLD_LOCAL, as Python's own modules
        self.UNSET, self.FOREVER, self.ZSTRING = -(2**31), -1, 2 ** (8 * self.ffi.sizeof("size_t")) - 1
        self.functions = build_capi.exports()
        self.defaults = {
            name: self._default(f"minipaged_{name}")
            for name in ("engine_options", "sampling", "request_options", "request_info", "choice_info", "reader")
            + ("model_info", "stats")
        }

    def __getattr__(self, name: str):
        return getattr(self.lib, f"minipaged_{name}")

    def _default(self, kind: str):
        """What the INIT macro gives: numbers that may be unset are, all others are 0."""
        made = self.ffi.new(f"{kind} *")
        made.struct_size = self.ffi.sizeof(kind)
        unset = {
            "minipaged_engine_options": "num_blocks kv_cache_memory max_model_len swap_space block_size max_num_seqs "
            "max_num_batched_tokens num_threads enable_prefix_caching",
            "minipaged_sampling": "n max_tokens min_tokens temperature top_p min_p presence_penalty "
            "frequency_penalty repetition_penalty top_k ignore_eos include_stop_str_in_output skip_special_tokens "
            "logprobs prompt_logprobs best_of beam_width early_stopping length_penalty",
        }
        for field in unset.get(kind, "").split():
            setattr(made, field, self.UNSET)
        return made

    def struct(self, name: str, **fields):
        """A struct as its INIT macro makes it, with some fields changed; texts are kept alive with it."""
        made = self.ffi.new(f"minipaged_{name} *", self.defaults[name][0])
        alive = []
        for field, value in fields.items():
            if isinstance(value, (str, bytes)):
                value = self.ffi.new("char[]", value.encode() if isinstance(value, str) else value)
                alive.append(value)
            setattr(made, field, value)
        _ALIVE[made] = alive
        return made

    def error_text(self) -> str:
        return self.ffi.string(self.error()).decode()

    def check(self, status: int) -> int:
        assert status >= 0, f"{self.ffi.string(self.status_name(status)).decode()}: {self.error_text()}"
        return status

    def create(self, model: str = "tiny-draft", **options):
        options = {"device": "reference", "num_blocks": 256, "json": '{"check_integrity": true}'} | options
        handle = self.ffi.new("minipaged_engine **")
        self.check(self.engine_create(handle, model.encode(), self.struct("engine_options", **options)))
        return handle[0]

    def submit(self, engine, prompt, sampling=None, options=None, chat: bool = False) -> int:
        number = self.ffi.new("minipaged_request *")
        sampling, options = sampling or self.ffi.NULL, options or self.ffi.NULL
        if isinstance(prompt, list):
            self.check(self.submit_tokens(number, engine, prompt, len(prompt), sampling, options))
        else:
            submit = self.submit_chat if chat else self.submit_text
            self.check(submit(number, engine, prompt.encode(), self.ZSTRING, sampling, options))
        return number[0]

    def sized(self, function, *arguments, kind: str = "char"):
        """Call a function of the form (buffer, capacity, length) for everything it has."""
        length = self.ffi.new("size_t *")
        self.check(function(*arguments, self.ffi.NULL, 0, length))
        size = length[0] + (kind == "char")
        buffer = self.ffi.new(f"{kind}[]", max(size, 1))
        self.check(function(*arguments, buffer, size, length))
        if kind == "char":
            return self.ffi.buffer(buffer, length[0])[:].decode()
        return self.ffi.unpack(buffer, length[0]) if length[0] else []

    def text(self, engine, request: int, choice: int = 0) -> str:
        return self.sized(self.request_text, engine, request, choice)

    def tokens(self, engine, request: int, choice: int = 0) -> list[int]:
        return self.sized(self.request_tokens, engine, request, choice, kind="int32_t")

    def logprobs(self, engine, request: int, choice: int, position: int) -> list[SimpleNamespace]:
        found = self.sized(self.request_logprobs, engine, request, choice, position, kind="minipaged_logprob")
        return [SimpleNamespace(token_id=e.token_id, rank=e.rank, logprob=e.logprob) for e in found]

    def filled(self, function, name: str, *arguments):
        """A struct that a function fills."""
        made = self.struct(name)
        self.check(function(*arguments, made))
        return made


_ALIVE: dict = weakref.WeakKeyDictionary()


class Listener:
    """Collects the chunks of requests; ``answer`` may decide what the callback returns."""

    def __init__(self, api, answer=None):
        self.chunks: list[dict] = []
        self.answer = answer
        self.threads = set()
        self.ffi = api.ffi
        self.callback = api.ffi.callback("minipaged_chunk_fn", self.take, onerror=self.note, error=1)
        self.errors = []

    def note(self, kind, error, trace):
        self.errors.append(error)

    def take(self, chunk, user_data):
        self.threads.add(threading.get_ident())
        self.chunks.append(
            {
                "request": chunk.request,
                "choice": chunk.choice,
                "tokens": self.ffi.unpack(chunk.token_ids, chunk.num_tokens) if chunk.num_tokens else [],
                "text": self.ffi.buffer(chunk.text, chunk.text_length)[:].decode(),
                "reason": chunk.choice_finish_reason,
                "finished": chunk.finished,
                "status": chunk.status,
                "error": self.ffi.string(chunk.error).decode(),
                "produced_ns": chunk.produced_ns,
            }
        )
        return self.answer(chunk) if self.answer else 0

    def tokens(self, choice: int = 0) -> list[int]:
        return [token for chunk in self.chunks if chunk["choice"] == choice for token in chunk["tokens"]]

    def text(self, choice: int = 0) -> str:
        return "".join(chunk["text"] for chunk in self.chunks if chunk["choice"] == choice)


def wait_until(condition, seconds: float = 20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def answers(model: str, prompts: list[str], max_tokens: int) -> list[str]:
    """What Python gives for what the examples ask (with the same defaults: device "auto")."""
    with LLM(model) as llm:
        params = llm.default_sampling_params().clone(temperature=0, max_tokens=max_tokens)
        return [output.outputs[0].text for output in llm.generate(prompts, params)]
