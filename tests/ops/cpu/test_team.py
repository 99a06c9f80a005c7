"""The team of threads: it meets at barriers, sleeps when idle, ends on close and refuses forks."""

from __future__ import annotations

import gc
import os
import threading
import time
from functools import cache

import numpy as np
import pytest
from numba import njit

from minipaged.errors import EngineClosedError
from minipaged.ops.cpu import team as team_module
from minipaged.ops.cpu.team import PARKED, STOP, Team, barrier, default_num_threads, wait_for_step

ROUNDS = 50


@cache
def compiled_work():
    """Each thread writes its cell, then sums everybody's, many times over: wrong without barriers."""

    @njit(nogil=True)
    def work(address, cells, sums, thread, num_threads, mailbox, seen):
        while True:
            if thread:
                number = wait_for_step(mailbox, seen)
                if number == PARKED:
                    return seen
                if number == STOP:
                    return STOP
                seen = number
            for round_ in range(ROUNDS):
                cells[thread] += 1
                barrier(address, num_threads)
                sums[thread, round_] = cells[:num_threads].sum()
                barrier(address, num_threads)
            if thread == 0:
                return 0

    return work


def make_team(num_threads: int):
    team = Team(num_threads)
    cells, sums = np.zeros(num_threads, np.int64), np.zeros((num_threads, ROUNDS), np.int64)
    address, work = team.barrier, compiled_work()
    team.start(lambda *arguments: work(address, cells, sums, *arguments))
    return team, sums


def alive() -> int:
    return sum(thread.name.startswith("minipaged-cpu") for thread in threading.enumerate())


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_all_see_what_all_wrote(num_threads):
    team, sums = make_team(num_threads)
    for step in range(3):
        team.run()
        expected = num_threads * np.arange(step * ROUNDS + 1, (step + 1) * ROUNDS + 1)
        np.testing.assert_array_equal(sums, np.tile(expected, (num_threads, 1)))
    team.close()


def test_idle_threads_sleep_and_wake(monkeypatch):
    team, sums = make_team(2)
    team.run()
    mailbox = team._memory[team.mailbox(1) - team.barrier :][:8].view(np.int64)
    deadline = time.monotonic() + 30
    while mailbox[0] != PARKED and time.monotonic() < deadline:
        time.sleep(0.01)
    assert mailbox[0] == PARKED
    team.run()
    assert sums[0, -1] == 2 * 2 * ROUNDS
    team.close()


def test_close_ends_the_threads():
    before = alive()
    team, _ = make_team(3)
    assert alive() == before + 2
    team.close()
    team.close()
    assert alive() == before
    with pytest.raises(EngineClosedError, match="close"):
        team.run()


def test_garbage_ends_its_threads():
    before = alive()
    team, _ = make_team(2)
    team.run()
    del team
    gc.collect()
    assert alive() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_is_refused():
    team, _ = make_team(2)
    team.run()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            team.run()
        except EngineClosedError as error:
            status = 0 if "fork" in str(error) else 2
        finally:
            team.close()
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    team.run()  # the parent goes on
    team.close()


def test_default_number_of_threads(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(team_module, "_core_of", lambda cpu: f"{cpu // 2}")
    monkeypatch.setattr(team_module, "_quota", lambda: None)
    assert default_num_threads() == 2  # two hardware threads a core
    monkeypatch.setattr(team_module, "_quota", lambda: 1.5)
    assert default_num_threads() == 1
    monkeypatch.setattr(team_module, "_quota", lambda: 0.5)
    assert default_num_threads() == 1
