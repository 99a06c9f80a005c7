"""A team of threads that meets inside compiled code.

Each thread but the first is a Python thread that lives as long as the team, inside a compiled loop
without the GIL. To begin a step costs a memory write that waiting threads see; within a step they
meet at barriers of a few hundred nanoseconds, where Python's own locks would take tens of
microseconds. A thread that has waited long goes to sleep on a lock and costs nothing until it is woken.

Memory of a team, int64 words a cache line apart: a barrier (arrived, round) and one mailbox for each
thread. A mailbox holds the number of the step to run, or PARKED if its owner sleeps, or STOP.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from minipaged.errors import EngineClosedError

from . import features
from .compile_cache import keep
from .emit import I32, I64
from .memory import compiled
from .packing import aligned_zeros

LINE = 64  # bytes of a cache line
BARRIER_BYTES = 2 * LINE
PARKED, STOP = -1, -2
SPINS = 2000  # pauses before a waiting thread offers its core to others: about 50 microseconds
IDLE_SPINS = 20_000  # looks at an empty mailbox before a thread goes to sleep


def _pause(builder: ir.IRBuilder) -> None:
    """Tell the core that this is a waiting loop."""
    isa = features.current()
    if isa.has_x86:
        name, arguments = "llvm.x86.sse2.pause", []
    elif features.machine() == "aarch64":
        name, arguments = "llvm.aarch64.hint", [ir.Constant(I32, 1)]
    else:
        return
    signature = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(_declare(builder, name, signature), arguments)


def _offer_core(builder: ir.IRBuilder) -> None:
    name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
    builder.call(_declare(builder, name, ir.FunctionType(I32, [])), [])


def _declare(builder: ir.IRBuilder, name: str, signature: ir.FunctionType) -> ir.Function:
    known = builder.module.globals.get(name)
    return known if known is not None else ir.Function(builder.module, signature, name)


def _word(builder: ir.IRBuilder, address: ir.Value, offset: int = 0) -> ir.Value:
    return builder.inttoptr(builder.add(address, ir.Constant(I64, offset)), I64.as_pointer())


@intrinsic
def _load(typing_context, address):
    """The int64 at ``address``, with everything written before it was."""

    def codegen(context, builder, signature, arguments):
        return builder.load_atomic(_word(builder, arguments[0]), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _store(typing_context, address, value):
    """Write an int64, after everything written before."""

    def codegen(context, builder, signature, arguments):
        builder.store_atomic(arguments[1], _word(builder, arguments[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def fetch_add(typing_context, address, value):
    """Add to the int64 at ``address``, indivisibly; returns what it was."""

    def codegen(context, builder, signature, arguments):
        return builder.atomic_rmw("add", _word(builder, arguments[0]), arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _exchange(typing_context, address, value):
    """Write the int64 at ``address``, indivisibly; returns what it was."""

    def codegen(context, builder, signature, arguments):
        return builder.atomic_rmw("xchg", _word(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _replace(typing_context, address, expected, value):
    """Write ``value`` if ``expected`` is there, indivisibly; returns what was there."""

    def codegen(context, builder, signature, arguments):
        pair = builder.cmpxchg(_word(builder, arguments[0]), arguments[1], arguments[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 0)

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def _relax(typing_context, spins):
    """Pass the time of one look in a waiting loop: a pause; after many ``spins``, the core to others."""

    def codegen(context, builder, signature, arguments):
        patient = builder.icmp_signed("<", arguments[0], ir.Constant(I64, SPINS))
        with builder.if_else(patient) as (wait, give):
            with wait:
                _pause(builder)
            with give:
                _offer_core(builder)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@compiled
def barrier(address, num_threads):
    """Wait until all threads of the team are here; what each wrote before, all see after."""
    if num_threads == 1:
        return
    round_ = _load(address + LINE)
    if fetch_add(address, 1) == num_threads - 1:
        _store(address, 0)
        _store(address + LINE, round_ + 1)
        return
    spins = 0
    while _load(address + LINE) == round_:
        _relax(spins)
        spins += 1


@compiled
def wait_for_step(mailbox, seen):
    """The number of the next step; PARKED if none came for a while, and the thread shall sleep."""
    spins = 0
    while True:
        number = _load(mailbox)
        if number != seen and number != PARKED:
            return number
        spins += 1
        if spins == IDLE_SPINS and _replace(mailbox, seen, PARKED) == seen:
            return PARKED
        _relax(spins)


@cache
def _ring() -> Callable[[int, int], int]:
    """``ring(mailbox, number)``: put the number of a step, or STOP, into a mailbox; returns what was there."""
    function = njit(lambda mailbox, number: _exchange(mailbox, number))
    keep(function, "team-ring")
    function.compile("int64(int64, int64)")
    return function


class Team:
    """``num_threads`` threads, the caller's included, that run ``work(thread, num_threads, mailbox, seen)``.

    ``work`` is compiled code without the GIL that serves a thread until it shall sleep or stop: the
    caller's thread (0) runs one step and returns 0; another returns the number it last saw in its
    ``mailbox`` when :func:`wait_for_step` parks it, or STOP. ``state`` must hold the team's memory:
    :meth:`allocate` makes it. A team ends with :meth:`close`, or when it is garbage.
    """

    def __init__(self, num_threads: int):
        self.num_threads = num_threads
        self._memory = aligned_zeros((BARRIER_BYTES + num_threads * LINE,), np.dtype(np.uint8))
        self._process = os.getpid()
        self._step = 0
        self._locks = [threading.Lock() for _ in range(num_threads - 1)]
        self._threads: list[threading.Thread] = []
        self._finalizer: Callable[[], None] = lambda: None
        self._closed = False

    @property
    def barrier(self) -> int:
        """The address for :func:`barrier`."""
        return self._memory.ctypes.data

    def mailbox(self, thread: int) -> int:
        """The address of a thread's mailbox."""
        return self.barrier + BARRIER_BYTES + thread * LINE

    def start(self, work: Callable[[int, int, int, int], int]) -> None:
        """Start the threads; ``work`` must not refer to this object."""
        self._work = work
        for lock in self._locks:
            lock.acquire()
        for thread in range(1, self.num_threads):
            self._threads.append(
                threading.Thread(
                    target=_serve,
                    args=(work, thread, self.num_threads, self.mailbox(thread), self._locks[thread - 1], self._memory),
                    name=f"minipaged-cpu-{thread}",
                    daemon=True,
                )
            )
            self._threads[-1].start()
        mailboxes = [self.mailbox(thread) for thread in range(1, self.num_threads)]
        self._finalizer = weakref.finalize(
            self, _stop, _ring(), mailboxes, self._locks, self._threads, self._process, self._memory
        )

    def run(self) -> None:
        """One step on all threads. Raises :class:`EngineClosedError` in a fork, and after :meth:`close`."""
        if self._closed:
            raise EngineClosedError("the threads of this engine were ended by close().")
        if os.getpid() != self._process:
            raise EngineClosedError(
                f"this engine was made in process {self._process}, and this is process {os.getpid()}, a fork of it: "
                "its threads do not exist here. Make the engine after the fork, or start processes with 'spawn'."
            )
        self._step += 1
        ring = _ring()
        for thread in range(1, self.num_threads):
            if ring(self.mailbox(thread), self._step) == PARKED:
                self._locks[thread - 1].release()
        self._work(0, self.num_threads, self.mailbox(0), 0)

    def close(self) -> None:
        """End the threads; twice is harmless. Not while :meth:`run` runs."""
        self._closed = True
        self._finalizer()


def _serve(work, thread: int, num_threads: int, mailbox: int, lock: threading.Lock, memory: np.ndarray) -> None:
    """A thread's life: compiled code until it shall sleep, then the lock; ``memory`` keeps the mailbox alive."""
    seen = 0
    while (seen := work(thread, num_threads, mailbox, seen)) != STOP:
        lock.acquire()


def _stop(ring, mailboxes, locks, threads, process: int, memory: np.ndarray) -> None:
    if os.getpid() != process:  # a fork has none of these threads
        return
    for mailbox, lock in zip(mailboxes, locks, strict=True):
        if ring(mailbox, STOP) == PARKED:
            lock.release()
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join()


def default_num_threads() -> int:
    """Physical cores that this process may use: its affinity, and the quota of its control group.

    Two hardware threads of a core share its arithmetic, so a second one gains nothing here.
    """
    try:
        usable = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
    cores = {_core_of(cpu) for cpu in usable}
    quota = _quota()
    return max(1, len(cores) if quota is None else min(len(cores), int(quota)))


def _core_of(cpu: int) -> str:
    """What names the core of a hardware thread: the list of its siblings."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota() -> float | None:
    """Cores that the control group grants (cgroup v2, then v1); ``None``: no limit."""
    root = Path("/sys/fs/cgroup")
    try:
        limit, period = (root / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit = int((root / "cpu/cpu.cfs_quota_us").read_text())
        return None if limit <= 0 else limit / int((root / "cpu/cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
