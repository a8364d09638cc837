"""Shared by the verbs of `record` that measure on this machine: command line, child processes.

`./run.sh record VERB ...` is `python -m lab.VERB ...` with tools/ on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import os

from script import ROOT


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse the command line of a verb whose positional arguments are called `words`.

    argparse by itself takes positional arguments in one place only; here they may also follow options.
    """
    args, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.words += rest
    return args


def child_environment(**changes: str) -> dict[str, str]:
    """Return the environment in which `python -m lab.MODULE` runs from any folder."""
    paths = [str(ROOT / "tools"), str(ROOT)]
    if "PYTHONPATH" in os.environ:
        paths.append(os.environ["PYTHONPATH"])
    # PYTHONSAFEPATH: from Python 3.11 on, -m then ignores modules in the working folder.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", **changes}
