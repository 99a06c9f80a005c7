"""What the 32 lanes of a warp do together: exchanges, votes, ``ldmatrix`` and tensor-core products."""

from __future__ import annotations

import numpy as np

from cuda_kernels.toolchain.interpreter.conversions import from_bfloat16
from cuda_kernels.toolchain.interpreter.faults import KernelFault
from cuda_kernels.toolchain.interpreter.memory_access import Accessor
from cuda_kernels.toolchain.interpreter.program import Instruction, PTXError

WARP = 32
_EVERYONE = 0xFFFFFFFF
_MEMBER_MASK = {"shfl": -1, "vote": -1, "match": -1, "redux": -1, "bar": 0}  # which operand it is


def member_mask(machine, instruction: Instruction) -> np.ndarray:
    """The lanes that an instruction names, as 32 bits for every thread."""
    operand = _MEMBER_MASK.get(instruction.opcode)
    if operand is None:
        named = 0 if instruction.opcode == "activemask" else _EVERYONE
        return np.full(machine.num_threads, named, np.uint32)
    return machine.broadcast(instruction.operands[operand], "u32")


def _fault(machine, instruction: Instruction, lane, text: str) -> KernelFault:
    return KernelFault("warp operation", f"{machine.who(int(lane))} {text}: {instruction.text}")


def _ballot(machine, lanes: np.ndarray) -> np.ndarray:
    """Each warp's ``lanes`` as 32 bits, for each of its threads: uint32 [num_threads]."""
    bits = np.packbits(lanes.reshape(-1, WARP), axis=1, bitorder="little").view("<u4")
    return np.repeat(bits[:, 0], WARP)


def bind_warp_barrier(machine, instruction: Instruction):
    def meet(mask):
        warps = machine.all_of(mask).reshape(-1, WARP).any(1)
        machine.clock.warp_time[np.repeat(warps, WARP)] += 1

    return meet


def bind_shuffle(machine, instruction: Instruction):
    mode = instruction.modifiers[1]
    names = [name.strip() for name in instruction.operands[0].split("|")]
    target = machine.destination(names[0], "u32")
    inside = machine.destination(names[1], "pred") if len(names) > 1 else None
    value, by, clamp = (machine.broadcast(operand, "u32") for operand in instruction.operands[1:4])
    members = member_mask(machine, instruction)
    lane, base = machine.lane, np.arange(machine.num_threads) - machine.lane

    def shuffle(mask):
        distance = (by & 31).astype(np.int64)
        limit, segment = (clamp & 31).astype(np.int64), (clamp >> np.uint32(8) & 31).astype(np.int64)
        lowest, highest = lane & segment, lane & segment | limit & ~segment
        if mode == "up":
            source, reachable = lane - distance, lane - distance >= highest
        elif mode == "idx":
            source = lowest | distance & ~segment
            reachable = source <= highest
        else:
            source = lane + distance if mode == "down" else lane ^ distance
            reachable = source <= highest
        source = np.where(reachable, source, lane)
        takes_part = machine.all_of(mask)
        named = members >> source.astype(np.uint32) & 1 != 0
        missing = takes_part & ~(takes_part[base + source] & named)
        if missing.any():
            at = np.flatnonzero(missing)[0]
            raise _fault(machine, instruction, at, f"reads lane {source[at]}, which does not take part")
        np.copyto(target, value[base + source], where=mask)
        if inside is not None:
            np.copyto(inside, reachable, where=mask)

    return shuffle


def bind_vote(machine, instruction: Instruction):
    mode = instruction.modifiers[1]
    target = machine.destination(instruction.operands[0], "u32" if mode == "ballot" else "pred")
    condition = machine.predicate(instruction.operands[1])
    members = member_mask(machine, instruction)

    def vote(mask):
        ballot = _ballot(machine, condition() & machine.all_of(mask)) & members
        if mode == "ballot":
            result = ballot
        elif mode == "uni":
            result = (ballot == 0) | (ballot == members)
        else:
            result = ballot == members if mode == "all" else ballot != 0
        np.copyto(target, result, where=mask)

    return vote


def bind_active_mask(machine, instruction: Instruction):
    target = machine.destination(instruction.operands[0], "u32")
    return lambda mask: np.copyto(target, _ballot(machine, machine.all_of(mask)), where=mask)


def bind_match(machine, instruction: Instruction):
    if instruction.modifiers[0] != "any":
        raise PTXError(f"the interpreter does not know: {instruction.text}")
    target = machine.destination(instruction.operands[0], "u32")
    value = machine.broadcast(instruction.operands[1], instruction.type)
    members = member_mask(machine, instruction)

    def match(mask):
        takes_part = machine.all_of(mask).reshape(-1, WARP)
        values = value.reshape(-1, WARP)
        equal = (values[:, :, None] == values[:, None, :]) & takes_part[:, None, :]
        bits = np.packbits(equal.reshape(-1, WARP), axis=1, bitorder="little").view("<u4")[:, 0]
        np.copyto(target, bits & members, where=mask)

    return match


_REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum}
_REDUCTIONS |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def bind_warp_reduction(machine, instruction: Instruction):
    """``redux.sync``, over the lanes that arrived together."""
    operation = next(_REDUCTIONS[m] for m in instruction.modifiers if m in _REDUCTIONS)
    target = machine.destination(instruction.operands[0], instruction.type)
    value = machine.broadcast(instruction.operands[1], instruction.type)

    def reduce(mask):
        takes_part = machine.all_of(mask).reshape(-1, WARP)
        rows = value.reshape(-1, WARP)
        result = np.zeros(rows.shape, rows.dtype)
        for warp in np.flatnonzero(takes_part.any(1)):
            result[warp] = operation.reduce(rows[warp, takes_part[warp]])
        np.copyto(target, result.reshape(-1), where=mask)

    return reduce


def reduce_over_block(machine, instruction: Instruction, released: np.ndarray) -> None:
    """``bar.red``: counts or combines a predicate over the threads of each block that passes the barrier."""
    mode = "popc" if instruction.has("popc") else "and" if instruction.has("and") else "or"
    given = machine.predicate(instruction.operands[-1])() & released
    count = given.reshape(machine.num_blocks, machine.padded).sum(1)
    everyone = released.reshape(machine.num_blocks, machine.padded).sum(1)
    result = {"popc": count, "and": count == everyone, "or": count > 0}[mode]
    target = machine.destination(instruction.operands[0], instruction.type)
    np.copyto(target, np.repeat(result, machine.padded), where=released, casting="unsafe")


# Tensor cores


def _registers(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{}").split(",")]


def bind_load_matrix(machine, instruction: Instruction):
    """``ldmatrix``: lane 8m + r has the address of row r (16 bytes) of matrix m; see ``intrinsics.ldmatrix_x4``."""
    count = next(int(m[1:]) for m in instruction.modifiers if m in ("x1", "x2", "x4"))
    transposed = instruction.has("trans")
    targets = [machine.destination(name, "u32") for name in _registers(instruction.operands[0])]
    address = machine.address(instruction.operands[1])
    accessor = Accessor(machine, instruction, "shared", 16, writes=False)
    names_a_row = machine.lane < 8 * count
    row = np.zeros(machine.num_threads, np.int64)  # where each lane's row begins in the machine's shared memory
    base = np.arange(machine.num_threads) - machine.lane
    group, pair = machine.lane >> 2, machine.lane & 3

    def load(mask):
        lanes = np.flatnonzero(machine.all_of(mask) & names_a_row)
        (access,) = accessor.accesses(lanes, address()[lanes])
        row[access.lanes] = access.offsets
        halves = machine.shared.data.view(np.uint16)
        for number, target in enumerate(targets):
            if transposed:
                low, high = (row[base + 8 * number + 2 * pair + e] // 2 + group for e in (0, 1))
            else:
                low = row[base + 8 * number + group] // 2 + 2 * pair
                high = low + 1
            word = halves[low] | halves[high].astype(np.uint32) << np.uint32(16)
            np.copyto(target, word, where=mask)

    return load


def bind_tensor_product(machine, instruction: Instruction):
    """``mma.sync`` of shape m16n8k16 or m16n8k8 with float32 sums; see ``intrinsics.mma_m16n8k16_f16``.

    The products are exact and their sum is taken in float64, then rounded: a card rounds (or cuts) more often.
    """
    shape, (to, kind, kind_b, from_) = instruction.modifiers[2], instruction.modifiers[-4:]
    if shape not in ("m16n8k16", "m16n8k8") or (to, from_) != ("f32", "f32") or kind != kind_b:
        raise PTXError(f"the interpreter does not know: {instruction.text}")
    if kind not in ("f16", "bf16"):
        raise PTXError(f"the interpreter does not know: {instruction.text}")
    depth = int(shape[6:])
    decode = from_bfloat16 if kind == "bf16" else lambda bits: bits.view(np.float16)
    targets = [machine.destination(name, "f32") for name in _registers(instruction.operands[0])]
    a_words, b_words = ([machine.broadcast(n, "u32") for n in _registers(instruction.operands[i])] for i in (1, 2))
    c_words = [machine.broadcast(name, "f32") for name in _registers(instruction.operands[3])]
    warps = machine.num_threads // WARP
    a, b = np.zeros((warps, 16, depth)), np.zeros((warps, depth, 8))
    c = np.zeros((warps, 16, 8))
    lane = np.arange(WARP)
    group, pair = lane >> 2, 2 * (lane & 3)

    def pairs(words):
        return decode(np.ascontiguousarray(words).view(np.uint16)).reshape(warps, WARP, 2)

    def multiply(mask):
        if mask is not True and (mask.reshape(-1, WARP).any(1) & ~mask.reshape(-1, WARP).all(1)).any():
            raise _fault(machine, instruction, np.flatnonzero(mask)[0], "multiplies without its whole warp")
        for number, words in enumerate(a_words):
            values = pairs(words)
            for e in (0, 1):
                a[:, group + 8 * (number & 1), pair + e + 8 * (number >> 1)] = values[:, :, e]
        for number, words in enumerate(b_words):
            values = pairs(words)
            for e in (0, 1):
                b[:, pair + e + 8 * number, group] = values[:, :, e]
        for number, words in enumerate(c_words):
            c[:, group + 8 * (number >> 1), pair + (number & 1)] = words.reshape(warps, WARP)
        product = np.matmul(a, b) + c
        for number, target in enumerate(targets):
            values = product[:, group + 8 * (number >> 1), pair + (number & 1)]
            np.copyto(target, values.reshape(-1), where=mask, casting="same_kind")

    return multiply


OPERATIONS = {
    "bar": bind_warp_barrier,
    "shfl": bind_shuffle,
    "vote": bind_vote,
    "match": bind_match,
    "redux": bind_warp_reduction,
    "activemask": bind_active_mask,
    "ldmatrix": bind_load_matrix,
    "mma": bind_tensor_product,
}
