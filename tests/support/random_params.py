"""Random sampling parameters for traces: what a law is tested with must not differ from law to law."""

from __future__ import annotations

import random


def random_options(rng: random.Random, greedy: float) -> dict:
    """Options of ``SamplingParams``: greedy in the share ``greedy`` of the draws, else with a seed and filters."""
    options = {"max_tokens": rng.choice([1, 2, 5, 9, 17, 40, 60]), "ignore_eos": rng.random() < 0.7}
    if rng.random() < greedy:
        options["temperature"] = 0
    else:
        options |= {"temperature": rng.choice([0.3, 0.5, 0.8, 0.9, 1.3]), "seed": rng.randrange(2**32)}
        options |= {"top_p": rng.choice([1.0, 0.9]), "top_k": rng.choice([0, 20]), "min_p": rng.choice([0, 0.02])}
    if rng.random() < 0.3:
        options |= {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    if rng.random() < 0.2:
        options |= {"min_tokens": min(4, options["max_tokens"])}
    if rng.random() < 0.2:
        options |= {"stop": ["\n", "the"], "include_stop_str_in_output": rng.random() < 0.5}
    if rng.random() < 0.2:
        options |= {"logprobs": 3}
    if rng.random() < 0.15:
        options |= {"prompt_logprobs": 2}
    return options
