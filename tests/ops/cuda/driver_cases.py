"""How the card's host code behaves to a driver: run by test_fake_driver.py in a process with a fake one."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import numpy as np
import pytest

from cuda_kernels import row_gather
from cuda_kernels.kernel import Kernel, int32, pointer
from minipaged.errors import DeviceError, OutOfDeviceMemoryError
from minipaged.ops.cuda import available
from minipaged.ops.cuda.device import DeviceArray, bind
from minipaged.ops.cuda.hardware import HardwareDevice, compile_target
from minipaged.ops.sampling import Ask, Draw, Edits
from tests.support import fake_driver
from tests.support.cuda_machine import Machine


@pytest.fixture
def driver():
    return fake_driver.install(Path("."))  # the library is there; this is a fresh state


@pytest.fixture
def call(driver):
    device = HardwareDevice()
    x = DeviceArray.from_host(device, np.zeros((3, 4), np.float32))
    indices = DeviceArray.from_host(device, np.zeros(2, np.int32))
    out = DeviceArray(device, (2, 4), np.float32)
    return bind(device, row_gather.build(), (2,), x=x, indices=indices, out=out, width=4), device, (x, indices, out)


def test_what_is_asked_of_the_driver(driver, call):
    call, device, arrays = call
    device.run([call])
    (launched,) = driver.launches
    assert launched.entry == "row_gather" and launched.grid == (2, 1, 1) and launched.block == (128, 1, 1)
    assert launched.values == [*(array.address for array in arrays), 4]
    assert device.name == "Imaginary card" and device.compute_capability == (8, 0)


def test_a_module_is_loaded_once_and_every_handle_given_back(driver, call):
    call, device, arrays = call
    device.record([call]).launch()
    device.host_array(100)
    device.function(row_gather.build())
    assert len(driver.modules) == 1 and driver.graph_launches == 1 and len(driver.launches) == 1
    device.close()
    device.close()
    left = driver.modules, driver.graphs, driver.allocations, driver.host_memory
    assert not any(left) and driver.retained == 0


def test_every_thread_gets_the_context(driver, call):
    call, device, arrays = call
    seen = []

    def work():
        device.run([call])
        seen.append(arrays[2].to_host())

    for _ in range(8):  # a new thread often gets the id of one that ended, but never its context
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    device.run([call])
    assert len(seen) == 8 and len(driver.launches) == 9


def test_two_devices_take_turns_on_one_thread(driver, call):
    call, device, _ = call
    other = HardwareDevice()
    device.run([call])
    other.synchronize()
    before = driver.num_context_switches
    device.run([call])
    device.run([call])
    assert driver.num_context_switches == before + 1


def test_what_another_thread_asks_for_is_not_captured(driver, call, monkeypatch):
    call, device, arrays = call
    found, run = [], device.run
    other = threading.Thread(target=lambda: found.append(arrays[0].to_host()))

    def run_beside_another(calls):
        other.start()
        other.join(0.2)
        run(calls)

    monkeypatch.setattr(device, "run", run_beside_another)
    device.record([call])
    other.join()
    assert found[0].shape == (3, 4)


def test_a_launch_that_fails_while_it_is_recorded_is_what_the_error_names(driver, call, monkeypatch):
    call, device, arrays = call
    run = device.run

    def fail(calls):
        driver.fail_next = 1
        run(calls)

    monkeypatch.setattr(device, "run", fail)
    with pytest.raises(DeviceError, match="cuLaunchKernel failed on Imaginary card: CUDA_ERROR_INVALID_VALUE"):
        device.record([call])
    monkeypatch.undo()
    device.record([call]).launch()  # the stream is as good as before
    assert len(driver.launches) == 1 and arrays[2].to_host().shape == (2, 4)


@pytest.mark.parametrize(
    "edits, logprobs, kernels",
    [
        (None, -1, ["sample"]),
        (Edits(masked=[np.array([3])]), 0, ["process_logits", "sample", "logprobs"]),
    ],
)
def test_a_decode_step_is_one_upload_one_launch_and_one_download(driver, edits, logprobs, kernels):
    """Three sequences that sample, after their graph was recorded; a block is copied in front of it."""
    machine = Machine(HardwareDevice(), "llama_gqa")
    ids, tables = np.arange(9, dtype=np.int32), [machine.blocks(9) for _ in range(3)]
    asks = [Ask(row, Draw(1.0, seed=2**64 - 1, edits=edits), num_top=logprobs) for row in range(3)]
    for position in (5, 6):
        driver.copies.clear()
        driver.launches.clear()
        graph_launches = driver.graph_launches
        batch = machine.batch([(ids, table, position, position + 1) for table in tables])
        answers = machine.decoder.sample(batch, machine.cache, asks, [(1, 2)] if position == 6 else [])
    assert [kind for kind, _ in driver.copies] == ["upload", "download"]
    assert driver.graph_launches == graph_launches + 1
    entries = [launched.entry.split("__")[0] for launched in driver.launches]
    assert entries[0] == "copy_blocks" and entries[-len(kernels) :] == kernels
    layers = machine.config.num_layers
    assert len(entries) == 1 + 8 * layers + 3 + len(kernels)
    assert len(answers.tokens) == 3


def test_shared_memory_beyond_48_kilobytes_is_asked_for(driver):
    def body(x, n):
        x[0] = n

    device = HardwareDevice()
    kernel = Kernel("greedy", body, (pointer(int32), int32), shared_bytes=60_000)
    array = DeviceArray(device, (1,), np.int32)
    device.run([bind(device, kernel, (1,), x=array, n=-7)])
    assert driver.launches[0].shared_bytes == 60_000


def test_out_of_memory_has_sizes(driver):
    device = HardwareDevice()
    with pytest.raises(OutOfDeviceMemoryError, match=r"1,073,741,825 bytes .* Imaginary card, of whose 1,073,741,824"):
        device.allocate((1 << 30) + 1)


def test_errors_have_the_drivers_words(driver, call):
    call, device, arrays = call
    driver.fail_next = 700
    with pytest.raises(DeviceError, match="cuStreamSynchronize failed on Imaginary card: CUDA_ERROR_ILLEGAL_ADDRESS"):
        device.synchronize()
    with pytest.raises(DeviceError, match="kernel bad could not be loaded: .*INVALID_PTX.* ptxas fatal: no entry"):
        device._load("bad", "nothing of use")
    driver.fail_next = 700
    device.close()
    assert driver.retained == 0


@pytest.mark.parametrize(
    "state, problem",
    [
        ({"num_devices": 0}, "sees no device"),
        ({"capability": (7, 0)}, "Imaginary card has compute capability 7.0; 7.5 is the least"),
        ({"version": 12040}, "for CUDA 12.4, but kernels are compiled by CUDA 1.*update the driver to 580 or newer"),
        ({}, None),
    ],
)
def test_a_card_that_cannot_be_used(state, problem, monkeypatch):
    monkeypatch.delenv(available.VARIABLE, raising=False)
    monkeypatch.setattr(available, "_compiler_version", lambda: (13, 0))
    fake_driver.install(Path("."), **state)
    found = available.examine()
    if problem is None:
        assert found.problem is None and found.name == "Imaginary card (compute capability 8.0)"
    else:
        assert re.search(problem, found.problem)


def test_older_targets_for_unknown_cards():
    assert compile_target((8, 0)) == (8, 0) and compile_target((8, 7)) == (8, 6)
    assert compile_target((13, 7)) == (12, 0)
