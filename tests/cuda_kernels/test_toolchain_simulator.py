"""Kernels give in the simulator, as Python, what their PTX gives in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the simulator needs greenlet (pip install minipaged[test])")
for package in ("numba.cuda", "cuda.bindings.nvvm"):
    pytest.importorskip(package, reason=f"compiling CUDA kernels needs {package} (pip install minipaged[cuda])")

from numba import cuda  # noqa: E402

from cuda_kernels import intrinsics  # noqa: E402
from cuda_kernels.intrinsics import (  # noqa: E402
    cp_async16,
    cp_async_commit,
    cp_async_wait0,
    flat,
    ldmatrix_x4,
    mma_m16n8k16_f16,
)
from cuda_kernels.kernel import Kernel, float32, int32, pointer, uint16  # noqa: E402
from cuda_kernels.toolchain import simulator  # noqa: E402
from cuda_kernels.toolchain.examples import example  # noqa: E402
from cuda_kernels.toolchain.interpreter import run  # noqa: E402
from cuda_kernels.toolchain.simulator_intrinsics import TWINS  # noqa: E402


def test_every_intrinsic_has_a_twin():
    ours = {name for name, value in vars(intrinsics).items() if type(value).__name__ == "_Intrinsic"}
    assert ours == TWINS.keys()


def as_floats(array):
    return array.view(np.float16).astype(np.float64) if array.dtype == np.uint16 else array.astype(np.float64)


@pytest.mark.parametrize(
    "name",
    ["embedding", "rms_norm", "layer_norm", "rope_kv", "activation", "argmax", "moe_route", "moe_sort", "moe_combine"]
    + ["product_plain", "attention_plain", "attention_reduce", "process_logits"]
    + ["soft_cap", "row_gather", "copy_blocks", "logprobs"],
)
def test_readable_kernels_agree(name):
    subject = example(name)
    simulated, interpreted = subject.fresh(), subject.fresh()
    simulator.run(subject.kernel, subject.grid, simulated)
    run(subject.kernel, subject.grid, interpreted)
    for a, b in zip(simulated, interpreted, strict=True):
        if isinstance(a, np.ndarray):
            np.testing.assert_allclose(as_floats(a), as_floats(b), rtol=1e-5, atol=1e-6)


def make(body, *types):
    return Kernel(body.__name__, body, types, block=64)


def test_what_was_not_written_is_nan():
    def reads(y):
        tile = cuda.shared.array(64, float32)
        y[cuda.threadIdx.x] = tile[cuda.threadIdx.x]

    y = np.zeros(64, np.float32)
    simulator.run(make(reads, pointer(float32)), 1, [y])
    assert np.isnan(y).all()


def test_indices_stay_inside():
    def beyond(y, shift):
        y[cuda.threadIdx.x + shift] = float32(1)

    kernel = make(beyond, pointer(float32), int32)
    simulator.run(kernel, 1, [np.zeros(64, np.float32), 0])
    for shift, index in ((1, 64), (-1, -1)):
        with pytest.raises(IndexError, match=f"element {index} of y, which has 64"):
            simulator.run(kernel, 1, [np.zeros(64, np.float32), shift])


def test_threads_that_nobody_frees():
    def half_waits(y):
        if cuda.threadIdx.x < 40:
            cuda.syncthreads()
        else:
            cuda.shfl_sync(0xFFFFFFFF, 1, 0)

    with pytest.raises(simulator.Deadlock, match="threads wait at"):
        simulator.run(make(half_waits, pointer(float32)), 1, [np.zeros(1, np.float32)])


def test_a_copy_arrives_at_its_wait():
    def build(waits):
        def copies(x, y):
            tile = flat(cuda.shared.array(512, uint16, alignment=16))
            thread = cuda.threadIdx.x
            cp_async16(tile, 8 * thread, x, 8 * thread)
            cp_async_commit()
            if waits:
                cp_async_wait0()
            y[thread] = tile[8 * thread + 3]

        return make(copies, pointer(uint16), pointer(uint16))

    x, y = np.arange(512, dtype=np.uint16), np.zeros(64, np.uint16)
    simulator.run(build(True), 1, [x, y])
    np.testing.assert_array_equal(y, x[3::8])
    simulator.run(build(False), 1, [x, y])
    assert (y == 0xFFFF).all()


def test_tensor_cores_agree_with_the_interpreter():
    def multiplies(x, y):
        tile = flat(cuda.shared.array(256, uint16, alignment=16))
        lane = cuda.threadIdx.x
        if lane < 32:
            for i in range(8):
                tile[8 * lane + i] = x[8 * lane + i]
            cuda.syncwarp()
            a0, a1, a2, a3 = ldmatrix_x4(tile, (lane & 15) * 16 + (lane >> 4) * 8)
            d0, d1, d2, d3 = mma_m16n8k16_f16(a0, a1, a2, a3, a0, a1, float32(1), float32(2), float32(3), float32(4))
            y[4 * lane], y[4 * lane + 1], y[4 * lane + 2], y[4 * lane + 3] = d0, d1, d2, d3

    kernel = make(multiplies, pointer(uint16), pointer(float32))
    x = np.random.default_rng(2).integers(-3, 4, 256).astype(np.float16).view(np.uint16)
    simulated, interpreted = np.zeros(128, np.float32), np.zeros(128, np.float32)
    simulator.run(kernel, 1, [x, simulated])
    run(kernel, 1, [x, interpreted])
    np.testing.assert_array_equal(simulated, interpreted)
    assert simulated.any()
