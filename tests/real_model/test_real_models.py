"""The catalog's real models: equal to Hugging Face transformers, and to llama.cpp up to near ties.

The fixtures (see tests/fixtures/make_real_models.py and make_llamacpp.mjs) come from the same GGUF files:
transformers and ``float32`` of llama.cpp with all tensors dequantised, as here; llama.cpp proper also quantises
activations, which moves each gap between the two best logits by 0.15 (root mean square) and at most by 0.9.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from minipaged import LLM, SamplingParams
from minipaged.errors import DownloadError, LicenseNotAcceptedError
from minipaged.model import catalog

pytestmark = pytest.mark.real_model

FIXTURES = Path(__file__).parent.parent / "fixtures"
LLAMACPP = json.loads((FIXTURES / "llamacpp.json").read_text(encoding="utf-8"))
EXCUSED_GAP = 1e-3  # a first difference from transformers is excused below this gap of its two best logits
LOGIT_TOLERANCE = 2e-3
NEAR_TIE = 3.0  # times the root mean square error of llama.cpp's gaps


@pytest.fixture(scope="module", params=[("smollm2-135m", "smollm2"), ("gemma3-270m", "gemma3")], ids=lambda p: p[0])
def real(request):
    """A model, its fixtures, and what it answered to the fixture's prompts (all in one batch)."""
    name, fixture = request.param
    try:
        path = catalog.resolve(name)
    except (DownloadError, LicenseNotAcceptedError) as error:
        pytest.skip(f"{name} is not in the cache and cannot be pulled: {error}")
    expected = json.loads((FIXTURES / f"{fixture}.json").read_text(encoding="utf-8"))
    prompts = [*expected["prompts"], expected["long_prompt"]]
    params = [
        SamplingParams(temperature=0, max_tokens=len(p["token_ids"]), ignore_eos=True, logprobs=5) for p in prompts
    ]
    with LLM(str(path), device="reference", max_model_len=1024, num_threads=1) as llm:
        outputs = llm.generate([{"prompt_token_ids": p["prompt_token_ids"]} for p in prompts], params)
        yield SimpleNamespace(
            name=name,
            llm=llm,
            expected=expected,
            prompts=prompts,
            outputs=[output.outputs[0] for output in outputs],
            llamacpp=LLAMACPP["models"][fixture],
        )


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    assert len(ours) == len(theirs)
    return next((step for step, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)


def test_greedy_tokens_equal_transformers(real):
    for prompt, output in zip(real.prompts, real.outputs, strict=True):
        step = first_difference(output.token_ids, prompt["token_ids"])
        if step is not None:
            gap = prompt["gaps"][step]
            print(f"{real.name}, {prompt['prompt'][:30]!r}: first difference at step {step}, gap {gap}")
            assert gap < EXCUSED_GAP, f"{prompt['prompt']!r}: token {step} differs, though the gap is {gap}"


def test_logits_equal_transformers(real):
    """Log-probabilities differ from logits by one number a step, so their differences must agree."""
    for prompt, output in zip(real.prompts, real.outputs, strict=True):
        (best, best_logit), *others = prompt["top_logits"]
        first = output.logprobs[0]
        for token_id, logit in others:
            assert first[best].logprob - first[token_id].logprob == pytest.approx(
                best_logit - logit, abs=LOGIT_TOLERANCE
            )
        end = first_difference(output.token_ids, prompt["token_ids"])
        for step in range(len(prompt["gaps"]))[:end]:
            logprobs = output.logprobs[step]
            gap = logprobs[prompt["token_ids"][step]].logprob - logprobs[prompt["second_token_ids"][step]].logprob
            assert gap == pytest.approx(prompt["gaps"][step], abs=LOGIT_TOLERANCE), (prompt["prompt"][:30], step)


def test_greedy_tokens_equal_llama_cpp_in_float32(real):
    for prompt, output, theirs in zip(real.prompts, real.outputs, real.llamacpp["prompts"], strict=True):
        step = first_difference(output.token_ids, theirs["float32"]["token_ids"])
        assert step is None or prompt["gaps"][step] < EXCUSED_GAP, (prompt["prompt"], step, prompt["gaps"][step])


def test_greedy_tokens_equal_llama_cpp_up_to_a_near_tie(real):
    """On the quantised file itself. A near tie is a gap that llama.cpp's quantised activations can close:
    under three times the error of its gaps, measured along transformers' tokens."""
    errors = [
        margin - gap
        for prompt, theirs in zip(real.prompts, real.llamacpp["prompts"], strict=True)
        for margin, gap in zip(theirs["forced_margins"], prompt["gaps"], strict=True)
    ]
    error = math.sqrt(sum(e * e for e in errors) / len(errors))
    limit = NEAR_TIE * error
    assert error < 0.25, "llama.cpp's logits are further off than rounding explains"
    print(f"\n{real.name}: llama.cpp's gaps are off by {error:.3f} (root mean square), so a near tie is < {limit:.3f}")
    print(f"{'prompt':34} {'first difference':>16} {'gap there':>10}")
    for prompt, output, theirs in zip(real.prompts, real.outputs, real.llamacpp["prompts"], strict=True):
        step = first_difference(output.token_ids, theirs["token_ids"])
        gap = None if step is None else prompt["gaps"][step]
        shown = ("none", "") if gap is None else (f"token {step}", f"{gap:.3f}")
        print(f"{prompt['prompt'][:32]!r:34} {shown[0]:>16} {shown[1]:>10}")
        assert gap is None or gap < limit, f"{prompt['prompt']!r}: token {step} differs, though the gap is {gap}"


def test_text_of_the_answers(real):
    for prompt, output in zip(real.prompts, real.outputs, strict=True):
        if output.token_ids == prompt["token_ids"]:
            assert real.llm.tokenizer.decode(output.token_ids, skip_special_tokens=False) == prompt["text"]


def test_tokenization(real):
    """transformers' ids. llama.cpp's are the same but for one text: it cuts out Gemma's tokens for runs of
    spaces before it writes spaces as underlines, and so misses underlines that the text itself has."""
    tokenizer = real.llm.tokenizer
    disputed = []
    for (text, plain, with_special), theirs in zip(
        real.expected["tokenization"], real.llamacpp["tokenization"], strict=True
    ):
        assert tokenizer.encode(text, add_special_tokens=False) == plain, text
        assert tokenizer.encode(text) == with_special, text
        if theirs != plain:
            disputed.append(text)
    assert disputed == (["\u2581 underline block \u2581\u2581"] if real.name == "gemma3-270m" else [])


def test_prompts_as_text(real):
    for prompt in real.prompts:
        assert real.llm.tokenizer.encode(prompt["prompt"]) == prompt["prompt_token_ids"]


def test_chat_template(real):
    chat = real.expected["chat"]
    if not chat:
        assert real.llm.chat_template is None
    for case in chat:
        rendered = real.llm.chat_template.render(
            case["messages"], add_generation_prompt=case["add_generation_prompt"]
        )
        assert rendered == case["text"]
