"""The tests' models are so small that a second BLAS thread only gets in the way."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is first imported
