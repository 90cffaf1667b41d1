"""`python -m irpo_utils run | plan`; see `ops.cli`."""

import sys

from irpo_utils.ops.cli import main

if __name__ == "__main__":
    sys.exit(main())
