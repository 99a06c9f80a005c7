"""What a benchmark asks for: prompts and how much to generate, from a seed or from a file.

Length distributions:

- ``fixed``: every prompt ``input_len`` tokens, every output ``output_len``.
- ``uniform``: 1 to twice the mean, evenly.
- ``conversation``: like ShareGPT; ``instruction``: like Alpaca. Log-normal, with the mean lengths that
  Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention",
  figure 11, gives for these data sets; the spreads are ours, chosen for tails of that shape.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from minipaged.errors import InvalidParameterError

DISTRIBUTIONS = ("conversation", "instruction", "uniform", "fixed")
# Mean tokens and sigma of the logarithm, of prompts and of outputs.
LOG_NORMAL = {
    "conversation": ((161.31, 1.1), (337.99, 0.8)),
    "instruction": ((19.31, 0.5), (58.45, 0.9)),
}
MAX_DRAWS = 1000
MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class WorkloadRequest:
    """One request: text or token ids, and the number of tokens to generate."""

    prompt: str | list[int]
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """Requests that all arrive at once, and a line that says where they come from."""

    description: str
    requests: list[WorkloadRequest]


def draw_lengths(
    distribution: str, count: int, seed: int, max_total: int, input_len: int = 128, output_len: int = 128
) -> list[tuple[int, int]]:
    """``count`` pairs (prompt tokens, output tokens), each at least 1, together at most ``max_total``.

    A pair that is too long is drawn again, which keeps the shape of the rest (cutting it would pile
    requests up at the limit). Raises :class:`InvalidParameterError` where next to nothing fits.
    """
    if distribution not in DISTRIBUTIONS:
        raise InvalidParameterError(f"distribution is {distribution!r}; it must be one of {', '.join(DISTRIBUTIONS)}.")
    rng = random.Random(seed)
    return [_draw_pair(rng, distribution, max_total, input_len, output_len) for _ in range(count)]


def _draw_pair(rng: random.Random, distribution: str, max_total: int, input_len: int, output_len: int):
    for _ in range(MAX_DRAWS):
        if distribution == "fixed":
            pair = (input_len, output_len)
        elif distribution == "uniform":
            pair = (rng.randint(1, 2 * input_len - 1), rng.randint(1, 2 * output_len - 1))
        else:
            pair = tuple(_log_normal(rng, mean, sigma) for mean, sigma in LOG_NORMAL[distribution])
        if sum(pair) <= max_total:
            return pair
        if distribution == "fixed":
            break
    raise InvalidParameterError(
        f"lengths drawn from {distribution!r} do not fit into {max_total} tokens (the last were {pair[0]} + "
        f"{pair[1]}); raise max_model_len, or choose shorter lengths."
    )


def _log_normal(rng: random.Random, mean: float, sigma: float) -> int:
    return max(1, round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)))


def make_workload(
    distribution: str,
    count: int,
    seed: int,
    *,
    vocab_size: int,
    max_model_len: int,
    input_len: int = 128,
    output_len: int = 128,
) -> Workload:
    """A workload of random token ids; the same arguments give the same workload anywhere."""
    lengths = draw_lengths(distribution, count, seed, max_model_len, input_len, output_len)
    rng = random.Random(f"tokens/{seed}")
    requests = [WorkloadRequest(rng.choices(range(vocab_size), k=prompt), output) for prompt, output in lengths]
    return Workload(f"{count} requests, {distribution} lengths, seed {seed}", requests)


def load_workload(path: str) -> Workload:
    """Read a JSON list of ``{"prompt_token_ids": [...] or "prompt": "...", "max_tokens": n}``.

    Raises :class:`InvalidParameterError` naming the entry that is wrong.
    """
    try:
        if Path(path).stat().st_size > MAX_FILE_BYTES:
            raise InvalidParameterError(f"workload {path}: larger than {MAX_FILE_BYTES} bytes.")
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidParameterError(f"cannot read the workload {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise InvalidParameterError(f"workload {path} is not valid JSON: {error}.") from None
    if not isinstance(entries, list) or not entries:
        raise InvalidParameterError(f"workload {path} must be a list of requests that is not empty.")
    requests = [_read_entry(entry, f"workload {path}, request {i}") for i, entry in enumerate(entries)]
    return Workload(f"{len(requests)} requests from {Path(path).name}", requests)


def _read_entry(entry, where: str) -> WorkloadRequest:
    if not isinstance(entry, dict) or set(entry) not in ({"prompt_token_ids", "max_tokens"}, {"prompt", "max_tokens"}):
        raise InvalidParameterError(f"{where}: it must have max_tokens and either prompt_token_ids or prompt.")
    max_tokens = entry["max_tokens"]
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise InvalidParameterError(f"{where}: max_tokens is {max_tokens!r}; it must be an integer of at least 1.")
    prompt = entry.get("prompt", entry.get("prompt_token_ids"))
    if "prompt" in entry and not isinstance(prompt, str):
        raise InvalidParameterError(f"{where}: prompt is a {type(prompt).__name__}; it must be text.")
    if "prompt_token_ids" in entry and not isinstance(prompt, list):
        raise InvalidParameterError(f"{where}: prompt_token_ids is a {type(prompt).__name__}; it must be a list.")
    return WorkloadRequest(prompt, max_tokens)


def save_workload(workload: Workload, path: str) -> None:
    """Write a workload in the form that :func:`load_workload` reads."""
    entries = [
        {"prompt" if isinstance(r.prompt, str) else "prompt_token_ids": r.prompt, "max_tokens": r.max_tokens}
        for r in workload.requests
    ]
    write_json(entries, path)


def write_json(data, path: str) -> None:
    """Write ``data`` as JSON. Raises :class:`InvalidParameterError` if the file cannot be written."""
    try:
        Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidParameterError(f"cannot write {path}: {error.strerror}.") from None
