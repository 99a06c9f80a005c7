"""The machine code of every kernel, for three generations of cards: nothing spills, and it is what was intended.

``test_machine_code_is_as_stated`` takes the variant of each kernel that SmolLM2 needs; the slow one takes all fast
kernels in the formats, head sizes and tiles that an engine may ask for.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest

for package in ("numba.cuda", "cuda.bindings.nvvm", "cuda.bindings.nvjitlink"):
    pytest.importorskip(package, reason=f"compiling CUDA kernels needs {package} (pip install minipaged[cuda])")

from cuda_kernels import attention_decode, attention_plain, attention_prefill, product, product_plain  # noqa: E402
from cuda_kernels.kernel import Kernel  # noqa: E402
from cuda_kernels.toolchain.examples import EXAMPLES, SMOLLM2, example  # noqa: E402
from cuda_kernels.toolchain.sass_report import MULTIPROCESSORS, report, wanted_features  # noqa: E402

ARCHITECTURES = [(7, 5), (8, 0), (9, 0)]
QUICK = ("rms_norm", "rope_kv", "product_int8", "moe_sort", "argmax", "process_logits")
architectures = pytest.mark.parametrize("cc", ARCHITECTURES, ids=lambda cc: f"sm_{cc[0]}{cc[1]}")

#: dtype and kv_dtype, and the head sizes that are fast.
FORMATS = [("float16", "float16"), ("float16", "int8"), ("bfloat16", "bfloat16"), ("bfloat16", "int8")]
HEAD_DIMS = (64, 96, 128, 256)
WEIGHTS = [("float16", each) for each in ("float16", "int8", "int4")]
WEIGHTS += [("bfloat16", each) for each in ("bfloat16", "int8", "int4")]
TILES = [(2, 1), (8, 1), (2, 2), (4, 4)]


@architectures
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in EXAMPLES]
)
def test_machine_code_is_as_stated(name, cc):
    """No spills, registers and occupancy as stated beside the kernel, and the card's own instructions in use."""
    made = report(example(name, SMOLLM2, cc).kernel, cc)
    assert not made.complaints(wanted_features(made.kernel, cc))


def fast_kernels(cc) -> list[Kernel]:
    """Variants of the kernels that decide how fast a step is, those that ``cc`` has instructions for."""
    kernels: list[Kernel] = []
    for dtype, kv_dtype in FORMATS if cc >= (8, 0) else FORMATS[:2]:
        for head_dim in HEAD_DIMS:
            build = 8, 2, head_dim, 16, None, dtype, kv_dtype, cc
            kernels += [attention_prefill.build(*build), attention_decode.build(*build, False)]
        kernels += [attention_decode.build(8, 2, size, 16, None, dtype, kv_dtype, cc, True) for size in (64, 128)]
        kernels += [attention_decode.build(32, 2, 128, 16, 50.0, dtype, kv_dtype, cc, False)]  # 16 rows, a soft cap
    for x, weight in WEIGHTS if cc >= (8, 0) else WEIGHTS[:3]:
        largest = {"int4": 8, "int8": 4}.get(weight, 2)
        for row_tiles, token_tiles in TILES:
            if row_tiles <= largest or token_tiles > 2:
                sizes = {"cc": cc, "row_tiles": row_tiles, "token_tiles": token_tiles}
                kernels.append(product.build(x, weight, add=True, **sizes))
        kernels.append(product.build(x, weight, x, cc=cc, bias=True, activation="silu", gated=True))
        kernels.append(product.build(x, weight, experts="slots", cc=cc))
    return kernels


def complaints_of(number: int, cc) -> tuple[str, list[str]]:
    kernel = fast_kernels(cc)[number]
    return kernel.entry, report(kernel, cc).complaints(wanted_features(kernel, cc))


@pytest.mark.slow
@architectures
def test_every_fast_variant_is_as_stated(cc):
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = dict(pool.map(partial(complaints_of, cc=cc), range(len(fast_kernels(cc)))))
    assert len(found) == len(fast_kernels(cc))
    assert not {entry: complaints for entry, complaints in found.items() if complaints}


def test_bfloat16_is_computed_in_float32_on_the_oldest_card():
    """sm_75 has neither loads nor products of bfloat16: its 16 bits are the upper half of a float32."""
    for kernel in (
        product_plain.build("bfloat16", "bfloat16", tokens=2),
        attention_plain.build(9, 3, 64, 16, None, "bfloat16", "bfloat16"),
    ):
        made = report(kernel, (7, 5))
        assert made.opcodes["FFMA"] and not made.opcodes["HMMA"] and not made.complaints()


def test_a_complaint_is_made():
    kernel = example("argmax").kernel
    worse = Kernel("argmax", kernel.body, kernel.signature, block=kernel.block, registers_at_most=8, blocks_per_sm=1)
    complaints = report(worse, (8, 0)).complaints(frozenset({"LDSM"}))
    assert [each.split()[0] for each in complaints] == ["uses", "has"]
    crowded = Kernel("argmax", kernel.body, kernel.signature, block=kernel.block, shared_bytes=48 << 10)
    assert report(crowded, (8, 0)).blocks_per_sm == 3
    assert MULTIPROCESSORS[8, 0].shared_bytes == 164 << 10
