"""One script for each engine, run by a Python that has it; none of them is imported by minipaged.

``serve.py`` has the protocol. A script's own directory comes first in ``sys.path``, so the scripts
import ``serve`` by that name alone, and are called ``run_*`` to hide no package.
"""
