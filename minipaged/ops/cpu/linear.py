"""Products of the step: rows prepared by whoever computed them, panels of the weight shared out to the threads."""

from __future__ import annotations

from .memory import compiled
from .products import call_prepare, call_product


@compiled
def share(count, thread, num_threads):
    """The part ``(first, last)`` of ``count`` things that a thread works on."""
    return count * thread // num_threads, count * (thread + 1) // num_threads


@compiled
def prepare_row(linear, x, row, prepared):
    """Turn float32 values at ``x`` into row ``row`` of a product's input, if the format needs that."""
    if linear.prepare:
        call_prepare(
            linear.prepare,
            x,
            0,
            linear.num_inputs,
            0,
            1,
            prepared + row * linear.row_bytes,
            linear.row_bytes,
        )


@compiled
def multiply(linear, x, x_stride, prepared, num_rows, out, out_stride, thread, num_threads):
    """This thread's panels of ``out = x @ weight.T``, the rows prepared before where the format needs that."""
    if linear.prepare:
        x, x_stride = prepared, linear.row_bytes
    first, last = share(linear.num_panels, thread, num_threads)
    call_product(
        linear.product,
        x,
        x_stride,
        linear.weight,
        linear.scale,
        linear.aux,
        linear.num_inputs,
        first,
        last,
        num_rows,
        out,
        out_stride,
        0,
    )
