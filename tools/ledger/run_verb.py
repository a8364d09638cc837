"""Runs a verb of `record`, the ledger's or the lab's: an error the user can fix is one line and a status."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from script import BadInput, describe, guard_console, leave_console, take_ctrl_c


def run_verb(command: Callable[[], int], tool: str = "record") -> int:
    """Run a verb and return its exit status. Its BadInput or OSError becomes one line and status 2.

    tool: the name in front of that line.
    """
    guard_console()
    take_ctrl_c()
    try:
        status = command()
        sys.stdout.flush()
        return status
    except BadInput as error:
        print(f"{tool}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        leave_console()
        return 141
    except KeyboardInterrupt:
        print(f"\n{tool}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        print(f"{tool}: {describe(error)}", file=sys.stderr)
        if error.filename is None:
            leave_console()
        return 2
