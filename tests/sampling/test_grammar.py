"""Grammars as masks: what may follow, where a text may end, and which grammars are refused."""

import json

import numpy as np
import pytest

from minipaged.config import SamplingParams
from minipaged.errors import InvalidParameterError
from minipaged.model.loader import load_model
from minipaged.sampling.grammar import GrammarCompiler
from minipaged.sampling.sampler import Sampler
from minipaged.sampling.state import SamplingState

pytest.importorskip("llguidance")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


@pytest.fixture(scope="module")
def compiler(model):
    return GrammarCompiler(model.tokenizer, model.config.vocab_size, model.config.eos_token_ids)


@pytest.fixture
def make(compiler):
    """The grammar of checked ``structured_outputs``."""

    def make(**grammar):
        return compiler.compile(SamplingParams(structured_outputs=grammar).structured_outputs)

    return make


def allowed(grammar, vocab_size=1024):
    """The set of tokens that may follow."""
    row = np.zeros(vocab_size, dtype=np.float32)
    grammar.apply(row, [])
    assert set(np.unique(row)) <= {0, -np.inf}
    return set(np.flatnonzero(row == 0).tolist())


def feed(grammar, model, text):
    """Whether each token of the text was allowed, as far as they went."""
    for token_id in model.tokenizer.encode(text, add_special_tokens=False):
        if token_id not in allowed(grammar):
            return False
        grammar.append(token_id)
    return True


ACCEPTED = [
    ({"json": PERSON}, '{"name": "Zoë \\n 😀", "age": 42}'),
    ({"json": PERSON}, '{"name":"","age":0}'),
    ({"json": json.dumps(PERSON)}, '{ "name": "x", "age": 7 }'),
    ({"json_object": True}, '{"a": [1, -2.5e3, {"b": null}, true]}'),
    ({"regex": r"[a-z]{2,3}/\d+"}, "ab/15"),
    ({"choice": ['say "yes"', "no\n\\", "née", "say"]}, 'say "yes"'),
    ({"choice": ['say "yes"', "no\n\\", "née", "say"]}, "no\n\\"),
    ({"choice": ['say "yes"', "no\n\\", "née", "say"]}, "née"),
    ({"grammar": 'start: "(" start ")" | "x"'}, "((x))"),
    ({"grammar": 'root ::= "(" root ")" | [0-9]+'}, "((17))"),
]


@pytest.mark.parametrize("grammar, text", ACCEPTED)
def test_a_conforming_text_is_allowed_and_may_end(make, model, grammar, text):
    grammar = make(**grammar)
    assert feed(grammar, model, text)
    assert set(model.config.eos_token_ids) <= allowed(grammar)
    assert grammar.complete


@pytest.mark.parametrize(
    "grammar, text",
    [
        ({"json": PERSON}, '{"age": 1'),
        ({"json": PERSON}, '{"name": "a\nb'),
        ({"json": PERSON}, '{"name": "x", "age": -'),
        ({"json": PERSON}, '{"name": "x", "age": 1, '),
        ({"json": PERSON}, '{\n"name"'),
        ({"json_object": True}, "[1]"),
        ({"regex": r"[a-z]{2,3}/\d+"}, "a/"),
        ({"choice": ["yes", "no"]}, "maybe"),
        ({"grammar": 'start: "(" start ")" | "x"'}, "()"),
    ],
)
def test_another_text_is_not(make, model, grammar, text):
    assert not feed(make(**grammar), model, text)


def test_an_unfinished_text_may_not_end(make, model):
    grammar = make(json=PERSON)
    assert feed(grammar, model, '{"name": "x", "age": 4')
    assert not set(model.config.eos_token_ids) & allowed(grammar) and not grammar.complete


def test_a_schema_may_choose_its_white_space(make, model):
    loose = PERSON | {"x-guidance": {"whitespace_pattern": "[ \\n]*"}}
    assert feed(make(json=loose), model, '{\n   "name": "x", "age": 1\n}')


def test_undo_takes_back_tokens_inside_and_outside_of_the_grammar(make, model):
    grammar = make(choice=["yes", "yesterday"])
    ids = model.tokenizer.encode("yesterday", add_special_tokens=False)
    sets = []
    for token_id in ids:
        sets.append(allowed(grammar))
        grammar.append(token_id)
    sets.append(allowed(grammar))
    eos = model.config.eos_token_ids[0]
    for token_id in (eos, 500, eos):  # an end, and what a draft may propose after it
        grammar.append(token_id)
        assert allowed(grammar) == set() and not grammar.complete
    for token_id in (eos, 500, eos):
        grammar.undo(token_id)
    assert grammar.complete
    for token_id, expected in zip(reversed([*ids, None]), reversed(sets), strict=True):
        if token_id is not None:
            grammar.undo(token_id)
        assert allowed(grammar) == expected


def test_forks_go_their_own_ways(make, model):
    grammar = make(choice=["yes sir", "yes madam"])
    assert feed(grammar, model, "yes")
    twin = grammar.fork()
    assert feed(grammar, model, " sir") and feed(twin, model, " madam")
    assert grammar.complete and twin.complete


def test_grammars_of_equal_text_do_not_share_their_state(make, model):
    first, second = make(choice=["a", "b"]), make(choice=["a", "b"])
    assert feed(first, model, "a") and feed(second, model, "b")


def test_min_tokens_do_not_stretch_a_complete_text(make, model):
    params = SamplingParams(temperature=0, min_tokens=8, structured_outputs={"choice": ["no"]})
    eos = model.config.eos_token_ids
    grammar = make(**params.structured_outputs)
    state = SamplingState(params, [5], vocab_size=1024, seed=0, eos_token_ids=eos, grammar=grammar)
    for token_id in model.tokenizer.encode("no", add_special_tokens=False):
        state.append(token_id)
    (token,) = Sampler(1024).sample(np.zeros((1, 1024), dtype=np.float32), [state])
    assert token.error is None and token.token_id in eos


def test_a_grammar_that_outgrows_the_parser_fails_its_own_row(make, monkeypatch):
    params = SamplingParams(temperature=0, structured_outputs={"json_object": True})
    grammar = make(**params.structured_outputs)

    class Exhausted:
        compute_bitmask = staticmethod(lambda: bytes([255]) * 128)
        validate_tokens = staticmethod(lambda token_ids: 0)
        is_error = staticmethod(lambda: True)
        is_stopped = staticmethod(lambda: True)

    monkeypatch.setattr(grammar, "_matcher", Exhausted())
    bad = SamplingState(params, [5], vocab_size=1024, seed=0, grammar=grammar)
    good = SamplingState(SamplingParams(temperature=0), [5], vocab_size=1024, seed=0)
    tokens = Sampler(1024).sample(np.zeros((2, 1024), dtype=np.float32), [bad, good])
    assert "structured_outputs" in tokens[0].error and tokens[1].error is None


@pytest.mark.parametrize(
    "grammar",
    [
        {"json": {"type": "objekt"}},
        {"json": {"not": {"type": "string"}}},
        {"json": {"type": "integer", "minimum": 5, "maximum": 3}},
        {"json": {"$ref": "http://example.com/schema"}},
        {"json": {"enum": []}},
        {"regex": "(ab"},
        {"regex": "(?=a)b"},
        {"regex": "\ud800"},
        {"choice": ["\ud800"]},
        {"grammar": "start: missing"},
        {"grammar": "root ::= missing"},
        {"grammar": "not a grammar"},
    ],
)
def test_a_bad_grammar_is_refused_when_it_is_compiled(make, grammar):
    with pytest.raises(InvalidParameterError, match=rf"structured_outputs\['{next(iter(grammar))}'\]"):
        make(**grammar)


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        "json",
        {"jason": {}},
        {"regex": "a", "choice": ["b"]},
        {"json": "[1]"},
        {"json": "{"},
        {"json": {"a": {1, 2}}},
        {"json": True},
        {"json_object": False},
        {"json_object": 1},
        {"regex": ""},
        {"regex": 3},
        {"choice": []},
        {"choice": "yes"},
        {"choice": ["a", ""]},
        {"grammar": None},
        {3: 4},
    ],
)
def test_what_is_no_grammar_at_all_is_refused_at_once(value):
    with pytest.raises(InvalidParameterError, match="structured_outputs"):
        SamplingParams(structured_outputs=value)


def test_ignore_eos_contradicts_a_grammar():
    with pytest.raises(InvalidParameterError, match="ignore_eos"):
        SamplingParams(structured_outputs={"json_object": True}, ignore_eos=True)


def test_a_model_without_an_end_cannot_end_a_grammar(model):
    with pytest.raises(InvalidParameterError, match="end-of-sequence"):
        GrammarCompiler(model.tokenizer, 1024, (5000,)).compile({"json_object": True})


def test_a_likeliest_token_that_may_follow_is_taken_without_a_mask(make, model):
    params = SamplingParams(temperature=0, structured_outputs={"choice": ["yes", "no"]})
    grammar = make(**params.structured_outputs)
    state = SamplingState(params, [5], vocab_size=1024, seed=0, grammar=grammar)
    row = np.zeros((1, 1024), dtype=np.float32)
    inside = model.tokenizer.encode("no", add_special_tokens=False)[0]
    row[0, inside] = 2
    assert grammar.spares(inside) and Sampler(1024).sample(row, [state])[0].token_id == inside
    row[0, 500] = 3
    assert not grammar.spares(500) and Sampler(1024).sample(row, [state])[0].token_id == inside
