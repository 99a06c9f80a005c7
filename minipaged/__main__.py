"""``python -m minipaged`` is the same as the ``minipaged`` command."""

import sys

from minipaged.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
