"""Instructions that move, count and choose bits: shifts, fields, permutations, ``lop3``.

Binders as in :mod:`~cuda_kernels.toolchain.interpreter.arithmetic`.
"""

from __future__ import annotations

import numpy as np

from cuda_kernels.toolchain.interpreter.arithmetic import assign
from cuda_kernels.toolchain.interpreter.program import Instruction, PTXError


def bind_shift(machine, instruction: Instruction):
    """Shifts by the type's width or more give zeros or, of a signed number to the right, its sign."""
    (a,) = machine.sources(instruction, 1)
    count = machine.source(instruction.operands[2], "u32")
    width = 8 * a.dtype.itemsize
    left = instruction.opcode == "shl"

    def shift():
        limited = np.minimum(count, width - 1).astype(a.dtype)
        result = a << limited if left else a >> limited
        return result if not left and a.dtype.kind == "i" else np.where(count >= width, a.dtype.type(0), result)

    return assign(machine, instruction, shift)


def bind_funnel_shift(machine, instruction: Instruction):
    low, high, count = (machine.source(operand, "u32") for operand in instruction.operands[1:4])
    left, clamp = instruction.has("l"), instruction.has("clamp")

    def shift():
        both = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
        by = (np.minimum(count, 32) if clamp else count & 31).astype(np.uint64)
        return (both << by) >> np.uint64(32) if left else both >> by

    return assign(machine, instruction, shift)


def bind_bit_field_extract(machine, instruction: Instruction):
    (a,) = machine.sources(instruction, 1)
    position, length = (machine.source(operand, "u32") for operand in instruction.operands[2:4])

    def extract():
        start, size = (np.int64(x) if np.ndim(x) == 0 else x.astype(np.int64) for x in (position & 255, length & 255))
        signed = a.dtype.kind == "i"
        bits = a.astype(np.int64).view(np.uint64) if a.dtype.itemsize < 8 else a.view(np.uint64)
        ones = np.where(size >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(size, 63).astype(np.uint64)) - 1)
        ones = ones.astype(np.uint64)
        field = (bits >> np.minimum(start, 63).astype(np.uint64)) & ones
        if signed:
            sign = field >> np.maximum(size - 1, 0).astype(np.uint64) & np.uint64(1)
            field = np.where((sign == 1) & (size > 0), field | ~ones, field)
        return field.astype(a.dtype)

    return assign(machine, instruction, extract)


def bind_bit_field_insert(machine, instruction: Instruction):
    unsigned = instruction.type.replace("b", "u")
    field, into = (machine.source(operand, unsigned) for operand in instruction.operands[1:3])
    position, length = (machine.source(operand, "u32") for operand in instruction.operands[3:5])

    def insert():
        dtype = into.dtype.type
        size = np.minimum(length & 255, 8 * into.dtype.itemsize - 1).astype(into.dtype)
        start = (position & 255).astype(into.dtype)
        ones = ((dtype(1) << size) - dtype(1)) << start
        return (into & ~ones) | ((field << start) & ones)

    return assign(machine, instruction, insert)


def bind_byte_permute(machine, instruction: Instruction):
    """``prmt``: nibble k of the selector names byte k of the result; its top bit asks for the sign alone."""
    low, high, selector = (machine.source(operand, "u32") for operand in instruction.operands[1:4])
    if len(instruction.modifiers) > 1:
        raise PTXError(f"the interpreter does not know: {instruction.text}")

    def permute():
        both = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
        result = np.uint32(0)
        for number in range(4):
            nibble = (selector >> np.uint32(4 * number)) & np.uint32(15)
            byte = (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & 255
            sign = np.where(byte & 128, np.uint32(255), np.uint32(0))
            result = result | np.where(nibble & 8, sign, byte).astype(np.uint32) << np.uint32(8 * number)
        return result

    return assign(machine, instruction, permute)


def bind_lop3(machine, instruction: Instruction):
    """Any function of three bits: bit ``4a + 2b + c`` of the table is its value."""
    a, b, c = (machine.source(operand, "u32") for operand in instruction.operands[1:4])
    table = int(instruction.operands[4], 0)

    def look_up():
        result = np.uint32(0)
        for row in range(8):
            if table >> row & 1:
                result = result | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result

    return assign(machine, instruction, look_up)


def _bit_length(a) -> np.ndarray:
    """How many bits an unsigned integer needs."""
    length = np.zeros(np.shape(a), np.uint32)
    rest = np.array(a)
    for step in (32, 16, 8, 4, 2, 1):
        if step >= 8 * rest.dtype.itemsize:
            continue
        large = rest >> rest.dtype.type(step) != 0
        length += np.uint32(step) * large
        rest = np.where(large, rest >> rest.dtype.type(step), rest)
    return length + (rest != 0)


def bind_count_leading_zeros(machine, instruction: Instruction):
    (a,) = machine.sources(instruction, 1)
    return assign(machine, instruction, lambda: 8 * a.dtype.itemsize - _bit_length(a), "u32")


def bind_find_highest_bit(machine, instruction: Instruction):
    """``bfind``: of a negative number the highest zero; all ones where there is none."""
    (a,) = machine.sources(instruction, 1)
    unsigned = np.dtype(f"u{a.dtype.itemsize}")

    def find():
        bits = (np.where(a < 0, ~a, a) if a.dtype.kind == "i" else a).astype(unsigned)
        highest = _bit_length(bits).astype(np.int64) - 1
        if instruction.has("shiftamt"):
            highest = np.where(highest >= 0, 8 * a.dtype.itemsize - 1 - highest, -1)
        return highest.astype(np.uint32)

    return assign(machine, instruction, find, "u32")


def bind_count_bits(machine, instruction: Instruction):
    (a,) = machine.sources(instruction, 1)

    def count():
        as_bytes = np.ascontiguousarray(a).reshape(-1, 1).view(np.uint8)
        return np.unpackbits(as_bytes, axis=1).sum(1, dtype=np.uint32)

    return assign(machine, instruction, count, "u32")


def bind_reverse_bits(machine, instruction: Instruction):
    (a,) = machine.sources(instruction, 1)

    def reverse():
        as_bytes = np.ascontiguousarray(a).reshape(-1, 1).view(np.uint8)
        return np.packbits(np.unpackbits(as_bytes, axis=1)[:, ::-1], axis=1).view(a.dtype)[:, 0]

    return assign(machine, instruction, reverse)


BINDERS = {
    "shl": bind_shift,
    "shr": bind_shift,
    "shf": bind_funnel_shift,
    "bfe": bind_bit_field_extract,
    "bfi": bind_bit_field_insert,
    "prmt": bind_byte_permute,
    "lop3": bind_lop3,
    "popc": bind_count_bits,
    "clz": bind_count_leading_zeros,
    "bfind": bind_find_highest_bit,
    "brev": bind_reverse_bits,
}
