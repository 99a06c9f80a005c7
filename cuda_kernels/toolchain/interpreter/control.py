"""Who runs next: branches, exits, barriers, and the warp operations that lanes wait for."""

from __future__ import annotations

import numpy as np

from cuda_kernels.toolchain.interpreter import warp_operations
from cuda_kernels.toolchain.interpreter.faults import KernelFault
from cuda_kernels.toolchain.interpreter.program import Instruction, PTXError

WARP = 32
RUNS, AT_BARRIER, AT_WARP_OPERATION = 0, 1, 2


def binder(instruction: Instruction):
    """What binds an instruction after which other threads may go on; ``None`` for the others."""
    opcode = instruction.opcode
    if opcode in ("bar", "barrier") and not instruction.has("warp"):
        return bind_barrier
    return bind_warp_operation if opcode in warp_operations.OPERATIONS else _BINDERS.get(opcode)


def bind_branch(machine, instruction: Instruction):
    target, following = machine.program.labels[instruction.operands[0]], instruction.index + 1
    taken = machine.guard(instruction)

    def branch(mask):
        np.copyto(machine.place, following, where=mask)
        np.copyto(machine.place, target, where=taken(mask))

    return branch


def bind_exit(machine, instruction: Instruction):
    taken = machine.guard(instruction)

    def leave(mask):
        leaving = taken(mask)
        np.copyto(machine.place, instruction.index + 1, where=mask)
        machine.done |= leaving

    return leave


def bind_trap(machine, instruction: Instruction):
    taken = machine.guard(instruction)

    def trap(mask):
        threads = taken(mask)
        if threads.any():
            raise KernelFault("trap", f"{machine.who(np.flatnonzero(threads)[0])} executed it")
        np.copyto(machine.place, instruction.index + 1, where=mask)

    return trap


def bind_barrier(machine, instruction: Instruction):
    wanted = ("0",) if instruction.has("red") is False else None
    if wanted and instruction.operands != wanted:
        raise PTXError(f"only barrier 0 for all threads is understood, not: {instruction.text}")
    taken = machine.guard(instruction)

    def arrive(mask):
        np.copyto(machine.place, instruction.index, where=mask)
        arriving = taken(mask)
        machine.state[arriving] = AT_BARRIER
        np.copyto(machine.place, instruction.index + 1, where=machine.all_of(mask) & ~arriving)
        release_blocks(machine)

    return arrive


def release_blocks(machine) -> bool:
    """Lets go those blocks whose threads all wait at one barrier or have ended."""
    waiting = (machine.state == AT_BARRIER).reshape(machine.num_blocks, machine.padded)
    ended = machine.done.reshape(machine.num_blocks, machine.padded)
    complete = (waiting | ended).all(1) & waiting.any(1)
    if not complete.any():
        return False
    places = machine.place.reshape(machine.num_blocks, machine.padded)
    lowest = places.min(1, where=waiting, initial=machine.num_instructions)
    highest = places.max(1, where=waiting, initial=-1)
    if (complete & (lowest != highest)).any():
        block = int(np.flatnonzero(complete & (lowest != highest))[0])
        texts = [machine.program.instructions[place].text for place in (lowest[block], highest[block])]
        number = machine.block_name(block * machine.padded)
        raise KernelFault(
            "divergent barrier",
            f"threads of block {number} wait at different barriers: {texts[0]} (instruction {lowest[block]}) and "
            f"{texts[1]} (instruction {highest[block]})",
        )
    released = (waiting & complete[:, None]).reshape(-1)
    for place in set(lowest[complete].tolist()):
        instruction = machine.program.instructions[place]
        if instruction.has("red"):
            warp_operations.reduce_over_block(machine, instruction, released & (machine.place == place))
    machine.state[released] = RUNS
    machine.place[released] += 1
    machine.clock.block_time[np.repeat(complete, machine.padded)] += 1
    return True


def bind_warp_operation(machine, instruction: Instruction):
    execute = warp_operations.OPERATIONS[instruction.opcode](machine, instruction)
    taken = machine.guard(instruction)

    def arrive(mask):
        arriving = taken(mask)
        np.copyto(machine.place, instruction.index + 1, where=mask)
        lanes = arriving.reshape(-1, WARP)
        together = ((lanes | machine.done.reshape(-1, WARP)).all(1) | ~lanes.any(1)).all()
        if together:
            if arriving.any():
                execute(True if arriving.all() else arriving)
        else:
            machine.place[arriving] = instruction.index
            machine.state[arriving] = AT_WARP_OPERATION

    machine.warp_operations[instruction.index] = execute
    return arrive


def release_warps(machine) -> bool:
    """Carries out warp operations that all the lanes they name have reached."""
    released = False
    waiting = machine.state == AT_WARP_OPERATION
    for place in set(machine.place[waiting].tolist()):
        here = waiting & (machine.place == place)
        instruction = machine.program.instructions[place]
        present = _as_bits(here | machine.done)
        named = warp_operations.member_mask(machine, instruction).astype(np.uint64)
        satisfied = ~here | (named & ~present == 0)
        ready = here & np.repeat(satisfied.reshape(-1, WARP).all(1), WARP)
        if ready.any():
            machine.warp_operations[place](ready)
            machine.state[ready] = RUNS
            machine.place[ready] = place + 1
            released = True
    return released


def _as_bits(lanes: np.ndarray) -> np.ndarray:
    """For every thread, its warp's ``lanes`` as a mask of 32 bits (uint64 [num_threads])."""
    bits = (lanes.reshape(-1, WARP).astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1, dtype=np.uint64)
    return np.repeat(bits, WARP)


_BINDERS = {"bra": bind_branch, "ret": bind_exit, "exit": bind_exit, "trap": bind_trap}
