"""Perplexity and greedy agreement: by hand, and against the losses stored with the fixtures."""

import json
import math
from pathlib import Path

import pytest

from minipaged import LLM
from minipaged.bench import quality
from minipaged.bench.modes import check_modes, parse_mode
from minipaged.cli.main import main
from minipaged.errors import BackendUnavailableError, ConfigError, InvalidParameterError

TEXT = "ROMEO:\nBut soft, what light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n" * 4


@pytest.fixture(scope="module")
def llm():
    with LLM("tiny-draft", device="reference", num_blocks=128, enable_prefix_caching=False) as model:
        yield model


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_modes_in_any_order():
    assert parse_mode("reference") == {"device": "reference"}
    assert parse_mode("cpu:int8") == {"device": "cpu", "quantization": "int8"}
    everything = {"device": "cpu", "dtype": "bfloat16", "quantization": "int4", "kv_cache_dtype": "int8"}
    assert parse_mode("cpu:kv=int8:int4:bfloat16") == everything


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("gpu", "reference"),
        ("cpu:int7", "int7"),
        ("cpu:int8:int4", "twice"),
        ("cpu:kv=int4", "kv is 'int4'"),
        ("", "begins with ''"),
    ],
)
def test_what_is_no_mode_is_refused(mode, words):
    with pytest.raises(ConfigError, match=words):
        parse_mode(mode)


def test_modes_are_checked_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="int8"):
        quality.measure(["reference", "reference:int8"], TEXT, model="no such model")
    with pytest.raises(BackendUnavailableError, match="cuda"):
        quality.measure(["reference", "cuda"], TEXT, model="no such model")
    with pytest.raises(ConfigError, match="twice"):
        check_modes(["reference", "reference"])


def test_windows_and_prompts():
    tokens = list(range(10))
    assert quality.split_windows(tokens, 4, 512) == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]  # 9 is left over
    assert quality.split_windows(tokens, 3, 512)[-1] == [6, 7, 8, 9]
    assert quality.choose_prompts(tokens, 3, 2, 512) == [[0, 1], [3, 4], [6, 7]]
    with pytest.raises(InvalidParameterError, match="max_model_len"):
        quality.split_windows(tokens, 512, 512)
    with pytest.raises(InvalidParameterError, match="needs 11"):
        quality.split_windows(tokens, 10, 512)
    with pytest.raises(InvalidParameterError, match="30 tokens of text, it has 10"):
        quality.choose_prompts(tokens, 3, 10, 512)
    with pytest.raises(InvalidParameterError, match="no room"):
        quality.choose_prompts(tokens, 1, 5, 4)


def test_the_loss_is_the_mean_of_minus_log_probabilities(llm):
    """Against the distributions that the engine gives for each next token, one prompt at a time."""
    from minipaged import SamplingParams

    tokens = llm.tokenizer.encode(TEXT)[:23]
    windows = quality.split_windows(tokens, 11, llm.max_model_len)
    expected = []
    for window in windows:
        for end in range(1, len(window)):
            forced = SamplingParams(temperature=0, max_tokens=1, logprobs=0, allowed_token_ids=[window[end]])
            entry = llm.generate(window[:end], forced)[0].outputs[0].logprobs[0]
            expected.append(-entry[window[end]].logprob)
    loss, count = quality.mean_loss(llm, windows)
    assert count == len(expected) == 22
    assert loss == pytest.approx(math.fsum(expected) / 22, rel=1e-5)


def test_a_window_may_fill_the_model(llm):
    tokens = (llm.tokenizer.encode(TEXT) * 4)[: llm.max_model_len]
    loss, count = quality.mean_loss(llm, [tokens])
    assert count == llm.max_model_len - 1
    assert 2 < loss < 8


def test_agreement_counts_equal_tokens(llm):
    assert quality.common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert quality.common_prefix([1, 2], [1, 2]) == 2
    assert quality.common_prefix([1], [2]) == 0
    prompts = quality.choose_prompts(llm.tokenizer.encode(TEXT), 2, 8, 500)
    greedy = quality.continue_greedily(llm, prompts, 6)
    assert quality.argmax_agreement(llm, prompts, greedy) == 1
    other = [[*tokens[:-1], (tokens[-1] + 1) % 1024] for tokens in greedy]  # only each last token differs
    assert quality.argmax_agreement(llm, prompts, other) == pytest.approx(10 / 12)


def test_a_mode_agrees_with_itself_and_ratios_are_to_the_first(text_file, tmp_path, capsys):
    """Two modes that compute the same: the ratio is 1 and no token differs."""
    modes = ("--mode", "reference", "--mode", "reference:float32")
    lengths = ("--window", "32", "--num-prompts", "3", "--prompt-len", "8", "--output-len", "4")
    result_file = tmp_path / "result.json"
    text = ("--text", str(text_file), "--json", str(result_file))
    assert main(["bench", "quality", "--model", "tiny-draft", *text, *modes, *lengths]) == 0
    assert "same argmax" in capsys.readouterr().out
    result = json.loads(result_file.read_text())
    assert [mode["mode"] for mode in result["modes"]] == ["reference", "reference:float32"]
    for mode in result["modes"]:
        assert (mode["ratio"], mode["prefix"], mode["argmax"]) == (1, 1, 1)
        assert mode["perplexity"] == pytest.approx(math.exp(mode["loss"]))


def test_texts_that_cannot_be_read(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(InvalidParameterError, match="not UTF-8"):
        quality.read_text(str(tmp_path / "latin"))
    with pytest.raises(InvalidParameterError, match="cannot read the text"):
        quality.read_text(str(tmp_path / "none"))


def test_the_fixture_text_has_the_loss_that_transformers_finds():
    """Hugging Face transformers, float32: 8 windows of 256 tokens from the start of the text."""
    path = Path(__file__).resolve().parents[1] / "fixtures" / "validation.txt"
    text = path.read_text(encoding="utf-8")
    with LLM("tiny", device="reference", num_blocks=256, enable_prefix_caching=False) as llm:
        tokens = llm.tokenizer.encode(text)[:2049]
        loss, _ = quality.mean_loss(llm, quality.split_windows(tokens, 256, llm.max_model_len))
    assert loss == pytest.approx(2.91484, abs=1e-4)
