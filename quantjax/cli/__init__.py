"""The command line: ``quantjax sweep``, ``calibrate``, ``studies``; ``--help`` explains each.

One command a file, its options a dataclass; tyro makes the parser of it.
"""

from quantjax.cli.command import main

__all__ = ["main"]
