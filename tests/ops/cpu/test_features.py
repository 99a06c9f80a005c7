"""The choice of a level, on hosts of all kinds."""

from __future__ import annotations

import pytest

from minipaged.errors import BackendUnavailableError, ConfigError
from minipaged.ops.cpu import features
from minipaged.ops.cpu.features import LEVELS, REQUIRED_FEATURES, best_level, check_platform, choose_level

ALL = REQUIRED_FEATURES["avx512bf16"]


def test_each_level_needs_what_the_weaker_ones_need():
    for weaker, stronger in zip(LEVELS, LEVELS[1:], strict=False):
        assert REQUIRED_FEATURES[weaker] < REQUIRED_FEATURES[stronger]


@pytest.mark.parametrize("level", LEVELS)
def test_the_best_level_is_the_one_whose_features_are_there(level):
    assert best_level(REQUIRED_FEATURES[level] | {"sse2", "aes"}) == level


@pytest.mark.parametrize("missing", sorted(REQUIRED_FEATURES["avx512"]))
def test_one_missing_feature_costs_the_level(missing):
    assert best_level(ALL - {missing}) in ("generic", "avx2")


def test_forcing_down_and_not_up():
    assert choose_level(ALL, None) == "avx512bf16"
    assert choose_level(ALL, "") == "avx512bf16"
    for level in LEVELS:
        assert choose_level(ALL, level) == level
    with pytest.raises(ConfigError, match="'avx2' needs f16c, which this CPU .* lacks; the highest level here is 'gen"):
        choose_level(frozenset({"avx2", "fma"}), "avx2")
    with pytest.raises(ConfigError, match="'sse9' is not a level; choose one of generic, avx2, avx512, avx512bf16"):
        choose_level(ALL, "sse9")


def test_platforms_that_packed_weights_do_not_fit():
    check_platform("little", 8)
    with pytest.raises(BackendUnavailableError, match="big-endian"):
        check_platform("big", 8)
    with pytest.raises(BackendUnavailableError, match="32-bit"):
        check_platform("little", 4)


@pytest.mark.parametrize("setting,value", [("CPU_FEATURES", ""), ("CPU_FEATURES", "+sse2,-avx2"), ("ENABLE_AVX", 0)])
def test_the_target_of_numba_counts(setting, value, monkeypatch):
    from numba import config

    monkeypatch.setattr(config, setting, value)
    assert best_level(features.host_features()) == "generic"


def test_vectors_of_each_level():
    widths = {level: features.instruction_set(level).lanes for level in LEVELS}
    assert widths == {"generic": 4, "avx2": 8, "avx512": 16, "avx512bf16": 16}
    arm = features.instruction_set("generic", "aarch64")
    assert arm.has_fma and not arm.has_x86
