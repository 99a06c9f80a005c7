"""Products at every level: forced down for real, and AVX-512 compiled, read, and emulated."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir

from minipaged.ops.cpu import compile_cache, features, products_float, products_groups, products_int4, products_int8
from minipaged.ops.cpu.emit import I64, Emitter
from minipaged.ops.cpu.packing import pack
from minipaged.ops.cpu.products import FORMATS, product_kernel
from minipaged.ops.cpu.tiles import Tile
from tests.support.cpu_products import expected, run_product

CHECK = """
import sys
import numpy as np
from minipaged.ops.cpu import features
from minipaged.ops.cpu.packing import pack
from minipaged.ops.cpu.products import product_kernel
from tests.support.cpu_products import expected, run_product

rng = np.random.default_rng(0)
weight, x = rng.standard_normal((100, 71), np.float32), rng.standard_normal((13, 71), np.float32)
for format in sys.argv[1:]:
    packed, kernel = pack(format, weight), product_kernel(format)
    out = run_product(kernel, packed, x)
    assert np.abs(out[:, :100] - expected(packed, x)).max() < 1e-3, format
    for row in range(13):
        assert np.array_equal(out[row : row + 1], run_product(kernel, packed, x[row : row + 1])), format
print(features.current().level)
"""


def run_check(tmp_path, formats=FORMATS, **environment):
    environment = {**os.environ, "MINIPAGED_HOME": str(tmp_path), **environment}
    return subprocess.run([sys.executable, "-c", CHECK, *formats], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("level", [level for level in ("generic", "avx2") if level != features.current().level])
def test_forced_down(level, tmp_path):
    if not features.REQUIRED_FEATURES[level] <= features.host_features():
        pytest.skip(f"this CPU has no {level}")
    result = run_check(tmp_path, MINIPAGED_CPU_LEVEL=level)
    assert result.stdout == f"{level}\n", result.stderr


def test_a_plain_target_of_numba_is_obeyed(tmp_path):
    """Compiling for a CPU without AVX2 must not meet an AVX2 instruction: LLVM would abort the process."""
    result = run_check(tmp_path, ["float32", "int8"], NUMBA_CPU_NAME="generic", MINIPAGED_CPU_LEVEL="")
    assert result.stdout == "generic\n", result.stderr


def test_forcing_up_is_refused(tmp_path):
    if features.best_level(features.host_features()) == features.LEVELS[-1]:
        pytest.skip("this CPU has the highest level")
    result = run_check(tmp_path, MINIPAGED_CPU_LEVEL=features.LEVELS[-1])
    assert result.returncode == 1 and "lacks; the highest level here is" in result.stderr


# ---- AVX-512, which the machine that runs the tests may not have


def emits_groups(module):
    return lambda e, tile: products_groups.emit_groups(module.FORMAT, module.add_group_vnni, "bytes", e, tile)


KERNELS = {  # emitted tile, tallest height, the instruction it is about
    "float32": (products_float.emit_float32, products_float.tile_shapes, "vfmadd231ps"),
    "bfloat16": (products_float.emit_bfloat16_dot, products_float.tile_shapes, "vdpbf16ps"),
    "int8": (emits_groups(products_int8), products_int8.tile_shapes, "vpdpbusd"),
    "int4": (emits_groups(products_int4), products_int4.tile_shapes, "vpdpbusd"),
}


def assembly(emit, isa, height, width, cpu):
    """The tile as a function of its own, compiled for ``cpu``."""
    module = ir.Module()
    module.triple = "x86_64-unknown-linux-gnu"
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 10), "tile")
    builder = ir.IRBuilder(function.append_basic_block())
    emit(Emitter(builder, isa), Tile(height, width, *function.args))
    builder.ret_void()
    try:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        target = llvm.Target.from_triple(module.triple)
    except RuntimeError as error:
        pytest.skip(f"this LLVM does not compile for x86: {error}")
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    machine = target.create_target_machine(cpu=cpu, opt=3)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    llvm.create_pass_builder(machine, options).getModulePassManager().run(
        parsed, llvm.create_pass_builder(machine, options)
    )
    return machine.emit_assembly(parsed)


@pytest.mark.parametrize("cpu", ["znver4", "sapphirerapids"])
@pytest.mark.parametrize("format", FORMATS)
def test_avx512_tiles_are_what_they_should_be(format, cpu):
    """The tallest tile: the right instruction on whole 512-bit registers, and no accumulator spilled."""
    emit, tile_shapes, instruction = KERNELS[format]
    isa = features.instruction_set("avx512bf16")
    shapes = tile_shapes(isa)
    height = max(shapes)
    text = assembly(emit, isa, height, shapes[height], cpu)
    lines = text.splitlines()
    dots = [i for i, line in enumerate(lines) if re.match(rf"\s+{instruction}\s.*%zmm\d+$", line)]
    steps = 2 * products_int4.FORMAT.layout.words if format == "int4" else 1
    assert len(dots) >= height * shapes[height] * steps, text
    inner_loop = "\n".join(lines[dots[0] : dots[-1]])
    assert not re.search(r"zmm.*\(%rsp\)|\(%rsp\).*zmm", inner_loop), f"an accumulator lives in memory:\n{inner_loop}"


class EmulatingEmitter(Emitter):
    """AVX-512's dot products in plain operations, which LLVM splits into the vectors there are."""

    def _bytes(self, value, j, signed):
        b, shift = self.builder, self.constant(self.i32, 24)
        left = b.shl(self.bitcast(value, self.i32), self.constant(self.i32, 24 - 8 * j))
        return b.ashr(left, shift) if signed else b.lshr(left, shift)

    def dot_accumulate_u8_i8(self, total, unsigned, signed):
        for j in range(4):
            product = self.builder.mul(self._bytes(unsigned, j, False), self._bytes(signed, j, True))
            total = self.builder.add(total, product)
        return total

    def dot_accumulate_bf16(self, total, a, b):
        sixteen, upper = self.constant(self.i32, 16), self.constant(self.i32, -65536)
        for half in (lambda v: self.builder.and_(v, upper), lambda v: self.builder.shl(v, sixteen)):
            total = self.fma(self.bitcast(half(a), self.f32), self.bitcast(half(b), self.f32), total)
        return total


@pytest.mark.parametrize("format", FORMATS)
def test_avx512_products_emulated(format, monkeypatch):
    """Layouts, bias, padding and tile shapes of the AVX-512 kernels, with their two instructions replaced."""
    isa = features.instruction_set("avx512bf16")
    if not features.REQUIRED_FEATURES["avx2"] <= features.host_features():
        pytest.skip("the emulation needs fused multiply-adds")
    monkeypatch.setattr(features, "current", lambda: isa)
    monkeypatch.setattr("minipaged.ops.cpu.emit.Emitter", EmulatingEmitter)
    monkeypatch.setattr(compile_cache, "keep", lambda function, name: None)
    kernel = product_kernel.__wrapped__(format)
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((100, 75), np.float32), rng.standard_normal((19, 75), np.float32)
    packed = pack(format, weight)
    out = run_product(kernel, packed, x)
    assert np.abs(out[:, :100] - expected(packed, x, rounds_x_to_bfloat16=True)).max() < 1e-4
    for M in (1, 2, 5, 8):
        assert np.array_equal(run_product(kernel, packed, x[:M]), out[:M])
