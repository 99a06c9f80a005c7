"""The CPU backend: products, attention and a whole forward pass compiled by Numba, with SIMD kernels.

Start at :mod:`~minipaged.ops.cpu.features` (what this CPU can do), :mod:`~minipaged.ops.cpu.emit` (how a
kernel is written) and :mod:`~minipaged.ops.cpu.products` (the kernel that matters most).
"""
