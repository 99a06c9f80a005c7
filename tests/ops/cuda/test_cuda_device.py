"""What every device must do: memory, launches by name, recordings, errors with words."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.cuda_devices import each_device, make_device  # noqa: F401

# isort: split

from cuda_kernels import activation, row_gather
from minipaged.errors import DeviceError, OutOfDeviceMemoryError
from minipaged.ops.cuda.device import DeviceArray, bind


def gather(device, x, indices, out):
    arguments = {"x": x, "indices": indices, "out": out, "width": x.shape[1]}
    return bind(device, row_gather.build(), row_gather.launch_dims(len(indices.to_host()))[0], **arguments)


def test_memory_comes_back_as_it_was_sent(device):
    values = np.arange(12, dtype=np.int16).reshape(3, 4)
    array = DeviceArray.from_host(device, values.T)
    np.testing.assert_array_equal(array.to_host(), values.T)
    array.fill(values.T + 1)
    np.testing.assert_array_equal(array.to_host(), values.T + 1)
    device.fill(array.row(1), 6, 0xFF)
    np.testing.assert_array_equal(array.to_host()[1], [-1, -1, -1])
    np.testing.assert_array_equal(array.to_host()[2], values.T[2] + 1)


def test_empty_arrays_take_part(device):
    assert DeviceArray.from_host(device, np.zeros((0, 3), np.float32)).to_host().shape == (0, 3)


def test_memory_is_counted_and_given_back(device):
    free, total = device.memory()
    assert 0 < free <= total
    array = DeviceArray(device, (1 << 24,), np.uint8)
    assert device.memory()[0] <= free - (1 << 24)
    array.free()
    assert device.memory()[0] >= free


def test_too_much_memory_is_refused_with_sizes(device):
    with pytest.raises(OutOfDeviceMemoryError, match="1,125,899,906,842,624 bytes were asked"):
        DeviceArray(device, (1 << 50,), np.uint8)


def test_launches_and_recordings(device):
    x = DeviceArray.from_host(device, np.arange(20, dtype=np.float32).reshape(5, 4))
    indices = DeviceArray.from_host(device, np.array([4, 0], np.int32))
    out = DeviceArray(device, (2, 4), np.float32)
    call = gather(device, x, indices, out)
    device.run([call])
    np.testing.assert_array_equal(out.to_host(), x.to_host()[[4, 0]])

    recording = device.record([call, call])
    launches = device.num_launches
    indices.fill(np.array([1, 2], np.int32))  # a recording reads what is there when it runs
    recording.launch()
    np.testing.assert_array_equal(out.to_host(), x.to_host()[[1, 2]])
    assert device.num_launches == launches + 2


def test_scalars_arrive_in_their_types(device):
    x = DeviceArray.from_host(device, np.array([[-2.0, 0.5, 40.0]], np.float32))
    kernel = activation.build_soft_cap()
    device.run([bind(device, kernel, activation.launch_dims(1, 3)[0], x=x, width=3, cap=1.5)])
    np.testing.assert_allclose(x.to_host(), 1.5 * np.tanh(np.array([[-2.0, 0.5, 40.0]]) / 1.5), rtol=1e-6)


@pytest.mark.parametrize(
    "changes, wrong",
    [({"columns": 3}, "columns"), ({"width": None}, "width"), ({"x": 0.5}, "x is 0.5"), ({"cap": "deep"}, "deep")],
)
def test_arguments_are_bound_by_name(changes, wrong):
    device = make_device("emulated")
    arguments = {"x": 0, "width": 3, "cap": 1.5} | changes
    with pytest.raises((TypeError, ValueError), match=wrong):
        bind(device, activation.build_soft_cap(), (1,), **arguments)


def test_a_fault_of_a_kernel_names_it():
    device = make_device("emulated")
    x = DeviceArray.from_host(device, np.zeros((5, 4), np.float32))
    indices = DeviceArray.from_host(device, np.array([5], np.int32))
    with pytest.raises(DeviceError, match="row_gather.*emulated sm_80"):
        device.run([gather(device, x, indices, DeviceArray(device, (1, 4), np.float32))])


def test_reading_what_nobody_wrote_is_a_fault():
    device = make_device("emulated")
    x, out = DeviceArray(device, (1, 4), np.float32), DeviceArray(device, (1, 4), np.float32)
    indices = DeviceArray.from_host(device, np.array([0], np.int32))
    with pytest.raises(DeviceError, match="row_gather"):
        device.run([gather(device, x, indices, out)])
