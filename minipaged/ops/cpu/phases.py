"""The step is cut into *phases* where a part is large, or differs between formats.

A phase is a C function of its own, called by its address: it is compiled once and only if a model needs
it, and the step does not have to be compiled again around it. All have one signature::

    phase(model, layer, linears, index, thread, num_threads)

the addresses of the records in :mod:`~minipaged.ops.cpu.tables`, what to do (a row, an item of attention,
or the number of rows), and who calls.
"""

from __future__ import annotations

from numba import carray
from numba.extending import intrinsic

from .memory import _pointer, part_of_caller
from .products import _calls_address
from .tables import LAYER, LINEAR, MODEL

PHASE_SIGNATURE = f"void({', '.join(['int64'] * 6)})"


@intrinsic
def call_phase(typing_context, address, model, layer, linears, index, thread, num_threads):
    """Call a phase from compiled code."""
    return _calls_address(6)


@part_of_caller
def model_at(address):
    """The MODEL record at ``address``."""
    return carray(_pointer(address), 1, MODEL)[0]


@part_of_caller
def layer_at(address):
    """The LAYER record at ``address``."""
    return carray(_pointer(address), 1, LAYER)[0]


@part_of_caller
def linear_at(address, index):
    """The LINEAR record ``index`` of the table at ``address``."""
    return carray(_pointer(address), index + 1, LINEAR)[index]
