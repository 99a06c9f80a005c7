"""Generations under a hundred schemas: what ends by itself conforms, what is cut off could have gone on to."""

from __future__ import annotations

import json

import numpy as np
import pytest

from minipaged.config import SamplingParams
from minipaged.errors import InvalidParameterError
from minipaged.sampling.grammar import Grammar, GrammarCompiler
from tests.support.engines import assert_all_blocks_back, generate, make_engine, run_to_end
from tests.support.schemas import schemas

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")
SAMPLES = [{"temperature": 0}, {"temperature": 1.0, "seed": 1}, {"temperature": 1.5, "seed": 2, "top_p": 0.95}]
MAX_TOKENS = {"bounded": 200, "unbounded": 60}


@pytest.fixture(scope="module")
def engine():
    return make_engine("tiny-draft", num_blocks=1200, max_num_seqs=64, max_num_batched_tokens=512)


def complete(engine, schema: dict, token_ids: list[int], limit: int = 2000) -> str:
    """The text of ``token_ids`` brought to an end: always a token that closes something, if there is one."""
    model = engine.model
    compiler = GrammarCompiler(model.tokenizer, model.config.vocab_size, model.config.eos_token_ids)
    grammar = compiler.compile({"json": schema})
    token_ids = list(token_ids)
    for token_id in token_ids:
        grammar.append(token_id)
    closers = [model.tokenizer.encode(text, add_special_tokens=False)[0] for text in '"}],0ab']
    for _ in range(limit):
        row = np.zeros(model.config.vocab_size, dtype=np.float32)
        grammar.apply(row, [])
        allowed = np.flatnonzero(row == 0).tolist()
        assert allowed, f"nothing may follow {model.tokenizer.decode(token_ids)!r}"
        if set(allowed) & set(model.config.eos_token_ids):
            return model.tokenizer.decode(token_ids)
        token_id = next((c for c in closers if c in allowed), allowed[0])
        token_ids.append(token_id)
        grammar.append(token_id)
    raise AssertionError(f"{model.tokenizer.decode(token_ids)!r} cannot be ended in {limit} tokens")


def test_a_hundred_schemas(engine):
    cases = {}
    for name, schema in schemas():
        jsonschema.Draft202012Validator.check_schema(schema)
        for sample in SAMPLES:
            max_tokens = MAX_TOKENS[name.split()[0]]
            params = SamplingParams(max_tokens=max_tokens, structured_outputs={"json": schema}, **sample)
            cases[engine.add_request("In JSON: ", params)] = name, schema
    stopped = {"bounded": [], "unbounded": []}
    for request_id, output in run_to_end(engine).items():
        (name, schema), (completion,) = cases[request_id], output.outputs
        assert completion.finish_reason in ("stop", "length"), (name, output.error)
        stops = completion.finish_reason == "stop"
        stopped[name.split()[0]].append(stops)
        text = completion.text if stops else complete(engine, schema, completion.token_ids)
        try:
            jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)
        except (ValueError, jsonschema.ValidationError) as error:
            raise AssertionError(f"{name}: {text!r} does not conform to {json.dumps(schema)}") from error
    assert_all_blocks_back(engine)
    shares = {kind: sum(values) / len(values) for kind, values in stopped.items()}
    print(f"ended by themselves: {shares}")
    assert len(cases) == 300 and shares["bounded"] >= 0.95
    assert 0 < shares["unbounded"] < 1, "both ways to end must be met"


@pytest.mark.parametrize("options", [{"device": "reference"}, {"device": "cpu", "quantization": "int8"}])
def test_a_grammar_does_not_depend_on_company(options):
    """Alone, or in a pool so small that requests are preempted, beside requests without a grammar."""
    params = [
        SamplingParams(max_tokens=60, temperature=0.9, seed=i, structured_outputs={"json": schema})
        if i % 3
        else SamplingParams(max_tokens=60, temperature=0.9, seed=i)
        for i, (_, schema) in enumerate(schemas()[:18])
    ]
    prompts = [[5 + i] * (1 + i % 7) for i in range(len(params))]
    engine = make_engine("tiny-draft", **options)
    alone = [generate(engine, p, q).outputs[0] for p, q in zip(prompts, params, strict=True)]
    engine = make_engine("tiny-draft", num_blocks=20, block_size=4, max_num_seqs=8, **options)
    ids = [engine.add_request(p, q) for p, q in zip(prompts, params, strict=True)]
    together = run_to_end(engine)
    assert engine.stats().num_preemptions > 0
    for request_id, expected in zip(ids, alone, strict=True):
        got = together[request_id].outputs[0]
        assert (got.token_ids, got.text, got.finish_reason) == (
            expected.token_ids,
            expected.text,
            expected.finish_reason,
        )


def test_a_stream_gives_the_same_text(engine):
    params = SamplingParams(max_tokens=100, temperature=1, seed=4, structured_outputs={"json": schemas()[0][1]})
    whole = generate(engine, "x", params).outputs[0].text
    request_id = engine.add_request("x", params, stream=True)
    text = ""
    while engine.has_unfinished():
        text += "".join(o.outputs[0].delta for o in engine.step() if o.request_id == request_id)
    assert text == whole and json.loads(text) is not None


def test_other_masks_and_penalties_work_with_a_grammar(engine):
    yes, no = (engine.model.tokenizer.encode(word, add_special_tokens=False) for word in ("yes", "no"))
    choice = {"choice": ["yes", "no"]}
    bias = SamplingParams(temperature=0, structured_outputs=choice, logit_bias={no[0]: 100.0, yes[0]: -100.0})
    assert generate(engine, "x", bias).outputs[0].text == "no"
    bad = SamplingParams(temperature=0, structured_outputs=choice, bad_words=["no"], repetition_penalty=1.3)
    assert generate(engine, "x", bad).outputs[0].text == "yes"
    nothing = SamplingParams(structured_outputs=choice, allowed_token_ids=[5])
    output = generate(engine, "x", nothing)
    assert output.outputs[0].finish_reason == "error" and "structured_outputs" in output.error


def by_masks(monkeypatch) -> list[bool]:
    """Make grammars look up every token in a mask; each answer is noted."""
    answers = []

    def has_bit(grammar, token_id):
        bits = grammar.allowed_bits()
        answers.append(bits is not None and bool(bits[token_id >> 3] >> (token_id & 7) & 1))
        return answers[-1]

    monkeypatch.setattr(Grammar, "spares", has_bit)
    monkeypatch.setattr(Grammar, "allows", has_bit)
    monkeypatch.setattr(Grammar, "forced", lambda grammar: None)
    return answers


VARIANTS = {
    "greedy": [{"temperature": 0}, {"temperature": 0, "logprobs": 3, "min_tokens": 9}],
    "sampled": [{"temperature": 0.7}, {"temperature": 1.3, "logprobs": 2}, {"top_p": 0.9, "top_k": 200, "min_p": 0.01}],
    "edited": [
        {"temperature": t, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "logit_bias": {70: 4.0, 80: -2.0}}
        for t in (0, 0.8)
    ],
    "ends": [{"temperature": 0.9, "stop_token_ids": [60, 61, 62], "stop": [", "], "bad_words": ["a"]}],
    "several": [{"temperature": 1.1, "n": 4}, {"temperature": 1.0, "n": 2, "best_of": 4}],
    "beams": [{"use_beam_search": True, "n": 2, "beam_width": 3}],
}


@pytest.mark.parametrize("variant", VARIANTS)
# (How far guesses go is a matter of time, and how the reference's products round one of how far they go.)
@pytest.mark.parametrize("device, speculative_model", [("reference", None), ("cpu", None), ("cpu", "ngram")])
def test_asking_about_tokens_gives_those_of_masks(variant, device, speculative_model, monkeypatch):
    """Every step's mask made, or only those that are needed: the same tokens, however they are chosen."""
    options = {"device": device, "speculative_model": speculative_model}
    kinds = [{"json": schema} for _, schema in schemas()[::9]] + [{"regex": "([a-z]{1,9}[ .])*"}]
    requests = [
        ([5 + i] * (2 + i % 5), SamplingParams(**{"max_tokens": 40, "seed": i} | kind, structured_outputs=grammar))
        for i, grammar in enumerate(kinds)
        for kind in VARIANTS[variant]
    ]
    engine = make_engine("tiny-draft", num_blocks=1200, max_num_seqs=64, max_num_batched_tokens=512, **options)
    found = []
    for masked in (False, True):
        answers = by_masks(monkeypatch) if masked else []
        ids = [engine.add_request(*request) for request in requests]
        outputs = run_to_end(engine)
        found.append([[(o.token_ids, o.finish_reason, o.logprobs) for o in outputs[i].outputs] for i in ids])
    assert found[0] == found[1]
    assert {True, False} <= set(answers) or variant in ("edited", "ends", "beams")
    assert_all_blocks_back(engine)
    engine.close()


def test_a_bad_grammar_is_refused_at_admission_and_leaves_no_trace(engine):
    before = engine.stats()
    with pytest.raises(InvalidParameterError, match="objekt"):
        engine.add_request("x", SamplingParams(structured_outputs={"json": {"type": "objekt"}}))
    assert engine.stats() == before and not engine.has_unfinished()
