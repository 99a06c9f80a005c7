"""Workloads: the same seed gives the same requests; files are checked entry by entry."""

import statistics

import pytest

from minipaged.bench.workload import (
    DISTRIBUTIONS,
    LOG_NORMAL,
    Workload,
    WorkloadRequest,
    draw_lengths,
    load_workload,
    make_workload,
    save_workload,
)
from minipaged.cli import bench as cli_bench
from minipaged.errors import InvalidParameterError


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_lengths_repeat_and_fit(distribution):
    lengths = draw_lengths(distribution, 300, seed=3, max_total=600)
    assert lengths == draw_lengths(distribution, 300, seed=3, max_total=600)
    assert all(prompt >= 1 and output >= 1 and prompt + output <= 600 for prompt, output in lengths)
    if distribution != "fixed":
        assert lengths != draw_lengths(distribution, 300, seed=4, max_total=600)


@pytest.mark.parametrize("distribution", ["conversation", "instruction"])
def test_means_are_those_of_the_data_sets(distribution):
    lengths = draw_lengths(distribution, 20_000, seed=0, max_total=10**6)
    for column, (mean, _) in zip(zip(*lengths, strict=True), LOG_NORMAL[distribution], strict=True):
        assert statistics.mean(column) == pytest.approx(mean, rel=0.05)


def test_lengths_that_cannot_fit_are_refused():
    with pytest.raises(InvalidParameterError, match="do not fit into 16 tokens"):
        draw_lengths("fixed", 1, seed=0, max_total=16, input_len=10, output_len=10)
    with pytest.raises(InvalidParameterError, match="do not fit into 2 tokens"):
        draw_lengths("conversation", 1, seed=0, max_total=2)


def test_tokens_are_in_the_vocabulary():
    workload = make_workload("uniform", 20, 1, vocab_size=7, max_model_len=300)
    assert {token for request in workload.requests for token in request.prompt} <= set(range(7))


def test_saved_and_loaded_again(tmp_path):
    requests = [WorkloadRequest("text", 3), WorkloadRequest([1, 2, 3], 4)]
    save_workload(Workload("made by hand", requests), tmp_path / "w.json")
    assert load_workload(tmp_path / "w.json").requests == requests


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("{", "not valid JSON"),
        ("[]", "not empty"),
        ('{"a": 1}', "must be a list"),
        ('[{"prompt": "a"}]', "request 0"),
        ('[{"prompt": "a", "max_tokens": 1}, {"prompt": "a", "max_tokens": 0}]', "request 1: max_tokens is 0"),
        ('[{"prompt": "a", "max_tokens": true}]', "max_tokens is True"),
        ('[{"prompt": 5, "max_tokens": 1}]', "prompt is a int"),
        ('[{"prompt_token_ids": "abc", "max_tokens": 1}]', "must be a list"),
        ('[{"prompt": "a", "prompt_token_ids": [1], "max_tokens": 1}]', "either"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, complaint):
    (tmp_path / "w.json").write_text(content)
    with pytest.raises(InvalidParameterError, match=complaint):
        load_workload(tmp_path / "w.json")


def test_missing_file_and_unwritable_place(tmp_path):
    with pytest.raises(InvalidParameterError, match="cannot read"):
        load_workload(tmp_path / "absent.json")
    with pytest.raises(InvalidParameterError, match="cannot write"):
        save_workload(Workload("", []), tmp_path)


def test_the_command_line_offers_the_same_distributions():
    assert cli_bench.DISTRIBUTIONS == DISTRIBUTIONS
