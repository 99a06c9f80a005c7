"""Flags are generated from the dataclasses: names, types, help."""

import argparse
import dataclasses

import pytest

from minipaged.cli import options
from minipaged.cli.main import build_parser
from minipaged.config import EngineConfig, SamplingParams


def parse(*arguments):
    return build_parser().parse_args(["generate", "hello", *arguments])


def test_every_field_has_a_help_text():
    for cls in (EngineConfig, SamplingParams):
        texts = options.field_help(cls)
        for field in dataclasses.fields(cls):
            assert len(texts[field.name]) > 10, f"{cls.__name__}.{field.name} is not documented"


def test_every_field_has_a_flag_spelled_alike(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    for cls in (EngineConfig, SamplingParams):
        for field in dataclasses.fields(cls):
            assert f"--{field.name.replace('_', '-')}" in text


def test_only_what_was_given_is_set():
    args = parse()
    assert options.given(args, EngineConfig) == {}
    assert options.given(args, SamplingParams) == {}


def test_values_have_the_fields_types():
    args = parse(
        *("--temperature", "0.5"),
        *("--max-tokens", "7"),
        *("--stop", "a", "--stop", "b"),
        *("--stop-token-ids", "1,2"),
        *("--logit-bias", "3=-5,4=2.5"),
        "--ignore-eos",
        "--no-skip-special-tokens",
        *("--block-size", "8"),
        "--no-enable-prefix-caching",
        *("--kv-cache-memory", "1.5M"),
        *("--device", "reference"),
    )
    assert options.given(args, SamplingParams) == {
        "temperature": 0.5,
        "max_tokens": 7,
        "stop": ["a", "b"],
        "stop_token_ids": [1, 2],
        "logit_bias": {3: -5.0, 4: 2.5},
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    assert options.given(args, EngineConfig) == {
        "block_size": 8,
        "enable_prefix_caching": False,
        "kv_cache_memory": 3 << 19,
        "device": "reference",
    }


def test_early_stopping_is_a_truth_value_or_a_word():
    values = [parse("--early-stopping", text).early_stopping for text in ("true", "False", "never")]
    assert values == [True, False, "never"]


def test_seed_belongs_to_the_request():
    args = parse("--seed", "5")
    assert options.given(args, SamplingParams) == {"seed": 5}
    assert "seed" not in options.given(args, EngineConfig, omit=("seed",))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--blok-size", "8"],
        ["--max-tok", "8"],  # no guessing of abbreviations
        ["--max-tokens", "many"],
        ["--stop-token-ids", "1;2"],
        ["--logit-bias", "3:1"],
        ["--kv-cache-memory", "lots"],
        ["--device", "tpu"],
    ],
)
def test_a_typo_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(*arguments)
    assert exit_.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, expected", [("1", 1), ("2k", 2048), ("3MiB", 3 << 20), ("0.5GB", 1 << 29), ("1T", 1 << 40), ("7B", 7)]
)
def test_byte_sizes(text, expected):
    assert options.byte_size(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "1X", "MB", "1e3"])
def test_byte_sizes_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        options.byte_size(text)
