import json
import shutil
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from minipaged.errors import MinipagedError, ModelFormatError, ModelNotFoundError, TokenizerError, TokenRangeError
from minipaged.model.catalog import BUILTIN
from minipaged.model.tokenizer import IncrementalDetokenizer, Tokenizer

TINY = Tokenizer.from_directory(BUILTIN / "tiny")


def sentencepiece_backend(decoder: str) -> Backend:
    """A small BPE vocabulary as SentencePiece models have it: byte tokens, "▁" for a space."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "a", "b", "n", "é", "▁a", "▁b", "an", "▁an", "▁▁a", "b▁", "€", "\ufffd", ".", "▁."]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "▁"), ("▁", "a"), ("▁", "b"), ("a", "n"), ("▁", "an"), ("▁▁", "a"), ("▁", ".")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if decoder == "llama":
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Metaspace() if decoder == "metaspace" else decoders.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never" if decoder == "gemma" else "first")
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


LLAMA = Tokenizer(sentencepiece_backend("llama"), bos_token_id=1, eos_token_ids=[2])
GEMMA = Tokenizer(sentencepiece_backend("gemma"))
METASPACE = Tokenizer(sentencepiece_backend("metaspace"))
ALL = [TINY, LLAMA, GEMMA, METASPACE]
NAMES = ["byte-level", "llama", "gemma", "metaspace"]


def stream(tokenizer, ids, skip=True, prompt=()):
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return [detokenizer.append([token_id]) for token_id in ids] + [detokenizer.flush()]


def ids_of(tokenizer):
    """Random ids, with many from the parts of the vocabulary that are difficult, and unknown ones."""
    size = tokenizer.vocab_size
    hard = st.integers(0, min(size - 1, 275)) if tokenizer.byte_level else st.integers(max(0, size - 20), size - 1)
    euro = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    if tokenizer.byte_level:
        euro = tokenizer.encode("€")
    one = st.integers(0, size + 3).map(lambda i: [i]) | hard.map(lambda i: [i]) | st.just(euro) | st.just(euro[:2])
    return st.lists(one, max_size=16).map(lambda parts: [i for part in parts for i in part])


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
@settings(max_examples=100, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_pieces_add_up_to_the_full_decoding(tokenizer, data, skip):
    ids = data.draw(ids_of(tokenizer))
    assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
@settings(max_examples=100, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_text_after_a_prompt_continues_it(tokenizer, data, skip):
    """For prompts that do not end inside a character or a run of bytes, decoding is additive."""
    prompt = data.draw(ids_of(tokenizer)) + [tokenizer.encode("an")[-1]]
    ids = data.draw(ids_of(tokenizer))
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    assert before + "".join(stream(tokenizer, ids, skip, prompt)) == tokenizer.decode(prompt + ids, skip)


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20))
def test_valid_text_is_never_shown_in_halves(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text and "<" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(("tokenizer", "ids"), [(TINY, TINY.encode("€")), (LLAMA, [3 + 0xE2, 3 + 0x82, 3 + 0xAC])])
def test_a_character_in_three_tokens_comes_out_whole(tokenizer, ids):
    assert len(ids) == 3
    pieces = stream(tokenizer, ids)
    assert [piece for piece in pieces if piece] == ["€"]
    assert "".join(stream(tokenizer, ids[2:], prompt=ids[:2])) == "€"  # begun by the prompt, ended by the output


def test_a_byte_level_character_is_shown_with_its_last_token():
    ids = TINY.encode("€a", add_special_tokens=False)
    assert stream(TINY, ids) == ["", "", "€", "a", ""]


def test_truly_invalid_bytes_become_replacement_characters():
    broken = TINY.encode("€")[:2]
    assert stream(TINY, [*broken, *TINY.encode("a")]) == ["", "", "\ufffda", ""]
    assert stream(TINY, broken) == ["", "", "\ufffd"]
    assert stream(LLAMA, [3 + 0xE2, 3 + 0x82]) == ["", "", "\ufffd\ufffd"]


def test_leading_space_belongs_to_a_continuation_but_not_to_a_start():
    an, bos = LLAMA.backend.token_to_id("▁an"), 1
    assert "".join(stream(LLAMA, [an])) == "an"
    assert "".join(stream(LLAMA, [an], prompt=[bos])) == "an"
    assert "".join(stream(LLAMA, [an], prompt=[bos, an])) == " an"
    space = LLAMA.backend.token_to_id("▁")
    assert "".join(stream(LLAMA, [an], prompt=[space])) == " an"


def test_only_the_end_of_a_prompt_is_looked_at():
    prompt = range(4, 1024)  # reversed() and a few items are all that is needed
    assert "".join(stream(TINY, TINY.encode("King"), prompt=prompt)) == "King"


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
def test_ten_thousand_tokens_take_linear_time(tokenizer):
    def seconds(count):
        ids = [(i * 7919) % tokenizer.vocab_size for i in range(count)]
        start = time.process_time()
        stream(tokenizer, ids)
        return time.process_time() - start

    seconds(100)
    assert min(seconds(10_000) for _ in range(3)) < 0.3


def test_a_long_run_of_byte_tokens_takes_linear_time():
    start = time.process_time()
    assert "".join(stream(LLAMA, [3 + 0x41] * 10_000)) == "A" * 10_000
    assert time.process_time() - start < 1


def test_ids_and_special_tokens_of_tiny():
    assert (TINY.bos_token_id, TINY.eos_token_ids, TINY.eos_token_id) == (0, (1, 3), 1)
    assert TINY.special_token_ids == {0, 1, 2, 3}
    assert TINY.vocab_size == 1024
    ids = TINY.encode("<|im_start|>user")
    assert ids[0] == 2
    assert TINY.decode(ids) == "user"
    assert TINY.decode(ids, skip_special_tokens=False) == "<|im_start|>user"


def test_tiny_encodes_as_the_golden_file_says(request):
    golden = json.loads((request.config.rootpath / "tests/fixtures/tiny_golden.json").read_text(encoding="utf-8"))
    for entry in golden["prompts"]:
        assert TINY.encode(entry["prompt"]) == entry["prompt_ids"]
        assert TINY.decode(entry["target"]["greedy_ids"]) == entry["target"]["greedy_text"]


def test_token_text_is_that_of_a_token_within_a_text():
    assert TINY.token_text(TINY.encode("my king")[-1]).startswith(" ")
    assert TINY.token_text(TINY.encode("€")[0]) == "\ufffd"
    assert TINY.token_text(5000) == ""
    assert LLAMA.token_text(LLAMA.backend.token_to_id("▁an")) == " an"
    assert LLAMA.token_text(2) == "</s>"


@pytest.mark.parametrize("text", ["a\ud800b", "\udcff"])
def test_lone_surrogates_are_refused(text):
    with pytest.raises(TokenizerError, match="lone surrogate U\\+D[8C]"):
        TINY.encode(text)


def test_only_text_is_encoded_and_only_ids_are_decoded():
    with pytest.raises(TokenizerError, match="bytes is not text"):
        TINY.encode(b"abc")
    with pytest.raises(TokenRangeError):
        TINY.decode([True])
    for bad in (-1, 2**32, 1.5, "a"):
        with pytest.raises(TokenRangeError):
            TINY.decode([bad])
        with pytest.raises(TokenRangeError):
            IncrementalDetokenizer(TINY).append([bad])
        with pytest.raises(TokenRangeError):
            IncrementalDetokenizer(LLAMA).append([bad])


def test_decoding_does_not_clean_up_spaces():
    assert TINY.decode(TINY.encode("a . b , c n't")) == "a . b , c n't"


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    backend = Backend.from_file(str(BUILTIN / "tiny" / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=100)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "To be, or not to be"
    assert Tokenizer.from_directory(tmp_path).encode(text) == TINY.encode(text)


def with_bos(tmp_path, post_processor=None, **settings) -> Tokenizer:
    backend = sentencepiece_backend("llama")
    if post_processor:
        backend.post_processor = post_processor
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, **settings}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_directory(tmp_path)


def test_bos_comes_from_the_post_processor_or_else_from_add_bos_token(tmp_path):
    template = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    assert with_bos(tmp_path, add_bos_token=True).encode("a")[0] == 1
    assert 1 not in with_bos(tmp_path, add_bos_token=True).encode("a", add_special_tokens=False)
    assert 1 not in with_bos(tmp_path, add_bos_token=False).encode("a")
    assert 1 not in with_bos(tmp_path).encode("a")
    assert with_bos(tmp_path, template, add_bos_token=True).encode("a").count(1) == 1
    assert with_bos(tmp_path, template).encode("a").count(1) == 1


def test_eos_ids_come_from_generation_config_then_config_and_the_tokenizer(tmp_path):
    assert with_bos(tmp_path).eos_token_ids == (2,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert Tokenizer.from_directory(tmp_path).eos_token_ids == (5, 2)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert Tokenizer.from_directory(tmp_path).eos_token_ids == (7, 2)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["x"]}')
    with pytest.raises(TokenizerError, match="eos_token_id"):
        Tokenizer.from_directory(tmp_path)


def test_special_tokens_that_only_the_config_declares_are_special(tmp_path):
    vocab = {"<s>": 0, "a": 1, "<turn>": 2}
    Backend(models.WordLevel(vocab, "a")).save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "additional_special_tokens": ["<turn>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_directory(tmp_path).special_token_ids == {0, 2}
    config = {"bos_token": "<s>", "added_tokens_decoder": {"2": {"content": "<turn>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.special_token_ids == {0, 2}
    assert tokenizer.decode([0, 1, 2]) == "a"
    config["added_tokens_decoder"] = {"9": {"content": "<turn>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match="declared with id 9"):
        Tokenizer.from_directory(tmp_path)


def test_a_token_declared_ordinary_in_one_file_and_special_in_the_other_is_special(tmp_path):
    backend = sentencepiece_backend("llama")
    backend.add_tokens(["<turn>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    token_id = backend.token_to_id("<turn>")
    config = {"added_tokens_decoder": {str(token_id): {"content": "<turn>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert token_id in Tokenizer.from_directory(tmp_path).special_token_ids


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    TINY.check_fits(1024)
    with pytest.raises(TokenizerError, match="up to id 1023.*only 1000 rows"):
        TINY.check_fits(1000)


def test_added_tokens_may_lie_outside_the_embedding():
    backend = Backend.from_file(str(BUILTIN / "tiny" / "tokenizer.json"))
    backend.add_special_tokens(["<image>"])
    Tokenizer(backend).check_fits(1024)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"model": 1}', b"\xff\xfe", b'{"version": "1.0"}'])
def test_broken_tokenizer_files_are_typed_errors(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match="not a valid tokenizer"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_broken_configuration_files_are_typed_errors(tmp_path, content):
    shutil.copy(BUILTIN / "tiny" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ModelFormatError, match=r"tokenizer_config\.json"):
        Tokenizer.from_directory(tmp_path)


def test_a_directory_without_tokenizer_says_so(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    "decoder", [decoders.CTC(), decoders.BPEDecoder(), decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)])]
)
def test_decoders_that_look_ahead_are_refused(decoder):
    backend = sentencepiece_backend("llama")
    backend.decoder = decoder
    with pytest.raises(TokenizerError, match="not supported"):
        Tokenizer(backend)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_mutated_tokenizer_files_never_escape_as_other_errors(data, tmp_path_factory):
    original = (BUILTIN / "tiny" / "tokenizer.json").read_bytes()[:3000] + b"}}"
    position = data.draw(st.integers(0, len(original) - 1))
    mutated = original[:position] + data.draw(st.binary(max_size=4)) + original[position + 1 :]
    folder = tmp_path_factory.mktemp("mutated")
    (folder / "tokenizer.json").write_bytes(mutated)
    try:
        Tokenizer.from_directory(folder).encode("To be")
    except MinipagedError:
        pass


