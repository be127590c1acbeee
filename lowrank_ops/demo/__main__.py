"""``python -m lowrank_ops.demo``, the same as ``lowrank-ops demo``."""

import argparse
import sys

from .run import __doc__ as description
from .run import add_arguments, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lowrank_ops.demo", description=description)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
