"""The claim about the artifact reader, and one reading judged by it.

For any bytes, unpack_artifact returns float32 tensors by name or raises ValueError with a reason of one line.
It never raises another exception, runs no code of the artifact and takes less than SECONDS.
"""

import time
from typing import NamedTuple

import torch

import train_gpt as t

SECONDS = 5.0
VIOLATION = "VIOLATION"  # beside the verdicts of an Outcome, in tables


class Violation(AssertionError):
    """The reader broke its claim. The message says how."""


class Outcome(NamedTuple):
    """An outcome within the reader's claim. verdict: "read" or "refused". reason: of a refusal."""

    verdict: str
    reason: str


def clock():
    """Return (wall time, processor time) of this process, in seconds."""
    return time.perf_counter(), time.process_time()


def since(start):
    """Return the seconds since `start`, a `clock()`: the lesser of both, as others may use the processor."""
    return min(now - then for now, then in zip(clock(), start))


def outcome(blob):
    """Return the Outcome of reading `blob`. Raises Violation if the reader breaks its claim."""
    start = clock()
    try:
        check_tensors(t.unpack_artifact(blob))
        result = Outcome("read", "")
    except ValueError as error:
        check_refusal(error)
        result = Outcome("refused", str(error))
    except Violation:
        raise
    except BaseException as error:
        raise Violation(f"{type(error).__name__}: {str(error)[:120]}") from None

    seconds = since(start)
    if seconds > SECONDS:
        raise Violation(f"took {seconds:.1f} s")
    return result


def check_tensors(tensors):
    """Raise Violation unless `tensors` is a dict of float32 tensors by name."""
    is_right = type(tensors) is dict and all(
        type(name) is str and isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32
        for name, tensor in tensors.items()
    )
    if not is_right:
        raise Violation("returned something other than float32 tensors by name")


def check_refusal(error):
    """Raise Violation unless `error` is a plain ValueError with one short line about the artifact."""
    reason = str(error)
    is_one_line = reason.startswith("artifact: ") and "\n" not in reason and len(reason) <= 300
    if type(error) is not ValueError or not is_one_line:
        raise Violation(f"{type(error).__name__}, not a reason of one line: {reason[:120]!r}") from None
