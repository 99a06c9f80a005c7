"""``bench speculation``: equal outputs in all modes, numbers that fit together, prompts as told."""

import json

import pytest

from minipaged.bench import speculation
from minipaged.cli.main import main
from minipaged.errors import InvalidParameterError
from tests.support.engines import make_engine


def test_prompts():
    repetitive = speculation.repetitive_prompts(100, 2, 60, seed=0)
    assert [len(prompt) for prompt in repetitive] == [60, 60]
    assert repetitive[0][:36] == repetitive[0][24:] != repetitive[1][:36]
    ids = list(range(50))
    for window in speculation.text_prompts(ids, 5, 20, seed=0):
        assert window == list(range(window[0], window[0] + 20))
    with pytest.raises(InvalidParameterError, match="50 tokens, fewer than a prompt .51."):
        speculation.text_prompts(ids, 1, 51, seed=0)


@pytest.mark.parametrize("draft", ["ngram", "tiny-draft"])
def test_modes_are_measured_on_one_engine(draft):
    engine = make_engine("tiny", speculative_model=draft)
    mine = engine.speculator
    prompts = speculation.repetitive_prompts(1024, 2, 48, seed=0)
    result = speculation.measure(engine, prompts, output_len=32, rounds=2)
    assert engine.speculator is mine
    off, adaptive, fixed = (result["modes"][mode]["median"] for mode in speculation.MODES)
    assert off["guessed"] == 0 and off["tokens_per_step"] == 1
    assert fixed["guessed"] >= adaptive["guessed"]
    assert fixed["tokens_per_step"] > 1 and fixed["steps"] < off["steps"]
    assert result["speed_up"]["fixed"]["median"] > 0
    assert "tokens/s of off" in speculation.text(result)


def test_command(capsys):
    args = "--model tiny --device reference --num-blocks 64 --output-len 16 --rounds 1 --json -".split()
    assert main(["bench", "speculation", *args]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bench"] == "speculation" and result["speculative_model"] == "ngram"
    assert main(["bench", "speculation", *args, "--prompt-len", "500"]) != 0
    assert "max_model_len (512)" in capsys.readouterr().err
