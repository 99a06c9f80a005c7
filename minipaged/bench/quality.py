"""What a precision costs: perplexity on a text, and how often greedy decoding takes another token.

The first mode is the measure of the others. Perplexity is exp of the mean negative log-likelihood of
the text's tokens, each predicted from those before it in its window. A window of N tokens predicts N,
its own but the first and the one that follows it, with which the next window begins; what is left over
at the end of the text is not counted.

Two numbers say how far greedy decoding agrees with the first mode's continuations of the same prompts:
``prefix`` is the share of tokens before the first difference (one early difference costs all that
follows it), ``argmax`` the share of positions at which a mode, shown the first mode's tokens, would
have taken the same next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from minipaged.bench.modes import check_modes, parse_mode
from minipaged.config import SamplingParams
from minipaged.errors import InvalidParameterError, NumericalError
from minipaged.llm import LLM
from minipaged.outputs import Logprob, RequestOutput

MAX_TEXT_BYTES = 64 << 20


def read_text(path: str) -> str:
    """A file's text. Raises :class:`InvalidParameterError` if it cannot be read, or is not UTF-8."""
    try:
        if Path(path).stat().st_size > MAX_TEXT_BYTES:
            raise InvalidParameterError(f"text {path}: larger than {MAX_TEXT_BYTES} bytes; cut it.")
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise InvalidParameterError(f"cannot read the text {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise InvalidParameterError(f"text {path} is not UTF-8: {error.reason} at byte {error.start}.") from None


def measure(
    modes: list[str],
    text: str,
    *,
    window: int = 256,
    max_tokens: int | None = None,
    num_prompts: int = 20,
    prompt_len: int = 64,
    output_len: int = 64,
    progress: Callable[[str], None] | None = None,
    **options,
) -> dict:
    """Measure each mode (see :mod:`minipaged.bench.modes`), one engine after the other.

    Args:
        text: held out: seen neither in training nor in choosing how to quantise.
        window: tokens scored together.
        max_tokens: only this many tokens of the text; ``None``: all.
        num_prompts, prompt_len: prompts, cut from the text at even distances.
        output_len: tokens that each is continued by; end-of-sequence does not stop them.
        progress: called with a line of text as each mode is done.
        options: further fields of :class:`~minipaged.config.EngineConfig`, the same for all modes.

    Returns ``{"window", "tokens", "modes": [{"mode", "loss", "perplexity", "ratio", "prefix", "argmax",
    "weight_bytes", ...}]}``: losses are nats a token, ratios those of perplexity to the first mode's.
    """
    check_modes(modes)
    results: list[dict] = []
    continuations: list[list[int]] | None = None
    for mode in modes:
        with LLM(**(options | parse_mode(mode) | {"enable_prefix_caching": False})) as llm:
            tokens = llm.tokenizer.encode(text, add_special_tokens=False)[:max_tokens]
            windows = split_windows(tokens, window, llm.max_model_len)
            prompts = choose_prompts(tokens, num_prompts, prompt_len, llm.max_model_len - output_len)
            loss, num_scored = mean_loss(llm, windows)
            generated = continue_greedily(llm, prompts, output_len)
            continuations = continuations or generated
            result = {
                "mode": mode,
                "loss": loss,
                "perplexity": math.exp(loss),
                "prefix": mean(common_prefix(a, b) / output_len for a, b in zip(continuations, generated, strict=True)),
                "argmax": argmax_agreement(llm, prompts, continuations),
                "weight_bytes": llm.stats().weight_bytes,
                "device": llm.stats().device,
            }
        result["ratio"] = result["perplexity"] / (results[0] if results else result)["perplexity"]
        results.append(result)
        if progress:
            progress(f"{mode}: loss {loss:.4f}, perplexity {result['perplexity']:.3f} ({result['ratio']:.4f}x)")
    return {
        "window": window,
        "tokens": len(tokens),
        "tokens_scored": num_scored,
        "num_prompts": num_prompts,
        "prompt_len": prompt_len,
        "output_len": output_len,
        "modes": results,
    }


def split_windows(tokens: list[int], window: int, max_model_len: int) -> list[list[int]]:
    """Windows of ``window + 1`` tokens, each beginning with the last token of the one before it."""
    if window >= max_model_len:
        raise InvalidParameterError(
            f"window is {window}; window and the token after it must fit max_model_len ({max_model_len})."
        )
    if len(tokens) <= window:
        raise InvalidParameterError(
            f"the text has {len(tokens)} tokens, a window of {window} needs {window + 1}; give more text."
        )
    return [tokens[i : i + window + 1] for i in range(0, len(tokens) - window, window)]


def choose_prompts(tokens: list[int], count: int, length: int, max_length: int) -> list[list[int]]:
    """``count`` pieces of ``length`` tokens that begin at even distances and do not overlap."""
    if length > max_length:
        raise InvalidParameterError(
            f"prompts of {length} tokens leave no room for the output: at most {max_length} fit max_model_len."
        )
    if count * length > len(tokens):
        raise InvalidParameterError(
            f"{count} prompts of {length} tokens need {count * length} tokens of text, it has {len(tokens)}; "
            "give a longer text, or fewer or shorter prompts."
        )
    stride = len(tokens) // count
    return [tokens[i * stride : i * stride + length] for i in range(count)]


def mean_loss(llm: LLM, windows: list[list[int]]) -> tuple[float, int]:
    """Mean negative log-likelihood (nats a token) of the windows' tokens, and how many were counted."""
    losses = [-entry.logprob for scored in _score(llm, windows) for entry in scored]
    return mean(losses), len(losses)


def continue_greedily(llm: LLM, prompts: list[list[int]], output_len: int) -> list[list[int]]:
    """The likeliest token, ``output_len`` times, after each prompt."""
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    return [output.outputs[0].token_ids for output in _generate(llm, prompts, params)]


def argmax_agreement(llm: LLM, prompts: list[list[int]], continuations: list[list[int]]) -> float:
    """Share of the continuations' tokens that the model ranks first, given the tokens before them."""
    sequences = [prompt + tokens for prompt, tokens in zip(prompts, continuations, strict=True)]
    scored = zip(continuations, _score(llm, sequences), strict=True)
    return mean(entry.rank == 1 for tokens, entries in scored for entry in entries[-len(tokens) :])


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences share before they first differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def _score(llm: LLM, sequences: list[list[int]]) -> list[list[Logprob]]:
    """For each sequence, the log-probabilities of its tokens, from the second on."""
    # A prompt needs room for an output, so the last token is not part of it but forced (logprobs are
    # those of the raw logits); sequences may then be as long as the model allows.
    params = [
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, logprobs=0, allowed_token_ids=[tokens[-1]])
        for tokens in sequences
    ]
    outputs = _generate(llm, [tokens[:-1] for tokens in sequences], params)
    scored = []
    for tokens, output in zip(sequences, outputs, strict=True):
        entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        scored.append([entry[token] for token, entry in zip(tokens[1:], entries, strict=True)])
    return scored


def _generate(llm: LLM, prompts: list[list[int]], params) -> list[RequestOutput]:
    """As ``llm.generate``, with an error where a request failed."""
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for output in outputs:
        if output.error:
            raise NumericalError(f"a request of {len(output.prompt_token_ids)} prompt tokens failed: {output.error}")
    return outputs
