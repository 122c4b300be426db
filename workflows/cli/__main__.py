"""`python -m workflows.cli`: the command `cartridges` where it is not installed."""

import sys

from workflows.cli import main

sys.exit(main())
