"""Shared by the verbs of `record` that measure on this machine: command line, exit status, child processes.

`./run.sh record VERB ...` is `python -m lab.VERB ...` with tools/ on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from script import ROOT, BadInput


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse the command line of a verb whose positional arguments are called `words`.

    argparse by itself takes positional arguments in one place only; here they may also follow options.
    """
    args, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.words += rest
    return args


def finish(command: Callable[[], int]) -> int:
    """Run a verb and return its exit status. BadInput becomes one line on stderr and status 2."""
    try:
        status = command()
        sys.stdout.flush()
        return status
    except BadInput as error:
        print(f"record: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141


def child_environment(**changes: str) -> dict[str, str]:
    """Return the environment in which `python -m lab.MODULE` runs from any folder."""
    paths = [str(ROOT / "tools"), str(ROOT)]
    if "PYTHONPATH" in os.environ:
        paths.append(os.environ["PYTHONPATH"])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **changes}
