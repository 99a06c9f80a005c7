"""The command as a process: start-up, pipes, signals, exit codes."""

import os
import signal
import subprocess
import sys

import pytest

import minipaged

COMMAND = [sys.executable, "-m", "minipaged"]
TINY = ["--model", "tiny-draft", "--device", "reference"]


def run(*arguments, **options):
    return subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=120, **options)


def test_version():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"minipaged {minipaged.__version__}\n".encode())


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from minipaged.cli.main import main\n"
        "try:\n    main(['generate', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'numpy', 'numba', 'tokenizers', 'jinja2', 'gguf', 'tqdm', 'logging'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_generate_writes_only_text_to_a_pipe():
    done = run("generate", *TINY, "--raw", "--max-tokens", "8", "--stats", "ROMEO:")
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("utf-8")
    assert text.endswith("\n") and "ROMEO:" not in text and "\x1b" not in text
    assert b"8 generated" in done.stderr


def test_no_argument_reads_stdin():
    with_argument = run("generate", *TINY, "--max-tokens", "5", "Who is the king?")
    from_stdin = run("generate", *TINY, "--max-tokens", "5", input=b"Who is the king?\n")
    assert from_stdin.stdout == with_argument.stdout != b""


def test_an_argument_that_is_not_utf8():
    done = run("generate", *TINY, b"caf\xe9")
    assert done.returncode == 2
    assert b"minipaged: error: argument 6 is not valid UTF-8" in done.stderr
    assert b"Traceback" not in done.stderr and done.stdout == b""


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen(
        [*COMMAND, "generate", *TINY, "--raw", "--ignore-eos", "--max-tokens", "400", "ROMEO:"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


def test_ctrl_c_ends_generate_with_130():
    process = subprocess.Popen(
        [*COMMAND, "generate", "--model", "tiny", "--device", "reference", "--raw", "--ignore-eos"]
        + ["--max-tokens", "500", "ROMEO:"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: os.nice(19),  # beside other load it must not be through before the signal is sent
    )
    assert process.stdout.read(1)  # it streams: there is text before the end
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert b"Traceback" not in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_an_error_not_a_bug():
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*COMMAND, "models"], stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 2
    assert b"No space left" in done.stderr and done.stderr.count(b"\n") == 1


def test_an_ascii_terminal_gets_replacements():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run("generate", *TINY, "--raw", "--json", "--max-tokens", "1", "caf\u00e9", env=environment)
    assert done.returncode == 0, done.stderr
    assert b'"prompt": "caf?"' in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    "arguments, closed, code, message",
    [
        (["generate", *TINY, "--max-tokens", "3", "x"], ">&-", 0, b""),
        (["generate", *TINY, "--max-tokens", "3", "x"], "<&- >&- 2>&-", 0, b""),
        (["models"], ">&-", 0, b""),
        (["generate", *TINY], "<&-", 2, b"the prompt is empty"),
        (["chat", "--model", "tiny", "--device", "reference"], "<&-", 0, b""),
    ],
)
def test_closed_standard_streams_are_not_written_or_read(arguments, closed, code, message):
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", *COMMAND, *arguments], capture_output=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    assert message in done.stderr and b"Traceback" not in done.stderr and b"internal" not in done.stderr
