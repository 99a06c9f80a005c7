"""A token's K and V on their way into the cache: finished, rounded, and put where attention reads them.

The layout is in :mod:`~minipaged.ops.cpu.kv`. Neighbours of a row lie apart in a block, because those of the
same word are neighbours in time: so 16 values are rounded at once and stored word by word.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from llvmlite import ir
from numba.core.ccallback import CFunc

from .compile_cache import c_function
from .elementwise import add, for_values, norm, rope
from .emit import F32, I8, I16, I32, Emitter, kernel, vector
from .kv import ITEM_BYTES, TERMS, TOKENS
from .memory import ints32, ints64, part_of_caller
from .phases import PHASE_SIGNATURE, layer_at, linear_at, model_at
from .quantize import rounded, row_scale, to_bfloat16

ITEMS = {"float32": F32, "bfloat16": I16, "int8": I8}
Rounding = Callable[[ir.Value], ir.Value]


def _rounding(e: Emitter, dtype: str, is_key: bool, x, count, scale_at) -> Rounding:
    """What turns float32 lanes of the row ``x`` into those of the cache; int8 stores the row's scale first."""
    if dtype == "float32":
        return lambda values: values
    if dtype == "bfloat16":
        return lambda values: to_bfloat16(e, values)
    scale, inverse = row_scale(e, x, count)
    e.store(scale, scale_at)

    def quantise(values: ir.Value) -> ir.Value:
        bytes_ = vector(I8, values.type.count)
        q = e.builder.trunc(rounded(e, values, inverse), bytes_)
        return e.builder.xor(q, e.constant(bytes_, -128)) if is_key else q  # q + 128

    return quantise


def _row_writer(dtype: str, is_key: bool):
    """``write(x, count, padded, target, stride, scale_at)``: round a row and store its words ``stride`` bytes apart.

    A word is one value of V, or the values of K that one instruction multiplies. Zeros follow up to ``padded``.
    """
    item, together = ITEMS[dtype], TERMS[dtype] if is_key else 1

    @kernel(6)
    def write(e, x, count, padded, target, stride, scale_at):
        b = e.builder
        round_ = _rounding(e, dtype, is_key, x, count, scale_at)

        def store_one(i, value):
            inside = e.mul(b.and_(i, e.const(together - 1)), ITEM_BYTES[dtype])
            e.store(value, e.add(e.add(target, e.mul(e.div(i, together), stride)), inside))

        def body(offset, type_):
            values, first = round_(e.load(e.add(x, offset), type_)), e.div(offset, 4)
            if type_.count == 1:
                store_one(first, b.extract_element(values, ir.Constant(I32, 0)))
                return
            place = e.add(target, e.mul(e.div(first, together), stride))
            words = values
            if together > 1:
                words = b.bitcast(values, vector(I32, type_.count // together))
            for word in range(type_.count // together):
                e.store(b.extract_element(words, ir.Constant(I32, word)), place)
                place = e.add(place, stride)

        for_values(e, count, body)
        e.repeat(b.sub(padded, count), lambda i: store_one(e.add(count, i), ir.Constant(item, 0)))

    return write


@part_of_caller
def _finish_heads(model, layer, linear, row):
    """Biases, norms and rope of one token's q, k and v."""
    qkv = model.qkv + row * model.qkv_stride
    if linear.bias:
        add(qkv, linear.bias, linear.num_outputs)
    rotation = 4 * ints32(model.positions, row + 1)[row] * layer.rotary_half
    dim = model.head_dim
    for head in range(model.num_heads + model.num_kv_heads):
        x = qkv + 4 * head * dim
        if model.qk_norm:
            is_query = head < model.num_heads
            weight = layer.q_norm if is_query else layer.k_norm
            norm(model, x, weight, layer.q_norm_bias if is_query else layer.k_norm_bias, x, dim)
        if layer.rotary_half:
            rope(x, layer.cos + rotation, layer.sin + rotation, layer.rotary_half)


@cache
def write_phase(dtype: str) -> CFunc:
    """The phase that finishes q, k and v of row ``index`` (bias, norms, rope) and stores k and v."""
    item_bytes, terms = ITEM_BYTES[dtype], TERMS[dtype]
    write_key, write_value = _row_writer(dtype, is_key=True), _row_writer(dtype, is_key=False)

    @c_function(PHASE_SIGNATURE, f"write-{dtype}")
    def finish_and_write(model_address, layer_address, linears, row, thread, num_threads):
        model, layer = model_at(model_address), layer_at(layer_address)
        _finish_heads(model, layer, linear_at(linears, layer.qkv), row)
        dim, size, padded_dim = model.head_dim, model.block_size, model.padded_dim
        whole_dim = (dim + terms - 1) // terms * terms
        slot = ints64(model.slot_mapping, row + 1)[row]
        offset = slot % size
        width, together = min(size, TOKENS), min(size, terms)  # keys, and values of V, that lie side by side
        first_of_k = offset // width * width * whole_dim + offset % width * terms
        first_of_v = offset // together * together * padded_dim + offset % together
        keys = layer.cache + slot // size * model.block_bytes
        values = keys + model.num_kv_heads * model.k_bytes
        k = model.qkv + row * model.qkv_stride + 4 * model.num_heads * dim
        for head in range(model.num_kv_heads):
            target = keys + head * model.k_bytes
            scale = target + size * whole_dim * item_bytes + 4 * offset
            write_key(
                k + 4 * head * dim, dim, whole_dim, target + first_of_k * item_bytes,
                width * terms * item_bytes, scale,
            )  # fmt: skip
            target = values + head * model.v_bytes
            scale = target + size * padded_dim * item_bytes + 4 * offset
            write_value(
                k + 4 * (model.num_kv_heads + head) * dim, dim, padded_dim, target + first_of_v * item_bytes,
                together * item_bytes, scale,
            )  # fmt: skip

    return finish_and_write
