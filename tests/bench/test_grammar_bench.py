"""What masking costs: the arithmetic, and that both batches are measured."""

import pytest

from minipaged.bench import grammar
from minipaged.bench.report import grammar_text
from minipaged.config import EngineConfig
from minipaged.engine import Engine
from minipaged.errors import ConfigError


def test_a_slow_round_does_not_count_and_every_step_does():
    rounds = [[1.0, 4.0, 1.0], [1.0, 4.0, 1.0], [1.0, 4.0, 99.0]]
    assert grammar.mean_of_medians(rounds) == pytest.approx(2.0)


def test_both_batches_are_measured():
    pytest.importorskip("llguidance")
    engine = Engine(EngineConfig(model="tiny", device="reference", num_blocks=64))
    result = grammar.measure(engine, batch_size=2, prompt_len=8, num_steps=3, temperature=0.8, top_p=0.9)
    assert [len(steps) for steps in result["steps"]["grammar"]] == [3] * grammar.ROUNDS
    free, masked = result["free"], result["grammar"]
    assert free["telling"] == 0 < masked["telling"] and 0 < free["sampling"] < free["step"]
    cost = masked["sampling"] + masked["telling"] - free["sampling"]
    assert result["share_of_step"] == pytest.approx(cost / free["step"])
    assert "temperature 0.8, top_p 0.9;" in grammar_text(result)
    assert f"masking costs {cost * 1e3:.2f} ms" in grammar_text(result)
    assert not engine.has_unfinished()
    engine.close()


def test_a_batch_that_does_not_fit_is_refused_with_numbers():
    engine = Engine(EngineConfig(model="tiny", device="reference", num_blocks=8))
    with pytest.raises(ConfigError, match="8 and"):
        grammar.measure(engine, batch_size=4, prompt_len=64, num_steps=8)
    engine.close()
