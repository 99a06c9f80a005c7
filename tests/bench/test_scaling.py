"""Curves of decode speed: which points are on which, what does not fit, and the picture."""

from __future__ import annotations

import json

import pytest

from minipaged.bench import scaling
from minipaged.cli.main import main

TINY = ["bench", "scaling", "--model", "tiny", "--device", "reference", "--rounds", "1"]


def test_points_curves_and_what_is_left_out(tmp_path, capsys):
    file = tmp_path / "scaling.json"
    grid = ["--users", "1,2", "--at-context", "16", "--contexts", "16,32,100000", "--at-users", "2"]
    assert main([*TINY, *grid, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert {(p["users"], p["context"]) for p in result["points"]} == {(1, 16), (2, 16), (2, 32)}
    for point in result["points"]:
        assert point["tokens_per_second"] == pytest.approx(point["users"] / point["step"])
    assert [(p["users"], p["context"]) for p in result["left_out"]] == [(2, 100000)]
    curves = scaling.series(result)
    assert [x for x, _ in curves["users, 16 tokens of context"]] == [1, 2]
    assert [x for x, _ in curves["context, 2 users"]] == [16, 32]
    assert "left out: 2 users at 100000 tokens" in capsys.readouterr().out


def test_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib (extra: view)")
    file = tmp_path / "scaling.svg"
    grid = ["--users", "1,2", "--at-context", "16", "--contexts", "16,32", "--at-users", "1"]
    assert main([*TINY, *grid, "--plot", str(file)]) == 0
    assert "tokens of context" in file.read_text()


def test_points_of_an_earlier_run(tmp_path, capsys):
    first, both = tmp_path / "first.json", tmp_path / "both.json"
    grid = ["--at-context", "16", "--contexts", "16", "--at-users", "1"]
    assert main([*TINY, "--users", "1,2", *grid, "--steps", "3", "--json", str(first)]) == 0
    again = ["--users", "1", "--at-context", "16", "--contexts", "32", "--at-users", "2", "--with", str(first)]
    assert main([*TINY, *again, "--json", str(both)]) == 0
    result, earlier = json.loads(both.read_text()), json.loads(first.read_text())
    assert {(p["users"], p["context"]) for p in result["points"]} == {(1, 16), (2, 16), (2, 32)}
    kept = next(p for p in earlier["points"] if p["users"] == 2)
    assert kept in result["points"]
    assert "median of 3 steps" in capsys.readouterr().out
    earlier["context"]["dtype"] = "int8"
    first.write_text(json.dumps(earlier))
    assert main([*TINY, *again]) == 2
    assert "--with has dtype 'int8'" in capsys.readouterr().err
    assert main([*TINY, *again[:-1], str(tmp_path / "none.json")]) == 2
    assert "bench scaling --json" in capsys.readouterr().err
