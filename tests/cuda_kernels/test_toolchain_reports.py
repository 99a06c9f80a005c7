"""The machine code is what the kernels state, counters are what the shapes demand, and mutants do not survive."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

for package in ("numba.cuda", "cuda.bindings.nvvm", "cuda.bindings.nvjitlink"):
    pytest.importorskip(package, reason=f"compiling CUDA kernels needs {package} (pip install minipaged[cuda])")

from numba import cuda  # noqa: E402

from cuda_kernels.__main__ import main  # noqa: E402
from cuda_kernels.kernel import Kernel, float32, int32, pointer  # noqa: E402
from cuda_kernels.toolchain import ptx_cache  # noqa: E402
from cuda_kernels.toolchain.compile import CompileError, assemble, compile_ptx, sass  # noqa: E402
from cuda_kernels.toolchain.examples import EXAMPLES, SMOLLM2, example  # noqa: E402
from cuda_kernels.toolchain.mutation import SURVIVORS, mutants, sweep  # noqa: E402
from cuda_kernels.toolchain.profile import BANDWIDTH, predicted_seconds, profile  # noqa: E402
from cuda_kernels.toolchain.sass_report import MULTIPROCESSORS, report, wanted_features  # noqa: E402

ARCHITECTURES = [(7, 5), (8, 0), (9, 0)]
QUICK = ("rms_norm", "rope_kv", "product_int8", "moe_sort", "argmax", "process_logits")
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in EXAMPLES]


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


@pytest.mark.parametrize("cc", ARCHITECTURES, ids=lambda cc: f"sm_{cc[0]}{cc[1]}")
@pytest.mark.parametrize("name", EVERY)
def test_machine_code_is_as_stated(name, cc):
    """No spills, registers and occupancy as stated beside the kernel, and the card's own instructions in use."""
    made = report(example(name, SMOLLM2, cc).kernel, cc)
    assert not made.complaints(wanted_features(name, cc))


def test_a_complaint_is_made():
    kernel = example("argmax").kernel
    worse = Kernel("argmax", kernel.body, kernel.signature, block=kernel.block, registers_at_most=8, blocks_per_sm=1)
    complaints = report(worse, (8, 0)).complaints(frozenset({"LDSM"}))
    assert [each.split()[0] for each in complaints] == ["uses", "has"]
    crowded = Kernel("argmax", kernel.body, kernel.signature, block=kernel.block, shared_bytes=48 << 10)
    assert report(crowded, (8, 0)).blocks_per_sm == 3
    assert MULTIPROCESSORS[8, 0].shared_bytes == 164 << 10


@pytest.mark.parametrize("name", EVERY)
def test_examples_run_on_the_oldest_card(name):
    if name == "sample":
        pytest.skip("the sampler's own tests run it on sm_75")
    counters = example(name, cc=(7, 5)).run((7, 5))
    assert counters.instructions and counters.store.bytes


@pytest.mark.parametrize(
    "name",
    ["product_float16", "product_int8", "product_int4", pytest.param("attention_decode", marks=pytest.mark.slow)],
)
def test_decode_moves_hardly_more_than_it_must(name):
    """Of the weight and of K and V every byte moves once, in whole sectors."""
    result = profile(name, (8, 0))
    big = max((each for each in result.subject.arguments if isinstance(each, np.ndarray)), key=lambda each: each.nbytes)
    small = result.subject.must_move - big.nbytes * (2 if name == "attention_decode" else 1)
    again = 0 if name == "attention_decode" else result.subject.arguments[0].nbytes * (result.subject.grid[0] - 1)
    assert small < 0.2 * result.subject.must_move
    assert result.moved - again <= 1.05 * result.subject.must_move  # each block reads the token's row, from L2
    if name != "attention_decode":
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
    ["embedding", "activation", "soft_cap", "row_gather", "copy_blocks"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("rms_norm", "layer_norm", "rope_kv", "moe_combine")]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("argmax", "product_plain")],
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
