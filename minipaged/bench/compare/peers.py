"""The engines of a comparison, each in a process of its own, driven over JSON lines."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from minipaged.bench.compare.trace import Timing
from minipaged.errors import BackendUnavailableError, BenchmarkError, ConfigError

RUNNERS = Path(__file__).with_name("runners")
# The script of each kind of engine, run by the Python that the user names.
SCRIPTS = {
    "llamacpp": "run_llamacpp.py",
    "minipaged": "run_minipaged.py",
    "onnxruntime": "run_onnxruntime.py",
    "openvino": "run_openvino.py",
    "transformers": "run_transformers.py",
    "vllm": "run_vllm.py",
}
KINDS = tuple(kind for kind in SCRIPTS if kind != "minipaged")
SYNTAX = "KIND=PROGRAM[:MODEL][,OPTION=VALUE...]"
# What ties a Python to the environment that started us, not to its own.
_OWN_ENVIRONMENT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
_CLOSE_SECONDS = 10


@dataclass(frozen=True)
class PeerSpec:
    """An engine to run: which runner, by which program, on which model, with the engine's own options."""

    name: str
    kind: str
    program: str
    model: str
    options: dict[str, str]


def parse_peer(text: str, default_model: str) -> PeerSpec:
    """``openvino=/venv/bin/python:/models/int8,name=ov-int8,INFERENCE_PRECISION_HINT=f32``."""
    kind, equals, rest = text.partition("=")
    if not equals or kind not in KINDS:
        raise ConfigError(f"peer {text!r}: {kind!r} is no known engine; write {SYNTAX} with one of {', '.join(KINDS)}.")
    where, *pairs = rest.split(",")
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"peer {text!r} has the part {pair!r}; it must be OPTION=VALUE ({SYNTAX}).")
        options[name] = value
    program, _, model = where.partition(":")
    if not os.access(program, os.X_OK) or Path(program).is_dir():
        raise ConfigError(
            f"peer {text!r}: {program!r} is not a program; name the Python that has it."
        )
    name = options.pop("name", kind)
    return PeerSpec(name, kind, program, model or default_model, options)


def own_spec(model: str, mode: str) -> PeerSpec:
    """minipaged in one of its modes (:mod:`minipaged.bench.modes`), by this Python."""
    return PeerSpec(f"minipaged {mode}", "minipaged", sys.executable, model, {"mode": mode})


class Peer:
    """A running engine. Use as a context manager: leaving it ends the process.

    Raises :class:`BackendUnavailableError` if the engine cannot be started or cannot load its model.
    """

    def __init__(self, spec: PeerSpec, limits: dict[str, int], timeout: float):
        self.spec = spec
        self.timeout = timeout
        self._log = tempfile.TemporaryFile()  # the engine's stderr
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            [spec.program, str(RUNNERS / SCRIPTS[spec.kind])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=_environment(spec, limits["num_threads"]),
            text=True,
            encoding="utf-8",
        )
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.about = self._ask(
                {"op": "load", "model": spec.model, "limits": limits, "options": spec.options}, BackendUnavailableError
            )
        except BaseException:
            self.close()
            raise

    def run(self, requests: list[dict]) -> Timing:
        """Time requests that all arrive at once (``{"prompt": [ids], "max_tokens": n}`` each)."""
        answer = self._ask({"op": "run", "requests": requests})
        expected = sum(request["max_tokens"] for request in requests)
        if answer["generated"] != expected:
            raise BenchmarkError(
                f"{self.spec.name} generated {answer['generated']} tokens where {expected} were asked for; "
                "its time cannot be compared."
            )
        return Timing(**answer)

    def peak_rss(self) -> int | None:
        """Most bytes resident at one time since the process began; ``None``: the system does not tell."""
        return self._ask({"op": "memory"})["peak_rss"]

    def close(self) -> None:
        """End the process: politely, then not. Closing twice is harmless."""
        if self._process.poll() is None:
            try:
                self._process.stdin.close()
                self._process.wait(_CLOSE_SECONDS)
            except (OSError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        self._log.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")  # the end

    def _ask(self, message: dict, error: type[Exception] = BenchmarkError) -> dict:
        name = self.spec.name
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=self.timeout)
        except OSError:
            line = ""
        except queue.Empty:
            self._process.kill()  # it is busy with something, and would not hear that its stdin ended
            raise error(
                f"{name} gave no answer to {message['op']!r} in {self.timeout:.0f} s; raise --timeout."
                + self._last_words()
            ) from None
        if not line:
            status = self._process.wait()
            raise error(f"{name} ended with status {status}, not answering {message['op']!r}.{self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise error(
                f"{name} (run by {self.spec.program}) cannot {message['op']}: {answer['error']}.{self._last_words()}"
            )
        return answer["ok"]

    def _last_words(self, count: int = 8) -> str:
        """The end of what the engine wrote to stderr, as an indented block."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 4096))
        lines = self._log.read().decode(errors="replace").splitlines()[-count:]
        return "".join(f"\n  | {line}" for line in lines)


def _environment(spec: PeerSpec, num_threads: int) -> dict[str, str]:
    """Our environment; for other Pythons without what would make them import our packages."""
    if spec.kind == "minipaged":
        root = str(Path(__file__).resolve().parents[3])
        path = os.environ.get("PYTHONPATH")
        return os.environ | {"PYTHONPATH": root + os.pathsep + path if path else root}
    kept = {name: value for name, value in os.environ.items() if name not in _OWN_ENVIRONMENT}
    return kept | {"OMP_NUM_THREADS": str(num_threads)}
