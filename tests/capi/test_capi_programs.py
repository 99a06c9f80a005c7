"""C, C++, Node and Rust programs against the library: they build without a warning, run and end in order."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minipaged.cli import config
from minipaged.errors import BackendUnavailableError
from tests.support.capi import answers

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "capi" / "examples"
PROGRAMS = Path(__file__).parent / "programs"
PROMPT = "Where is the king?"


@pytest.fixture(scope="module")
def programs(build) -> dict[str, Path]:
    return {name: build.compile(EXAMPLES / f"{name}.c") for name in ("hello", "chat", "many_threads", "server_loop")}


@pytest.fixture(scope="module")
def lifecycle(build) -> Path:
    return build.compile(PROGRAMS / "lifecycle.c")


def test_examples_are_also_cplusplus(build):
    for source in EXAMPLES.glob("*.c"):
        flags = ["-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{build.include}", "-fsyntax-only"]
        subprocess.run(["c++", "-x", "c++", "-std=c++17", *flags, str(source)], check=True)


def test_hello_is_about_thirty_lines():
    assert len((EXAMPLES / "hello.c").read_text().splitlines()) < 40


def test_hello(build, programs):
    done = build.run(programs["hello"], "tiny", PROMPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == PROMPT + answers("tiny", [PROMPT], 40)[0] + "\n" and done.stderr == ""


@pytest.mark.real_model
def test_hello_with_a_real_model(build, programs):
    from minipaged.model import catalog

    try:
        catalog.resolve("smollm2-135m")
    except Exception as error:
        pytest.skip(f"the model is not here: {error}")
    done = build.run(programs["hello"], "smollm2-135m", "The capital of France is")
    assert (
        done.stdout == "The capital of France is" + answers("smollm2-135m", ["The capital of France is"], 40)[0] + "\n"
    )


def test_examples_fail_loudly(build, programs):
    for program in programs.values():
        done = build.run(program, "no-such-model", stdin=subprocess.DEVNULL)
        assert done.returncode == 1 and "neither a model's name" in done.stderr, program
        assert build.run(program, stdin=subprocess.DEVNULL).returncode == 2


def test_chat_streams_and_keeps_the_conversation(build, programs):
    done = build.run(programs["chat"], "tiny", input='Good "morrow"\nAnd now?\n')
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("> ") == 3


def test_chat_is_interrupted_by_ctrl_c(build, programs):
    import signal
    import time

    process = subprocess.Popen(
        [programs["chat"], "tiny"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdin.write("Speak\n")
    process.stdin.flush()
    assert process.stdout.read(2) == "> "
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.stdin.close()
    process.stdin = None
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")


def test_many_threads(build, programs):
    done = build.run(programs["many_threads"], "tiny", "16", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("16 threads, 32 requests") and "0 requests and 0 blocks left over" in done.stdout


def test_server_loop(build, programs):
    prompts = [f"SCENE {i}. A street.\n" for i in range(5)]
    done = build.run(programs["server_loop"], "tiny", input="".join(prompts))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("5 requests served, 0 failed\n")


def test_the_cplusplus_example(build):
    done = build.run(build.compile(EXAMPLES / "hello.cpp"), "tiny")
    assert done.returncode == 0, done.stderr
    assert answers("tiny", [PROMPT], 32)[0] in done.stdout
    failed = build.run(build.root / "hello_cpp", "no-such-model")
    assert failed.returncode == 1 and "MINIPAGED_ERROR_MODEL_NOT_FOUND" in failed.stderr


def test_the_cplusplus_wrapper(build):
    done = build.run(build.compile(PROGRAMS / "wrapper.cpp"), "tiny-draft")
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def test_the_rust_example(build):
    # rustup's rustc is there without a compiler behind it, too
    if not shutil.which("rustc") or subprocess.run(["rustc", "--version"], capture_output=True).returncode:
        pytest.skip("no working rustc is installed")
    folder, program = build.library.parent, build.root / "hello_rs"
    flags = ["-C", f"link-arg={build.library}", "-C", f"link-arg=-Wl,-rpath,{folder}"]
    subprocess.run(["rustc", "-Dwarnings", str(EXAMPLES / "rust" / "hello.rs"), "-o", str(program), *flags], check=True)
    done = build.run(program, "tiny")
    assert done.returncode == 0 and done.stdout == answers("tiny", [PROMPT], 32)[0] + "\n"
    assert build.run(program, "no-such-model").returncode == 1


def test_the_node_example(build, tmp_path):
    """Where Node and an installed koffi are: NODE_PATH, or a node_modules folder beside the example."""
    folders = [EXAMPLES / "node" / "node_modules", *map(Path, os.environ.get("NODE_PATH", "").split(os.pathsep))]
    modules = next((folder for folder in folders if (folder / "koffi").is_dir()), None)
    if not shutil.which("node") or modules is None:
        pytest.skip("node or its package koffi is not installed")
    shutil.copy(EXAMPLES / "node" / "hello.mjs", tmp_path)
    (tmp_path / "node_modules").symlink_to(modules)
    done = build.run(
        Path(shutil.which("node")), str(tmp_path / "hello.mjs"), "tiny", env={"MINIPAGED_LIBRARY": str(build.library)}
    )
    assert done.returncode == 0, done.stderr
    assert PROMPT + answers("tiny", [PROMPT], 32)[0] in done.stdout


def test_cmake(build, programs, tmp_path):
    if not shutil.which("cmake"):
        pytest.skip("cmake is not installed")
    package = build.library.parent / "cmake" / "minipaged"
    command = ["cmake", "-S", str(EXAMPLES), "-B", str(tmp_path), f"-Dminipaged_DIR={package}"]
    subprocess.run(command, check=True, capture_output=True)
    subprocess.run(
        ["cmake", "--build", str(tmp_path), "--target", "hello", "hello_cpp"], check=True, capture_output=True
    )
    for name in ("hello", "hello_cpp"):
        assert build.run(tmp_path / name, "tiny").returncode == 0
    text = (EXAMPLES / "CMakeLists.txt").read_text().replace("find_package(minipaged 1.0", "find_package(minipaged 2.0")
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "CMakeLists.txt").write_text(text)
    done = subprocess.run(
        ["cmake", "-S", tmp_path / "later", "-B", tmp_path / "later" / "b", command[-1]], capture_output=True, text=True
    )
    assert done.returncode != 0 and "2.0" in done.stderr


def test_pkg_config(build, tmp_path):
    if not shutil.which("pkg-config"):
        pytest.skip("pkg-config is not installed")
    environment = {**os.environ, "PKG_CONFIG_PATH": str(build.library.parent / "pkgconfig")}

    def ask(*arguments: str) -> str:
        command = ["pkg-config", *arguments, "minipaged"]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    flags = ask("--cflags", "--libs").split()
    program = tmp_path / "hello"
    subprocess.run(["cc", str(EXAMPLES / "hello.c"), *flags, "-o", str(program)], check=True)
    assert build.run(program, "tiny").returncode == 0
    assert ask("--modversion") == "1.0.0\n"


def test_config_names_what_is_there(build, monkeypatch, tmp_path):
    monkeypatch.setattr(config, "folder", lambda: build.library.parents[1])
    paths = config.paths()
    assert Path(paths["header"]).is_file() and Path(paths["library"]) == build.library
    assert (Path(paths["pc"]) / "minipaged.pc").is_file()
    assert (Path(paths["cmake"]) / "minipaged-config.cmake").is_file()
    program = tmp_path / "hello"
    flags = paths["cflags"].split() + paths["libs"].split()
    subprocess.run(["cc", str(EXAMPLES / "hello.c"), "-o", str(program), *flags], check=True)
    assert build.run(program, "tiny").returncode == 0


def test_without_a_compiler_the_reason_is_told(build, monkeypatch, tmp_path):
    code = (
        "import sys, pathlib; sys.path.insert(0, 'capi'); import build_capi;"
        "build_capi.build(pathlib.Path(sys.argv[1]))"
    )
    environment = {"PATH": str(tmp_path), "CC": "/nonexistent/cc", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "clib"], cwd=ROOT, env=environment, capture_output=True
    )
    assert done.returncode and b"there is no C compiler" in done.stderr
    monkeypatch.setattr(config, "folder", lambda: tmp_path / "clib")
    with pytest.raises(BackendUnavailableError, match="there is no C compiler; install one"):
        config.paths()
    monkeypatch.setattr(config, "folder", lambda: tmp_path / "nothing")
    with pytest.raises(BackendUnavailableError, match="not installed by pip"):
        config.paths()


# -- the life of a process -------------------------------------------------------------------------------


def test_dlopen_with_local_symbols(build):
    done = build.run(build.compile(PROGRAMS / "dlopen.c"), str(build.library), "tiny-draft")
    assert (done.returncode, done.stdout) == (0, "interface 1000000\n"), done.stderr


@pytest.mark.parametrize("what", ["fork", "fork-first", "exit", "exit-in-callback", "cancel", "again"])
def test_lives(build, lifecycle, what):
    done = build.run(lifecycle, what, "tiny-draft", "4")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_variables_for_another_python_are_not_looked_at(build, lifecycle):
    bad = {"PYTHONHOME": "/nonexistent", "PYTHONPATH": "/nonexistent", "PYTHONSTARTUP": "/nonexistent"}
    assert build.run(lifecycle, "create", "tiny-draft", env=bad).returncode == 0


def test_a_path_beyond_ascii_needs_no_locale(build, programs, tmp_path):
    from minipaged.model import catalog

    path = tmp_path / "mod\u00e8le"
    shutil.copytree(catalog.resolve("tiny-draft"), path)
    done = build.run(programs["hello"], str(path), "Caf\u00e9", env={"LANG": "C", "LC_ALL": "C"})
    assert done.returncode == 0 and done.stdout.startswith("Caf\u00e9"), done.stderr


def test_an_interpreter_that_cannot_start(build, lifecycle, tmp_path):
    done = build.run(lifecycle, "create-twice", "tiny-draft", env={"MINIPAGED_PYTHON": "/nonexistent/python"})
    assert done.returncode == 1 and done.stdout.count("MINIPAGED_ERROR_PYTHON: MINIPAGED_PYTHON is /nonexistent") == 2
    # A prefix with the landmark of a standard library, but none in it.
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    library = tmp_path / "lib" / version
    for folder in (tmp_path / "bin", library / "lib-dynload"):
        folder.mkdir(parents=True)
    (library / "os.py").touch()
    (tmp_path / "bin" / "python").touch()
    done = build.run(
        lifecycle, "create-twice", "tiny-draft", env={"MINIPAGED_PYTHON": str(tmp_path / "bin" / "python")}
    )
    assert done.returncode == 1 and done.stdout.count("MINIPAGED_ERROR_PYTHON: the Python of") == 2, done.stdout


def test_missing_packages(build, lifecycle, tmp_path):
    """An environment without what minipaged needs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    done = build.run(lifecycle, "create-twice", "tiny-draft", env={"MINIPAGED_PYTHON": python})
    assert (
        done.returncode == 1 and done.stdout.count("MINIPAGED_ERROR_PACKAGE: Python cannot import _cffi_backend") == 2
    )


def test_a_package_that_is_missing_only_later(build, lifecycle, tmp_path):
    """cffi and minipaged are there; NumPy is not."""
    import _cffi_backend
    import cffi

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    for module in (Path(cffi.__file__).parent, Path(_cffi_backend.__file__), ROOT / "minipaged"):
        (packages / module.name).symlink_to(module)
    python = str(tmp_path / "venv" / "bin" / "python")
    done = build.run(lifecycle, "create-twice", "tiny-draft", env={"MINIPAGED_PYTHON": python})
    assert (
        done.returncode == 1 and done.stdout.count("MINIPAGED_ERROR_PACKAGE: ModuleNotFoundError: No module named") == 2
    )


# -- soak and fuzz, short --------------------------------------------------------------------------------


def test_a_short_soak(build):
    done = build.run(build.compile(PROGRAMS / "soak.c"), "tiny-draft", "0", "12", "5")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seed", [1, 2])
def test_random_call_sequences(build, seed):
    done = build.run(build.compile(PROGRAMS / "fuzz.c"), "tiny-draft", "400", str(seed))
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr}"
