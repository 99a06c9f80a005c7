"""The drawing of a kernel's accesses says what the interpreter's counters say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

for package in ("numba.cuda", "cuda.bindings.nvvm"):
    pytest.importorskip(package, reason=f"compiling CUDA kernels needs {package} (pip install minipaged[cuda])")

from numba import cuda  # noqa: E402

from cuda_kernels.kernel import Kernel, float32, int32, pointer  # noqa: E402
from cuda_kernels.toolchain.accesses import record_accesses  # noqa: E402
from cuda_kernels.toolchain.interpreter import run  # noqa: E402
from minipaged.errors import InvalidParameterError  # noqa: E402
from minipaged.view import draw_threads  # noqa: E402


def strided(stride):
    def scale(x, y, count):
        i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if i < count:
            y[i] = x[i * stride] * float32(2)

    return Kernel("scale", scale, (pointer(float32), pointer(float32), int32), {"stride": stride}, block=64)


def arguments(count=128):
    return np.ones(128 * 33, np.float32), np.zeros(128, np.float32), count


@pytest.mark.parametrize("stride", [1, 2, 3, 17, 33])
def test_accesses_are_those_that_are_counted(stride):
    kernel = strided(stride)
    counters = run(kernel, 2, arguments())
    accesses = [each for block in (0, 1) for each in record_accesses(kernel, 2, arguments(), block=block)]
    loads = [each for each in accesses if not each.writes]
    assert [each.memory for each in loads] == ["x", "x"]
    assert sum(each.sectors for each in loads) == counters.load.sectors
    assert sum(each.num_bytes * len(each.threads) for each in loads) == counters.load.bytes
    assert loads[1].offsets == tuple(4 * stride * (64 + thread) for thread in range(64))
    assert loads[1].of_warp(1).threads == tuple(range(32, 64))


def test_the_drawing_names_threads_and_sectors():
    load, store = record_accesses(strided(3), 1, arguments(40))
    picture = draw_threads([load, store], "Every third")
    root = ElementTree.fromstring(str(picture))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "32 threads read 4 bytes each of x: 128 bytes asked for, 12 sectors = 384 bytes moved." in texts
    assert [text for text in texts if re.fullmatch(r"\d+", text)] == 2 * [str(thread) for thread in range(32)]
    assert "8 threads write" in str(draw_threads(store, warp=1))
    assert str(draw_threads([load, store], "Every third")) == str(picture)


def test_shared_memory_and_broadcasts():
    def transpose(x):
        tile = cuda.shared.array(1024, float32)
        i = cuda.threadIdx.x
        tile[32 * i] = x[0]
        cuda.syncthreads()
        x[i] = tile[32 * (31 - i)]

    accesses = record_accesses(
        Kernel("transpose", transpose, (pointer(float32),), block=32), 1, (np.ones(32, np.float32),)
    )
    shared = [each for each in accesses if each.is_shared]
    assert [each.wavefronts for each in shared] == [(32, 1), (32, 1)]
    text = str(draw_threads(accesses))
    assert "32 wavefronts, 1 without bank conflicts" in text and "bank" in text
    assert "×32" in text or "thread 0 reads" in text  # one word for all: a broadcast, or one thread's load


def test_nothing_to_draw():
    accesses = record_accesses(strided(1), 1, arguments(3))
    with pytest.raises(InvalidParameterError, match="warp 1 does nothing in the 2 accesses given"):
        draw_threads(accesses, warp=1)
    with pytest.raises(InvalidParameterError, match="a int is no access"):
        draw_threads([3])
    with pytest.raises(InvalidParameterError, match="a NoneType is no access"):
        draw_threads(None)
