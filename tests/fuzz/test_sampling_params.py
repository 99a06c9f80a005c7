"""Random parameter sets end in a typed error or a sampled token; never in a crash."""

from __future__ import annotations

import random

import numpy as np
import pytest

from minipaged.config import SamplingParams
from minipaged.errors import InvalidParameterError
from minipaged.sampling.sampler import Sampler
from minipaged.sampling.state import SamplingState

VOCAB = 64
NUMBERS = [0, 1, -1, 2, 0.5, 0.999, 1e-9, 5e-324, 1e300, -0.0, 1001, 2**31, 2**64 - 1, 2**64, 10**400, 10**5000]
STRANGE = [None, True, False, "1", "", b"x", [], {}, (), [1], {"a": 1}, float("nan"), float("inf"), 1j, object()]
IDS = [0, 1, 5, VOCAB - 1, VOCAB, -1, 2**63, 2**64, 10**5000, True, 1.0, "3", None]
STRINGS = ["a", "stop", " ", "", "\n", "é🙂", "x" * 500, 3, None]
SOUND = {
    "temperature": [0, 0.1, 0.7, 1.0, 2.0, 1000, 5e-324],
    "top_k": [-1, 0, 1, 3, VOCAB, 2**63 - 1],
    "top_p": [5e-324, 0.1, 0.9, 1 - 2**-53, 1.0],
    "min_p": [0.0, 5e-324, 0.3, 1.0],
    "presence_penalty": [-2, 0, 2],
    "frequency_penalty": [-2, 0, 1e-300],
    "repetition_penalty": [5e-324, 0.5, 1.0, 1000],
    "seed": [None, 0, 2**64 - 1],
    "min_tokens": [0, 1, 16],
    "logprobs": [None, 0, 3, 1024],
    "stop": [None, "a", ["a", "ab"]],
    "stop_token_ids": [None, [1], [0, VOCAB - 1]],
    "allowed_token_ids": [None, [0], [1, 1, 2], list(range(VOCAB))],
    "bad_words": [None, ["a"], ["ab", "b", "éé"]],
    "logit_bias": [None, {}, {0: 100}, {1: -100, 63: 0.5}],
    "ignore_eos": [True, False],
}
SEVERAL = ["n", "best_of", "use_beam_search", "beam_width", "length_penalty", "early_stopping"]
OTHERS = ["max_tokens", "prompt_logprobs", "include_stop_str_in_output", "skip_special_tokens", "typo", 7]
NAMES = [*SOUND, *SEVERAL, *OTHERS]


class ByteTokenizer:
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [byte % VOCAB for byte in text.encode()]


def strange_value(rng: random.Random):
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(STRANGE)
    if kind == 1:
        return rng.choice([list, tuple, set])(rng.choices(IDS, k=rng.randrange(4)))
    if kind == 2:
        return {rng.choice(IDS): rng.choice(NUMBERS + STRANGE) for _ in range(rng.randrange(3))}
    if kind == 3:
        return rng.choices(STRINGS, k=rng.randrange(4))
    return rng.choice(NUMBERS) * rng.choice([1, -1])


def options_of(rng: random.Random) -> dict:
    options = {name: rng.choice(values) for name, values in SOUND.items() if rng.random() < 0.3}
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 5])):
        options[rng.choice(NAMES)] = strange_value(rng)
    return options


def logits_of(rng: np.random.Generator, rows: int) -> np.ndarray:
    logits = rng.standard_normal((rows, VOCAB)) * rng.choice([0, 1e-3, 1, 50, 1e30], size=(rows, 1))
    return logits.astype(np.float32)


def run(count: int, seed: int) -> tuple[int, int, int]:
    rng = random.Random(seed)
    refused, batches, sampled, failed = 0, [], 0, 0
    batch: list[SamplingState] = []
    for number in range(count):
        options = options_of(rng)
        output = rng.choices(range(VOCAB), k=rng.randrange(5))
        try:
            params = SamplingParams(**{str(name): value for name, value in options.items()})
            state = SamplingState(
                params, [1, 2, 3], vocab_size=VOCAB, seed=number, eos_token_ids=(0,), tokenizer=ByteTokenizer()
            )
        except InvalidParameterError as error:
            assert len(str(error)) > 10
            refused += 1
            continue
        for token_id in output:
            state.append(token_id)
        batch.append(state)
        if len(batch) == 16:
            batches.append(batch)
            batch = []
    draws = np.random.default_rng(seed)
    for batch in batches:
        for outcome in Sampler(VOCAB).sample(logits_of(draws, len(batch)), batch):
            if outcome.error is None:
                assert 0 <= outcome.token_id < VOCAB
                sampled += 1
            else:
                assert outcome.token_id == -1
                failed += 1
    return refused, sampled, failed


@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_parameter_sets(count):
    refused, sampled, failed = run(count, seed=count)
    assert refused > count / 10 and sampled > count / 10  # both ends are reached often
    assert failed > 0
