"""What all tools share: loading a train_gpt.py, errors of one line, a safe console. Imports no torch."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType, TracebackType

from older_scripts import linger_seconds, lost_another_rank, missing_names, rename_older_names

ROOT = Path(__file__).resolve().parent.parent
TRAINER = ROOT / "train_gpt.py"


def on_one_line(text: str) -> str:
    """Return a text with its line breaks and control characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in "\\n".join(text.splitlines()))


class BadInput(Exception):
    """An error the user can fix: one line that names the file, key or value and the remedy."""

    def __str__(self) -> str:
        """Return the line. Line breaks and control characters are shown escaped."""
        return on_one_line(super().__str__())


# ---- the console ---------------------------------------------------------------------------------


def guard_console() -> None:
    """Make the console safe to print on: a closed stream prints nowhere, an odd character is escaped."""
    # Open descriptors 0 to 2 where they are closed, or the next file would get the number of a console.
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may not fit an ASCII terminal


def leave_console() -> None:
    """Print no more on stdout, which failed: else Python's last flush would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@contextmanager
def console_may_be_gone() -> Iterator[None]:
    """Inside the block, an error of stdout, whose reader may have left, ends the block and nothing else."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        leave_console()


def take_ctrl_c() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, if it would end the process. A shell may have it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def describe(error: OSError) -> str:
    """Return one line about an error of a file, or of stdout, which has no name."""
    place = error.filename or "standard output"
    return str(BadInput(f"{place}: {error.strerror}; check the path, its permissions and the free space"))


# ---- errors of importing PyTorch -----------------------------------------------------------------


def wrong_setting(error: BaseException) -> str | None:
    """Return one line about an import of PyTorch that failed: it is missing, or a variable is wrong.

    None for any other error. PyTorch itself says only what int() says of a wrong value.
    """
    if isinstance(error, ModuleNotFoundError) and error.name in ("numpy", "torch"):
        return f"{error.name} is not installed; run pip install -r requirements.txt, or use ./run.sh"
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    loading = [frame.f_globals["__name__"] for frame in frames if frame.f_code.co_name == "<module>"]
    if not any(name.partition(".")[0] in ("torch", "triton") for name in loading):
        return None
    keys = [key for key in sorted(os.environ) if re.match("TORCH(?!ELASTIC)|PYTORCH|TRITON", key)]
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    if not keys:
        return f"PyTorch does not import ({reason}); run pip install -r requirements.txt"
    keys = [key for key in keys if re.search(rf"(?<!\w){re.escape(os.environ[key])}(?!\w)", reason)] or keys
    return f"{', '.join(keys)}: PyTorch does not import with this setting ({reason}); change or unset it"


def explain_imports(tool: str) -> None:
    """From now on, let an error of importing PyTorch end this process with its one line and status 2."""

    def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not (line := wrong_setting(error)):
            sys.__excepthook__(kind, error, trace)
            return
        raise SystemExit(refuse(tool, BadInput(line)))

    sys.excepthook = explain


# ---- errors of a rank ----------------------------------------------------------------------------


def refuse(tool: str, error: Exception) -> int:
    """Print an error as one line, and leave it where torchrun finds it. Returns the exit status."""
    print(f"{tool}: {error}", file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": str(error), "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")
    return getattr(error, "status", 2)


def print_help(tool: str, text: str) -> int:
    """Print the help of a tool and return the exit status, also on a full disk or to a reader that left."""
    try:
        print(text.strip(), flush=True)
    except OSError as error:
        leave_console()
        return 141 if isinstance(error, BrokenPipeError) else refuse(tool, BadInput(describe(error)))
    return 0


def leave_if_lost(tool: str, script: ModuleType, error: Exception, when: str) -> None:
    """End the process if the error only says that another rank is gone, for which a shutdown would wait."""
    if not lost_another_rank(script, error):
        return
    print(f"{tool}: another rank is gone {when}", file=sys.stderr, flush=True)
    time.sleep(linger_seconds(script))  # so that torchrun names that rank as the cause
    os._exit(1)


# ---- scripts -------------------------------------------------------------------------------------


def require_names(module: ModuleType, path: Path, needs: tuple[str, ...], tool: str) -> None:
    """Raise BadInput if the module, loaded from `path`, lacks a name that the tool uses."""
    if lacking := missing_names(module, needs):
        raise BadInput(
            f"{path}: this script has no {', '.join(lacking)}, which {tool} needs; "
            f"{tool} it with the tools of the commit that it comes from"
        )


def load_script(path: Path, name: str, needs: tuple[str, ...], tool: str) -> ModuleType:
    """Import the script at `path` from its text, so that no bytecode beside it is used or written.

    name: its key in sys.modules. Two copies need two names: each registers its operators under its own.
    needs: the names of the script that the tool uses. tool: its own name, for messages.
    Raises BadInput if the file cannot be read, does not import or lacks a name.
    """
    loader = SourceFileLoader(name, str(path))
    try:
        if path.is_fifo():  # reading it may never end
            raise OSError(errno.EINVAL, "it is a pipe")
        source = loader.get_data(str(path))
    except OSError as error:
        raise BadInput(
            f"{path}: cannot read the script ({error.strerror}); --script PATH names one"
        ) from None

    module = module_from_spec(spec_from_loader(name, loader))
    sys.modules[name] = module
    try:
        exec(loader.source_to_code(source, str(path)), module.__dict__)
    except (Exception, SystemExit) as error:
        if line := wrong_setting(error):
            raise BadInput(line) from None
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BadInput(f"{path}: does not import here ({reason}); fix it or {tool} another") from None

    rename_older_names(module)
    require_names(module, path, needs, tool)
    return module
