"""Generations under a hundred schemas: what ends by itself conforms, what is cut off could have gone on to."""

from __future__ import annotations

import json

import numpy as np
import pytest

from minipaged.config import SamplingParams
from minipaged.errors import InvalidParameterError
from minipaged.sampling.grammar import GrammarCompiler
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


def test_a_bad_grammar_is_refused_at_admission_and_leaves_no_trace(engine):
    before = engine.stats()
    with pytest.raises(InvalidParameterError, match="objekt"):
        engine.add_request("x", SamplingParams(structured_outputs={"json": {"type": "objekt"}}))
    assert engine.stats() == before and not engine.has_unfinished()
