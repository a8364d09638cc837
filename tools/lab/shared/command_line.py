"""The command line of the verbs of `record` that measure on this machine.

`./run.sh record VERB ...` is `python -m lab.VERB ...` with tools/ on PYTHONPATH.
"""

from __future__ import annotations

import argparse


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse the command line of a verb whose positional arguments are called `words`.

    argparse by itself takes positional arguments in one place only; here they may also follow options.
    """
    args, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.words += rest
    return args
