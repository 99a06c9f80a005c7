"""The commands, run in the test process."""

import io
import json
import shutil

import pytest

from minipaged import LLM, SamplingParams
from minipaged.cli import main as cli_main
from minipaged.cli.chat import Conversation
from minipaged.errors import DownloadError, LicenseNotAcceptedError, PromptTooLongError
from minipaged.model import catalog
from minipaged.outputs import CompletionOutput, RequestOutput

TINY = ("--model", "tiny-draft", "--device", "reference")
SHORT = (*TINY, "--max-tokens", "6")


@pytest.fixture(scope="module")
def llm():
    with LLM("tiny-draft", device="reference") as model:
        yield model


# -- generate -------------------------------------------------------------------------------------


def test_generate_raw_continues_the_text(cli, llm):
    expected = llm.generate("ROMEO:", SamplingParams(temperature=0, max_tokens=6))[0].outputs[0].text
    code, out, _ = cli("generate", *SHORT, "--raw", "ROMEO:")
    assert (code, out.rstrip("\n")) == (0, expected.rstrip("\n"))


def test_generate_uses_the_chat_template(cli, llm):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    expected = llm.chat(messages, SamplingParams(temperature=0, max_tokens=6))[0].outputs[0].text
    code, out, _ = cli("generate", *SHORT, "--system", "Be brief.", "Who?")
    assert (code, out.rstrip("\n")) == (0, expected.rstrip("\n"))


def test_generate_json_lines_of_several_prompts(cli, tmp_path):
    (tmp_path / "third.txt").write_bytes(b"third\n")
    prompts = ("first", "-", "--file", tmp_path / "third.txt")
    code, out, _ = cli("generate", *SHORT, "--json", "--raw", *prompts, stdin=b"2")
    results = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [result["prompt"] for result in results] == ["first", "2", "third"]
    assert all(len(result["outputs"][0]["token_ids"]) == 6 and result["finished"] for result in results)


def test_generate_several_continuations(cli, llm):
    params = SamplingParams(n=3, temperature=0.9, seed=4, max_tokens=6)
    expected = [c.text for c in llm.generate("ROMEO:", params)[0].outputs]
    flags = ("--n", "3", "--temperature", "0.9", "--seed", "4", "--stats")
    code, out, err = cli("generate", *SHORT, *flags, "--raw", "ROMEO:")
    assert (code, out) == (0, "---\n".join(text.removesuffix("\n") + "\n" for text in expected))
    assert "18 generated" in err


def test_generate_with_beams(cli, llm):
    """--beam-width alone asks for beam search."""
    expected = llm.beam_search("ROMEO:", beam_width=4, n=2, max_tokens=6, length_penalty=0.5, early_stopping="never")
    flags = ("--beam-width", "4", "--n", "2", "--length-penalty", "0.5", "--early-stopping", "never", "--json")
    code, out, _ = cli("generate", *SHORT, *flags, "--raw", "ROMEO:")
    outputs = json.loads(out)["outputs"]
    assert code == 0
    assert [(o["token_ids"], o["beam_score"]) for o in outputs] == [
        (c.token_ids, pytest.approx(c.beam_score, abs=1e-4)) for c in expected[0].outputs
    ]


def test_generate_several_prompts_as_text(cli):
    singles = [cli("generate", *SHORT, "--raw", prompt)[1] for prompt in ("ROMEO:", "JULIET:")]
    code, out, _ = cli("generate", *SHORT, "--raw", "ROMEO:", "JULIET:")
    assert (code, out) == (0, "\n".join(singles))


def test_generate_without_max_tokens_stops_at_the_model_length(cli):
    """256 tokens unless told otherwise, and less where the prompt leaves no room for them."""
    arguments = ("generate", *TINY, "--raw", "--ignore-eos", "--json", "ROMEO:")
    _, out, _ = cli(*arguments)
    assert len(json.loads(out)["outputs"][0]["token_ids"]) == 256
    _, out, _ = cli(*arguments, "--max-model-len", "20")
    result = json.loads(out)
    assert len(result["prompt_token_ids"]) + len(result["outputs"][0]["token_ids"]) == 20


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["generate", *TINY, ""], "the prompt is empty"),
        (["generate", *TINY, "a", ""], "prompt 2 of 2 is empty"),
        (["generate", *TINY, "-", "-"], "only once"),
        (["generate", *TINY, "--file", "/absent/prompt.txt"], "cannot read the prompt file"),
        (["generate", *TINY, "--raw", "--system", "x", "a"], "--system"),
        (["generate", *TINY, "--top-p", "2", "a"], "top_p is 2.0"),
        (["generate", *TINY, "--block-size", "3", "a"], "block_size is 3"),
        (["generate", *TINY, "--max-tokens", "5000", "a"], "max_model_len (512)"),
        (["generate", *TINY, "--stop-token-ids", "5000", "a"], "5000"),
        (["generate", "--model", "tinny", "a"], "Did you mean 'tiny'?"),
        (["generate", *TINY[:2], "--device", "reference", "--quantization", "int4", "a"], "quantization"),
        (["chat", *TINY, "--temperature", "-1"], "temperature is -1"),
        (["inspect", "/absent"], "/absent"),
        (["pull", "tinny"], "Did you mean"),
        (["bench", "latency", *TINY, "--batch-size", "65"], "max_num_seqs (64)"),
        (["bench", "latency", *TINY, "--num-blocks", "40", "--batch-size", "32"], "the pool has 40"),
        (["bench", "throughput", *TINY, "--distribution", "fixed", "--input-len", "600"], "do not fit into 512"),
        (["bench", "memory", "--block-size", "12"], "block_size is 12"),
    ],
)
def test_refusals_are_one_line_and_exit_code_2(cli, arguments, complaint):
    code, out, err = cli(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("minipaged: error: ") and err.count("\n") == 1
    assert complaint in err


def test_stdin_that_is_not_utf8(cli):
    code, _, err = cli("generate", *TINY, "-", stdin=b"caf\xe9")
    assert code == 2 and "stdin is not valid UTF-8: byte 0xe9 at position 3" in err
    code, _, err = cli("chat", *TINY, stdin=b"caf\xe9\n")
    assert code == 2 and "line 1 of stdin is not valid UTF-8" in err


def test_debug_shows_the_traceback(cli):
    code, _, err = cli("generate", *TINY, "--debug", "")
    assert code == 2
    assert "Traceback" in err and err.endswith("minipaged: error: the prompt is empty; give at least one character.\n")


def test_a_bug_is_called_a_bug(cli, monkeypatch):
    def broken(args):
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(cli_main.doctor, "run", broken)
    code, _, err = cli("doctor")
    assert code == 1
    assert "internal error: ZeroDivisionError: surprise" in err and "--debug" in err and "Traceback" not in err


def test_a_request_that_the_engine_gives_up_is_an_error(cli, monkeypatch):
    """NaN logits end a request with finish_reason "error": what there is gets printed, then exit 2."""
    from minipaged.ops.reference import ReferenceOps

    monkeypatch.setattr(ReferenceOps, "linear", lambda self, x, weight, bias=None: x @ weight.T * float("nan"))
    code, out, err = cli("generate", *SHORT, "--json", "--raw", "a", "b")
    assert code == 2
    assert [json.loads(line)["outputs"][0]["finish_reason"] for line in out.splitlines()] == ["error", "error"]
    assert err.startswith("minipaged: error: prompt 1 of 2 failed: ")


# -- chat -----------------------------------------------------------------------------------------


def test_chat_keeps_the_conversation_and_tells_what_was_cached(cli):
    lines = b"Who is there?\n\nAnd who are you, my lord?\n/stats\n/exit\nnever read\n"
    code, out, err = cli("chat", *SHORT, "--ignore-eos", stdin=lines)
    assert code == 0
    first, second = [line for line in err.splitlines() if "from the cache, " in line]
    assert first.startswith("[0 of ") and int(second[1:].split()[0]) >= 16
    assert "2 answers, 12 tokens generated" in err
    assert out.strip() and "[" not in out


def test_chat_commands(cli):
    code, out, err = cli("chat", *SHORT, stdin=b"/help\n/system You are a king.\n/reset\n/nonsense\n/system\n")
    assert (code, out) == (0, "")
    for text in ("/reset ", "message is set", "is forgotten", "unknown command /nonsense", "no system message"):
        assert text in err


def test_chat_needs_a_template(cli, tmp_path):
    shutil.copytree(catalog.resolve("tiny-draft"), tmp_path / "plain")
    config = tmp_path / "plain" / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    del settings["chat_template"]
    config.write_text(json.dumps(settings))
    plain = ("--model", tmp_path / "plain", "--device", "reference", "--max-tokens", "6")
    code, _, err = cli("chat", *plain, stdin=b"hello\n")
    assert code == 2 and "has no chat template" in err
    code, out, _ = cli("generate", *plain, "ROMEO:")
    assert (code, out) == (0, cli("generate", *SHORT, "--raw", "ROMEO:")[1])


class InterruptedLLM:
    """Stands in for an LLM whose user presses Ctrl-C after two pieces of the second answer."""

    max_model_len = 100

    def __init__(self):
        self.prompts = []
        self.closed = 0

    def chat_prompt(self, messages):
        self.prompts.append(messages)
        return {"prompt_token_ids": [1, 2, 3]}

    def default_sampling_params(self):
        return SamplingParams()

    def stream(self, prompt, params):
        try:
            for text in ("one", "one two", "one two three"):
                if len(self.prompts) == 2 and text == "one two three":
                    raise KeyboardInterrupt
                yield RequestOutput("0", None, [1, 2, 3], [CompletionOutput(0, text, [0], delta=text[-4:])], False)
        finally:
            self.closed += 1


def test_ctrl_c_stops_the_answer_not_the_chat(capsys):
    llm = InterruptedLLM()
    conversation = Conversation(llm, {}, system=None)
    for line in ("first", "second", "third"):
        assert conversation.handle(line) is False
    assert llm.closed == 3
    assert "1 generated, stopped]" in capsys.readouterr().err
    # What was shown of the stopped answer is part of the conversation.
    assert [m["content"] for m in llm.prompts[-1]] == ["first", "one two three", "second", "one two", "third"]


def test_a_refused_message_leaves_the_conversation_as_it_was(llm):
    conversation = Conversation(llm, {"max_tokens": 4}, system="Be brief.")
    before = list(conversation.messages)
    with pytest.raises(PromptTooLongError):
        conversation.handle("again and " * 600)
    assert conversation.messages == before


# -- the others -----------------------------------------------------------------------------------


def test_models_lists_the_catalog(cli):
    code, out, _ = cli("models")
    assert code == 0
    assert all(name in out for name in catalog.ENTRIES)
    listing = json.loads(cli("models", "--json")[1])
    assert {model["name"] for model in listing if model["cached"]} >= {"tiny", "tiny-draft"}


def test_pull_of_a_builtin_model_prints_its_path(cli):
    code, out, _ = cli("pull", "tiny")
    assert (code, out.strip()) == (0, str(catalog.ENTRIES["tiny"].path))


def test_pull_asks_for_nothing_without_a_terminal(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIPAGED_HOME", str(tmp_path))
    code, _, err = cli("pull", "gemma3-270m", stdin=b"yes\n")
    assert code == 2 and "--accept-license" in err


def test_pull_asks_on_a_terminal(monkeypatch, capsys):
    asked = []

    def fake_pull(name, accept_license=False):
        asked.append(accept_license)
        if not accept_license:
            raise LicenseNotAcceptedError("terms")
        return "/there"

    monkeypatch.setattr(catalog, "pull", fake_pull)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for answer, code in (("n\n", 2), ("", 2), ("yes\n", 0)):
        asked.clear()
        stdin = io.StringIO(answer)
        stdin.isatty = lambda: True
        monkeypatch.setattr("sys.stdin", stdin)
        assert cli_main.main(["pull", "gemma3-270m"]) == code
        assert asked == ([False, True] if code == 0 else [False])
        assert "ai.google.dev/gemma/terms" in capsys.readouterr().err


def test_inspect(cli):
    code, out, _ = cli("inspect", "tiny", "--tensors")
    assert code == 0
    for text in ("LlamaForCausalLM", "1,771,200", "38 F16", "512 tokens", "2.0 KiB a token", "model.norm.weight"):
        assert text in out
    found = json.loads(cli("inspect", "tiny", "--json")[1])
    assert found["kv_bytes_per_token"] == 2 * 4 * 2 * 32 * 4  # K and V, layers, KV heads, head_dim, bytes
    assert found["config"]["tie_word_embeddings"] is True
    assert "tensors" not in found
    assert len(json.loads(cli("inspect", "tiny", "--json", "--tensors")[1])["tensors"]) == 38


def test_doctor(cli):
    code, out, _ = cli("doctor")
    assert code == 0
    for text in ("minipaged ", "Python ", "BLAS ", "CUDA ", "reference", "NumPy", "tiny-draft"):
        assert text in out
    found = json.loads(cli("doctor", "--json")[1])
    assert {"name", "available", "reason"} <= set(found["backends"][0])
    assert found["cores"]["usable"] >= 1 and found["memory"]["total"] > 0
    assert found["models"]["tiny"].endswith("tiny")


def test_doctor_without_a_cache_folder(cli, monkeypatch):
    def nowhere():
        raise DownloadError("this user has no home directory")

    monkeypatch.setattr(catalog, "home", nowhere)
    code, out, _ = cli("doctor")
    assert code == 0 and "not usable: this user has no home directory" in out


def test_bench_memory(cli):
    code, out, _ = cli("bench", "memory", "--num-requests", "24", "--max-num-seqs", "8")
    assert code == 0
    assert "paged" in out and "contiguous" in out and "waste: 1 - held / reserved" in out


def test_bench_throughput_compares_policies_on_a_saved_trace(cli, tmp_path):
    trace, result = tmp_path / "trace.json", tmp_path / "result.json"
    lengths = ("--distribution", "fixed", "--input-len", "20", "--output-len", "4", "--num-requests", "5")
    code, _, _ = cli("bench", "throughput", *TINY, *lengths, "--save-workload", trace, "--json", "-")
    assert code == 0
    code, out, err = cli(
        *("bench", "throughput", *TINY, "--workload", trace, "--compare", "static", "--rounds", "2"),
        *("--num-blocks", "16", "--max-model-len", "64", "--json", result),
    )
    assert code == 0
    assert "fcfs makes" in out and "precision  float32" in out and err.count("generated tokens/s") == 4
    measured = json.loads(result.read_text())
    assert measured["context"]["device"] == "reference"
    for policy in ("fcfs", "static"):
        runs = measured["policies"][policy]["runs"]
        assert len(runs) == 2
        assert all((run["prompt_tokens"], run["generated_tokens"]) == (100, 20) for run in runs)
    # 16 blocks of 16 tokens: 4 regions of 64 tokens for static, 5 requests of 2 blocks for fcfs.
    assert measured["policies"]["static"]["median"]["steps"] == 8
    assert measured["policies"]["fcfs"]["median"]["steps"] == 4
    assert len(measured["ratio"]["rounds"]) == 2


def test_bench_latency(cli, monkeypatch):
    from minipaged.bench import bandwidth

    monkeypatch.setattr(bandwidth.read_bandwidth, "__defaults__", (1 << 20, 1))
    code, out, _ = cli(
        *("bench", "latency", *TINY, "--prompt-len", "8", "--batch-size", "1,3", "--steps", "2"),
        *("--repetitions", "2", "--json", "-"),
    )
    assert code == 0
    result = json.loads(out)
    assert [batch["batch_size"] for batch in result["decode"]] == [1, 3]
    assert all(batch["tokens_per_second"] > 0 and batch["floor"] > 0 for batch in result["decode"])
    assert len(result["ttft"]["values"]) == 2
