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
