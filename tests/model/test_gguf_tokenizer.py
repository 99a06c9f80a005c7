"""Tokenizers rebuilt from GGUF metadata, against independent ones (tests/fixtures/make_gguf_tokenizers.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from minipaged.errors import TokenizerError, UnsupportedModelError
from minipaged.model import catalog
from minipaged.model.gguf import GGUFFile
from minipaged.model.gguf_tokenizer import CONTROL, NORMAL, PRE_TOKENIZERS, UNKNOWN, USER_DEFINED, GGUFVocabulary

FIXTURE = json.loads((Path(__file__).parent.parent / "fixtures" / "gguf_tokenizers.json").read_text(encoding="utf-8"))
TEXTS = FIXTURE["texts"]
# What tokenizer.json of Llama 3 and Qwen2 say, with the pre-tokenizer spelled out.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def small_metadata(**changes) -> dict:
    """The SentencePiece model of the fixture, as a converter would store it."""
    vocabulary = FIXTURE["small_vocabulary"]
    values = {
        "model": "llama",
        "tokens": vocabulary["tokens"],
        "scores": np.array(vocabulary["scores"], np.float32),
        "token_type": np.array(vocabulary["token_type"], np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (values | changes).items() if value is not None}


def byte_level(pre_tokenizer, vocab_size=600, **model) -> tuple[Tokenizer, dict]:
    """A byte-level BPE trained here, and the metadata that a converter would make of it."""
    tokenizer = Tokenizer(BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|begin|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    types = np.full(len(tokens), NORMAL, np.int32)
    types[-3:] = CONTROL, CONTROL, USER_DEFINED
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    values = {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(merge) for merge in merges],
        "bos_token_id": len(tokens) - 3,
        "eos_token_id": len(tokens) - 2,
    }
    return tokenizer, {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def split(pattern):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def test_sentencepiece_with_a_space_in_front():
    tokenizer = GGUFVocabulary(small_metadata()).build()
    for text, ids in zip(TEXTS, FIXTURE["ids"]["small"], strict=True):
        assert tokenizer.encode(text).ids == ids, repr(text)


def test_sentencepiece_decodes_to_the_text():
    tokenizer = GGUFVocabulary(small_metadata()).build()
    for text in TEXTS:
        if "▁" not in text and "<s>" not in text and "<unk>" not in text and not text.startswith("<"):
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("prefix", [True, False])
def test_add_space_prefix(prefix):
    tokenizer = GGUFVocabulary(small_metadata(add_space_prefix=prefix, add_bos_token=False)).build()
    assert tokenizer.encode("a").tokens == (["▁a"] if prefix else ["a"])
    assert tokenizer.decode(tokenizer.encode(" a b ").ids) == " a b "


PATTERNS = {
    "gpt-2": (lambda: pre_tokenizers.ByteLevel(False), {}),
    "default": (lambda: pre_tokenizers.ByteLevel(False), {}),
    "smollm": (lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]), {}),
    "llama-bpe": (lambda: split(LLAMA3), {"ignore_merges": True}),
    "qwen2": (lambda: split(QWEN2), {}),
}


@pytest.mark.parametrize("pre", PATTERNS)
def test_byte_level_with_each_pre_tokenizer(pre):
    make, model = PATTERNS[pre]
    wanted, metadata = byte_level(make(), **model)
    if pre == "qwen2":
        wanted.normalizer = normalizers.NFC()
    tokenizer = GGUFVocabulary(metadata | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}).build()
    for text in TEXTS + ["a<|im_end|>b<think> c"]:
        ids = wanted.encode(text).ids
        assert tokenizer.encode(text).ids == ids, repr(text)
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == wanted.decode(ids, skip_special_tokens=skip)


def test_pre_tokenizers_differ():
    """Each pattern splits some text in its own way; a mix-up would be seen."""
    text = "I'LL say 12345 camelCase don't\n\n  x"
    splits = {}
    for pre, make in PRE_TOKENIZERS.items():
        splits.setdefault(str([piece for piece, _ in make().pre_tokenize_str(text)]), []).append(pre)
    assert len(splits) == 6
    assert ["gpt-2"] in splits.values() and ["tekken"] in splits.values() and ["gpt-4o"] in splits.values()


def test_no_pre_tokenizer_named_is_gpt2s():
    _, metadata = byte_level(pre_tokenizers.ByteLevel(False))
    assert GGUFVocabulary(metadata).pre == "gpt-2"


def test_bos_and_eos_are_added_as_the_file_says():
    _, metadata = byte_level(split(LLAMA3))
    bos, eos = metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]

    def ids(**flags):
        flags = {f"tokenizer.ggml.{key}": value for key, value in flags.items()}
        return GGUFVocabulary(metadata | flags).build().encode("a").ids

    (a,) = ids(pre="qwen2")
    assert ids(pre="qwen2", add_bos_token=True) == [bos, a]
    assert ids(pre="llama-bpe") == [bos, a]
    assert ids(pre="llama-bpe", add_bos_token=False) == [a]
    assert ids(pre="qwen2", add_eos_token=True) == [a, eos]
    assert ids(pre="qwen2", add_bos_token=True, bos_token_id=None) == [a]
    assert GGUFVocabulary(small_metadata()).build().encode("").ids == [1]


def test_ends_of_text():
    _, metadata = byte_level(split(QWEN2))
    ends = GGUFVocabulary(metadata | {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 6}).eos_token_ids
    im_end = len(metadata["tokenizer.ggml.tokens"]) - 2  # recognised by its text
    assert ends == [5, 6, im_end]


def test_special_tokens_are_marked():
    vocabulary = GGUFVocabulary(small_metadata())
    added = vocabulary.build().get_added_tokens_decoder()
    assert {id_ for id_, token in added.items() if token.special} == {0, 1, 2}
    assert vocabulary.special_tokens() == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def changed(key: str, at: int, value) -> dict:
    values = small_metadata()[f"tokenizer.ggml.{key}"].copy()
    values[at] = value
    return {key: values}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": []}, "has 0 tokens"),
        ({"tokens": "abc"}, "tokens is a str"),
        ({"scores": None}, "scores is missing"),
        ({"scores": np.zeros(3, np.float32)}, "scores has 3 values"),
        ({"scores": np.zeros(600, np.int32)}, "type int32"),
        (changed("scores", 300, np.nan), "NaN"),
        ({"token_type": np.zeros(600, np.float32)}, "type float32"),
        (changed("tokens", 301, "▁t"), "'▁t' appears twice"),
        (changed("tokens", 301, "x" * 5000), "a token has 5000 characters"),
        ({"bos_token_id": 600}, "bos_token_id is 600; it must be a token id below 600"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'"),
        ({"add_bos_token": 1}, "add_bos_token is a int"),
    ],
)
def test_bad_vocabularies_are_refused(changes, words):
    with pytest.raises(TokenizerError, match=words):
        GGUFVocabulary(small_metadata(**changes)).build()


@pytest.mark.parametrize("merges", [["ab"], ["a zzzz"], ["zzzz a"], [" a"], [""], 5, None])
def test_bad_merges_are_refused(merges):
    _, metadata = byte_level(pre_tokenizers.ByteLevel(False))
    with pytest.raises(TokenizerError):
        GGUFVocabulary(metadata | {"tokenizer.ggml.merges": merges}).build()


@pytest.mark.parametrize("key, value", [("model", "bert"), ("model", "t5"), ("pre", "kimi-k2")])
def test_unknown_kinds_are_refused_by_name(key, value):
    _, metadata = byte_level(pre_tokenizers.ByteLevel(False))
    with pytest.raises(UnsupportedModelError, match=value):
        GGUFVocabulary(metadata | {f"tokenizer.ggml.{key}": value})


def test_control_tokens_of_phi3_swallow_white_space():
    for architecture, swallowed in (("phi3", True), ("llama", False)):
        tokenizer = GGUFVocabulary(small_metadata() | {"general.architecture": architecture}).build()
        assert (tokenizer.encode("</s>\n a").ids == tokenizer.encode("</s>a").ids) is swallowed
        assert tokenizer.encode("<s>\n a").ids != tokenizer.encode("<s>a").ids


def test_unknown_tokens_are_special():
    types = small_metadata()["tokenizer.ggml.token_type"]
    assert types[0] == UNKNOWN
    tokenizer = GGUFVocabulary(small_metadata(add_bos_token=False)).build()
    assert tokenizer.encode("<unk>").ids == [0]


@pytest.mark.real_model
@pytest.mark.parametrize("name, model", [("smollm2", "smollm2-135m"), ("gemma3", "gemma3-270m")])
def test_real_models(name, model):
    entry = catalog.get_entry(model)
    if not entry.cached:
        pytest.skip(f"{model} has not been pulled")
    tokenizer = GGUFFile(entry.path).tokenizer()
    for text, ids in zip(TEXTS, FIXTURE["ids"][name], strict=True):
        assert tokenizer.encode(text) == ids, repr(text)
