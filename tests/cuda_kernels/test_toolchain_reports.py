"""PTX and its cache, counters are what the shapes demand, mutants do not survive, and the commands that show it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter

import pytest

for package in ("numba.cuda", "cuda.bindings.nvvm", "cuda.bindings.nvjitlink"):
    pytest.importorskip(package, reason=f"compiling CUDA kernels needs {package} (pip install minipaged[cuda])")

from numba import cuda  # noqa: E402

from cuda_kernels.__main__ import main  # noqa: E402
from cuda_kernels.kernel import Kernel, float32, int32, pointer  # noqa: E402
from cuda_kernels.toolchain import ptx_cache  # noqa: E402
from cuda_kernels.toolchain.compile import CompileError, assemble, compile_ptx, sass  # noqa: E402
from cuda_kernels.toolchain.examples import EXAMPLES, example  # noqa: E402
from cuda_kernels.toolchain.mutation import SURVIVORS, mutants, sweep  # noqa: E402
from cuda_kernels.toolchain.profile import BANDWIDTH, predicted_seconds, profile  # noqa: E402

ARCHITECTURES = [(7, 5), (8, 0), (9, 0)]
QUICK = ("rms_norm", "rope_kv", "product_int8", "moe_sort", "argmax", "process_logits")
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in EXAMPLES]


GUARDS_SLOW = ("rms_norm", "layer_norm", "rope_kv", "moe_route", "moe_sort", "moe_combine", "argmax")
GUARDS_SLOW += ("product_plain", "product_float16", "product_int8", "product_int4")
GUARDS_SLOW += ("attention_plain", "attention_prefill", "attention_decode", "attention_decode_split")
GUARDS_SLOW += ("attention_reduce", "logprobs", "sample")


def build(factor=2, guarded=True, name="scale"):
    """``y = factor * x`` with or without the check of the tail."""

    def scale(x, y, count):
        i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if i < count or not guarded:
            y[i] = x[i] * float32(factor)

    return Kernel(name, scale, (pointer(float32), pointer(float32), int32), {"factor": factor}, block=32)


def test_every_variant_has_its_own_name_and_ptx():
    texts = {factor: compile_ptx(build(factor), (8, 0)) for factor in (2, 3)}
    assert ".visible .entry scale__factor_2(" in texts[2]
    assert ".target sm_80" in texts[2] and texts[2] != texts[3].replace("factor_3", "factor_2")


def test_compiling_says_what_is_wrong():
    with pytest.raises(CompileError, match="needs sm_90 or newer, not sm_80"):
        compile_ptx(Kernel("k", build().body, build().signature, min_cc=(9, 0)), (8, 0))
    with pytest.raises(CompileError, match="nvJitLink for sm_75"):
        assemble(compile_ptx(build(), (8, 0)), (7, 5))
    with pytest.raises(CompileError, match="nvJitLink"):
        assemble("this is no PTX", (8, 0))
    with pytest.raises(TypeError, match="3 parameters, its signature 1"):
        Kernel("k", build().body, (int32,))


@pytest.mark.parametrize("cc", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_machine_code_for_every_generation(cc):
    assembled = assemble(compile_ptx(build(), cc), cc)
    assert 0 < assembled.registers < 32 and not assembled.spill_store_bytes
    assert re.search(r"\bFADD|\bFMUL", sass(assembled.cubin))


def test_ptx_is_kept_by_what_it_depends_on(tmp_path, monkeypatch):
    monkeypatch.setenv(ptx_cache.VARIABLE, str(tmp_path))
    variants = [build(factor, guarded) for factor in (2, 3) for guarded in (False, True)]
    keys = {ptx_cache.key_of(variant, cc) for variant in variants for cc in ARCHITECTURES}
    assert len(keys) == 12 and None not in keys
    assert ptx_cache.key_of(build(2), (8, 0)) == ptx_cache.key_of(build(2), (8, 0))
    text = compile_ptx(build(4), (8, 0))
    (file,) = tmp_path.iterdir()
    assert file.read_text() == text
    file.write_text("kept")
    assert compile_ptx(build(4), (8, 0)) == "kept"
    monkeypatch.setenv(ptx_cache.VARIABLE, "")
    assert compile_ptx(build(4), (8, 0)) == text


@pytest.mark.parametrize("name", EVERY)
def test_examples_run_on_the_oldest_card(name):
    if name == "sample":
        pytest.skip("the sampler's own tests run it on sm_75")
    counters = example(name, cc=(7, 5)).run((7, 5))
    assert counters.instructions and counters.store.bytes


@pytest.mark.parametrize(
    ("name", "requested"),
    [
        ("product_float16", 1.04),  # L2 is asked for a token's x by each block: few rows a block, many blocks
        ("product_int8", 1.07),
        ("product_int4", 1.12),
        pytest.param("attention_decode", 1.02, marks=pytest.mark.slow),
        pytest.param("attention_decode_split", 1.04, marks=pytest.mark.slow),
    ],
)
def test_decode_moves_hardly_more_than_it_must(name, requested):
    """In whole sectors, each of them once for all that read it."""
    result = profile(name, (8, 0))
    assert 1 <= result.surplus <= 1.05
    assert result.requested <= requested * result.subject.must_move
    if name.startswith("product"):
        assert result.counters.bank_conflicts == 0


def test_predictions_follow_the_bytes():
    for card, bandwidth in BANDWIDTH.items():
        assert predicted_seconds(10**9, card) == pytest.approx(2e-6 + 1 / (bandwidth * 0.85))


def listed(name, sort):
    """Survivors of ``name`` in the file: how many of each line and change."""
    entries = [each for each in json.loads(SURVIVORS.read_text()) if each["kernel"] == name and each["sort"] == sort]
    assert all(each["reason"] for each in entries)
    return Counter({each["what"]: each["count"] for each in entries})


def check_sweep(name, sort):
    verdicts = list(sweep(name, (8, 0), (sort,)))
    survivors = Counter(re.sub(r"[%$]\w+", "_", f"{m.line} {m.change}") for m, v in verdicts if v == "survived")
    assert survivors <= listed(name, sort)  # another compiler may unroll less
    assert not verdicts or any(verdict.startswith("killed") for _, verdict in verdicts)


@pytest.mark.parametrize("name", EVERY)
def test_lost_order_is_noticed(name):
    check_sweep(name, "order")


@pytest.mark.parametrize(
    "name",
    ["embedding", "activation", "soft_cap", "row_gather", "copy_blocks", "process_logits"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in GUARDS_SLOW],
)
def test_a_lost_guard_is_noticed(name):
    check_sweep(name, "guard")


def test_mutants_of_a_kernel():
    ptx = compile_ptx(build(), (8, 0))
    assert [each.change for each in mutants(ptx)] == ["always", "never"]
    assert not list(mutants(ptx, ("order",)))


def test_commands(capsys, tmp_path):
    assert main(["list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(EXAMPLES)
    drawing = tmp_path / "report.svg"
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib (pip install minipaged[view])")
    assert main(["profile", "rms_norm", "--small", "--draw", str(drawing)]) == 0
    text = capsys.readouterr().out
    assert "nothing here was measured on a card" in text and "predicted time" in text
    assert drawing.read_text().lstrip().startswith("<?xml")
    assert main(["predict", "rms_norm", "argmax"]) == 0
    assert "predicted, not measured" in capsys.readouterr().out
    assert main(["sass", "rms_norm"]) == 0
    assert main(["profile", "nothing"]) == 2
    assert "no kernel is called nothing" in capsys.readouterr().err


def test_importing_kernels_starts_no_driver():
    code = "import sys, cuda_kernels, cuda_kernels.kernel; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
