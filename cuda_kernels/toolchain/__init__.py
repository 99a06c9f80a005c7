"""Offline compilation, the PTX interpreter, the SASS report, the mutation sweep and the fast simulator."""
