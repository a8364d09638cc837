"""The exit status of the verbs of `record`, those of the ledger and those of the lab."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from script import BadInput


def finish(command: Callable[[], int]) -> int:
    """Run a verb and return its exit status. Its BadInput becomes one line on stderr and status 2."""
    try:
        status = command()
        sys.stdout.flush()
        return status
    except BadInput as error:
        print(f"record: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
