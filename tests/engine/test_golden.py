"""The built-in models give what Hugging Face transformers gave (``fixtures/tiny_golden.json``)."""

import json
from pathlib import Path

import numpy as np
import pytest

from minipaged import SamplingParams
from minipaged.core.scheduler_output import ScheduledSequence
from minipaged.runner import build_batch
from tests.support.engines import generate, make_engine

GOLDEN = json.loads((Path(__file__).parent.parent / "fixtures" / "tiny_golden.json").read_text())
ENGINES = {"target": "tiny", "draft": "tiny-draft"}


@pytest.fixture(scope="module", params=list(ENGINES))
def role_and_engine(request):
    return request.param, make_engine(ENGINES[request.param], block_size=8)


def test_greedy_tokens(role_and_engine):
    role, engine = role_and_engine
    params = SamplingParams(temperature=0, max_tokens=GOLDEN["max_new_tokens"], ignore_eos=True)
    for case in GOLDEN["prompts"]:
        by_text = generate(engine, case["prompt"], params)
        by_ids = generate(engine, case["prompt_ids"], params)
        assert by_text.prompt_token_ids == case["prompt_ids"]
        assert by_text.outputs[0].token_ids == by_ids.outputs[0].token_ids == case[role]["greedy_ids"]
        assert by_text.outputs[0].text == case[role]["greedy_text"]


def test_logits_at_the_last_prompt_position(role_and_engine):
    role, engine = role_and_engine
    for case in GOLDEN["prompts"]:
        ids = case["prompt_ids"]
        sequence = ScheduledSequence("x", ids, 0, list(range(-(-len(ids) // 8))), True)
        batch = build_batch([sequence], np.array([len(ids) - 1], dtype=np.int32), block_size=8)
        logits = engine.runner.decoder.forward(batch, engine.runner.kv_cache)[0]
        top = np.argsort(-logits)[:5]
        wanted = case[role]["top5_last_prompt_position"]
        assert top.tolist() == [entry["id"] for entry in wanted]
        np.testing.assert_allclose(logits[top], [entry["logit"] for entry in wanted], atol=1e-4)
