"""``python -m lowrank_ops.cli``."""

import sys

from . import main

sys.exit(main())
