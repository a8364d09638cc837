"""Starts a program on several ranks, as torchrun does, and ends with one line where torchrun has a traceback.

    python tools/ranks.py 8 train_gpt.py train preset=record

Exit status: 0 if every rank ended well; 1 if one failed, which the last line names with its reason; 128 + N
after signal N.
"""

import os
import signal
import sys

if __name__ == "__main__":  # until torchrun handles it, Ctrl-C ends this process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

if __name__ == "__main__" and getattr(sys.flags, "safe_path", False):  # PYTHONSAFEPATH leaves this folder out
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from script import explain_imports

if __name__ == "__main__":
    explain_imports("ranks.py")

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure


def reason(failure: ProcessFailure) -> str:
    """Return in one line why a rank failed: what it left for torchrun, or else its signal or status."""
    if isinstance(failure.message, dict):
        return failure.message["message"].splitlines()[-1]  # a traceback ends in its error
    if failure.exitcode == -signal.SIGKILL:
        return "killed without a message (out of memory?)"
    if failure.exitcode < 0:
        return f"killed by {failure.signal_name()}"
    return f"ended with status {failure.exitcode}"


def main(argv: list[str]) -> int:
    """Run `argv` = ranks, program, words... and return the exit status."""
    ranks, *program = argv
    arguments = torchrun.parse_args(["--standalone", f"--nproc_per_node={ranks}", *program])
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"ranks.py: rank {rank}: {reason(failure)}", file=sys.stderr, flush=True)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
