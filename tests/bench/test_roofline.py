"""The roofline's arithmetic; its rates are a machine's, so only their presence is checked."""

from __future__ import annotations

import json
import threading

import pytest

from minipaged.bench import roofline
from minipaged.cli.main import main
from minipaged.ops.cpu.products import FORMATS


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(roofline, "COLD_BYTES", 1 << 20)
    monkeypatch.setattr(roofline, "_PEAK_ITERATIONS", 1000)


def test_floor_is_the_larger_of_two_times():
    timing = roofline.ProductTiming("int8", 4, 1, seconds=2e-3, operations=1_000_000, floor_seconds=1e-3)
    assert timing.rate == 5e8 and timing.percent_of_floor == 50


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_timed(format):
    timings = roofline.time_products(format, rows=(1, 9), num_threads=2, N=96, K=64, repeats=1)
    assert [timing.M for timing in timings] == [1, 9]
    for timing in timings:
        assert timing.operations == 2 * timing.M * 96 * 64
        assert timing.seconds > 0 and timing.floor_seconds > 0


def test_bandwidth_and_peaks_are_rates():
    assert roofline.read_bandwidth(1) > 0
    assert all(roofline.peak_rate(format, 1) > 0 for format in FORMATS)


def test_threads_work_at_the_same_time():
    meeting = threading.Barrier(3, timeout=30)
    assert roofline.in_threads(3, lambda index: meeting.wait(), repeats=2) >= 0


def test_the_command_prints_its_table_and_its_numbers(capsys, tmp_path):
    file = tmp_path / "roofline.json"
    main(["bench", "roofline", "--format", "int8", "--rows", "1,32", "--json", str(file)])
    text = capsys.readouterr().out
    assert "1 thread(s)" in text and "int8" in text and "M=32" in text
    result = json.loads(file.read_text())
    assert [p["rows"] for p in result["formats"]["int8"]["products"]] == [1, 32]
    assert result["formats"]["int8"]["peak"] > 0 and result["bandwidth"] > 0
