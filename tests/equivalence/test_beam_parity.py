"""Beam search against Hugging Face transformers: the same sequences and scores, all beams of all requests in one batch.

tests/fixtures/make_beam.py makes the fixture, and holds the models, prompts and cases.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from minipaged.config import SamplingParams
from tests.support.engines import assert_all_blocks_back, make_engine, run_to_end

FIXTURES = Path(__file__).parents[1] / "fixtures"
_spec = importlib.util.spec_from_file_location("make_beam", FIXTURES / "make_beam.py")
make_beam = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_beam)
EXPECTED = dict(np.load(FIXTURES / "beam.npz"))


def with_tokenizer(folder: Path, target: Path) -> Path:
    """The random models have no tokenizer; only ids matter here, so any one will do."""
    if (folder / "tokenizer.json").exists():
        return folder
    shutil.copytree(folder, target)
    vocabulary = {chr(97 + token_id // 26) + chr(97 + token_id % 26): token_id for token_id in range(90)}
    Tokenizer(WordLevel(vocabulary)).save(str(target / "tokenizer.json"))
    return target


def expected_of(case: int) -> tuple[list[list[int]], list[float]]:
    """Sequences and scores of a case, best first."""
    width = make_beam.CASES[case][2]
    sequences = [row[row >= 0].tolist() for row in EXPECTED["token_ids"][case, :width]]
    return sequences, EXPECTED["scores"][case, :width].tolist()


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("name", list(make_beam.MODELS))
def test_beam_search_equals_transformers(name, device, tmp_path):
    folder, prompts = make_beam.MODELS[name]
    engine = make_engine(
        str(with_tokenizer(folder, tmp_path / name)), device=device, dtype="float32", num_blocks=2000, block_size=4
    )
    cases = {}
    for case, (model, index, width, penalty, stopping) in enumerate(make_beam.CASES):
        if model == name:
            prompt, more_ends = prompts[index]
            params = SamplingParams(
                n=width,
                use_beam_search=True,
                length_penalty=penalty,
                early_stopping=stopping,
                max_tokens=make_beam.MAX_TOKENS,
                stop_token_ids=more_ends,
            )
            cases[engine.add_request(prompt, params)] = case
    for request_id, output in run_to_end(engine).items():
        sequences, scores = expected_of(cases[request_id])
        where = make_beam.CASES[cases[request_id]]
        assert [c.token_ids for c in output.outputs] == sequences, where
        assert [c.beam_score for c in output.outputs] == pytest.approx(scores, abs=1e-4), where
    assert_all_blocks_back(engine)


def test_the_fixture_reaches_every_rule():
    """Beams that end early and late, and modes that differ: else the comparison would prove little."""
    ended = [[len(s) < make_beam.MAX_TOKENS for s in expected_of(case)[0]] for case in range(len(make_beam.CASES))]
    assert sum(any(e) and not all(e) for e in ended) > 20 and sum(all(e) for e in ended) > 20
    results = {}
    for case, (name, index, width, penalty, _) in enumerate(make_beam.CASES):
        results.setdefault((name, index, width, penalty), []).append(expected_of(case)[0])
    assert sum(early != heuristic for early, heuristic, _ in results.values()) > 5
    assert sum(heuristic != never for _, heuristic, never in results.values()) > 5
