"""Run a hostile case in a folder of its own and judge what the program did."""

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import train_gpt as t
from tests.rank_cases import free_port
from tests.stress.hostile_cases.case import PYTHON, TRAINER, Receiver

MARK = "HOSTILE_CASE"  # the environment variable by which the processes of a case are found
GRACE = 8.0  # seconds in which all processes must be gone after the first
LONGEST = 800  # characters of a refusal
UNCLOSED = "error::ResourceWarning"  # shown as an exception that Python ignores, which is one of TRACES
TRACES = r"Traceback \(most recent|Segmentation fault|Bus error|core dumped|Exception ignored"
# torchrun's own report of a rank that failed, or of its own end by a signal.
TORCHRUN = r"Traceback [^\n]*\n  File .<frozen runpy>.(?:(?!Traceback).)*(?:ChildFailed|SignalExc)[^\n]*"
NOTE = "[run.sh "  # how run.sh's notes begin
UNSET = (
    *(f.name.upper() for f in dataclasses.fields(t.Config)),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "NPROC", "PYTHONPATH", "PYTHON"),
)


class Verdict(NamedTuple):
    """What a case showed. faults: what was wrong, nothing if it behaved. skipped: why it did not run."""

    faults: tuple[str, ...]
    seconds: float
    skipped: str | None = None
    console: str = ""

    @property
    def behaved(self):
        return not self.faults and self.skipped is None


# ---------------------------------------------------------------- the processes of a case


def environment(case, place, mark):
    """Return the variables of a case: this process's without knobs and ranks, and a TMPDIR."""
    env = {key: value for key, value in os.environ.items() if key not in UNSET}
    env |= {
        MARK: mark,
        "BANKSHOT_PYTHON": PYTHON,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "MASTER_PORT": str(free_port()),
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONWARNINGS": UNCLOSED,
        "TMPDIR": str(place / "tmp"),
        "TRAINER": TRAINER,
    }
    env |= {key: value for key, value in case.env.items() if value is not None}
    return {key: value for key, value in env.items() if case.env.get(key, "") is not None}


class Forked:
    """A Python program that forked_program.py becomes. Has what this module uses of subprocess.Popen."""

    workers = threading.local()  # a forked_program.py for each thread

    def __init__(self, argv, here, env, consoles):
        self.worker = getattr(self.workers, "process", None) or self.start_worker()
        names = ("stdout", "stderr")
        files = {name: str(console) for name, console in zip(names, consoles, strict=True)}
        program = {"cwd": str(here), "env": env, "argv": argv, **files}
        self.worker.stdin.write(json.dumps(program) + "\n")
        self.worker.stdin.flush()
        self.pid = int(self.worker.stdout.readline())
        self.returncode = None
        self.reader = threading.Thread(target=self.read_status, daemon=True)
        self.reader.start()

    def start_worker(self):
        """Start this thread's forked_program.py."""
        self.workers.process = subprocess.Popen(
            [PYTHON, str(Path(__file__).with_name("forked_program.py"))],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": UNCLOSED},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self.workers.process

    def read_status(self):
        """In a thread: wait for the program's end."""
        self.returncode = int(self.worker.stdout.readline())

    def poll(self):
        """Return the exit status, None before the end."""
        return self.returncode

    def wait(self, timeout=None):
        """Wait for the end. Raises subprocess.TimeoutExpired."""
        self.reader.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("forked_program.py", timeout)

    def send_signal(self, number):
        """Send a signal, unless the program has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)


def can_fork(case):
    """Return whether a case may run in a fork: a program in Python whose start is not its subject."""
    starts = any(key.startswith(("PYTHON", "LANG", "LC_")) for key in case.env)
    early = any(not wanted.after for wanted in case.signals)
    is_program = case.command[0] == PYTHON and case.command[1].endswith(".py")
    return is_program and not (case.fresh or case.under or starts or early)


def start(case, here, env, consoles):
    """Start the program of a case: a Popen, or a Forked."""
    if can_fork(case):
        for console in consoles:
            console.touch()
        return Forked(list(case.command[1:]), here, env, consoles)
    with open(consoles[0], "wb") as out, open(consoles[1], "wb") as err:
        return subprocess.Popen(
            [*case.under, *case.command],
            cwd=here,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )


def marked_processes(mark, session):
    """Return {process id: its environment as text} of the living processes of a case, where /proc tells.

    They have its mark, or, as forks of another program, its session. Each variable is between two NULs.
    """
    wanted = f"\0{MARK}={mark}\0"
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            text = "\0" + (entry / "environ").read_bytes().decode(errors="replace") + "\0"
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if (wanted in text or int(fields[3]) == session) and fields[0] != "Z":
                found[int(entry.name)] = text
    return found


def receivers(wanted, process, mark):
    """Return the processes that get a Signal, as ids. A rank is there only once it has started."""
    if wanted.to is Receiver.PROGRAM:
        return [process.pid]
    processes = marked_processes(mark, process.pid)
    if wanted.to is not Receiver.TERMINAL:
        processes = [pid for pid, text in processes.items() if f"\0RANK={wanted.to.number}\0" in text]
    return list(processes)


def send(wanted, process, mark):
    """Send one Signal to its receivers."""
    if wanted.to is Receiver.PROGRAM:
        process.send_signal(wanted.number)
        return
    for pid in receivers(wanted, process, mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, wanted.number)


def shown(consoles, here):
    """Return what the consoles show and the logs in out/ say, from the machine on: a log begins with code."""
    text = "".join(read_text(path) for path in consoles)
    for log in sorted(here.glob("out/*.txt")):
        text += read_text(log).rpartition("=" * 100)[2]
    return text


def wait(process, case, consoles, here, mark):
    """Send the signals of a case at their times and wait for its end. Returns what went wrong, or ""."""
    deadline = time.monotonic() + case.seconds
    for wanted in case.signals:
        while not (re.search(wanted.after, shown(consoles, here), re.M) and receivers(wanted, process, mark)):
            if process.poll() is not None:
                return f"ended before the signal after {wanted.after!r}"
            if time.monotonic() > deadline:
                return f"did not show {wanted.after!r} within {case.seconds:g} s"
            time.sleep(0.02)
        time.sleep(wanted.seconds)
        send(wanted, process, mark)
    try:
        process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return f"did not end within {case.seconds:g} s"
    return ""


def stop_all(mark, session, seconds):
    """Wait until no process of a case is left, then kill those that are. Returns how many that were."""
    deadline = time.monotonic() + seconds
    while (left := marked_processes(mark, session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(left)


# ---------------------------------------------------------------- what must hold


def read_text(path):
    """Return the text of a file, which may hold anything; "" if it is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def snapshot(here):
    """Return {relative path: a digest of what is there}: of files by content, of links by target."""
    found = {}
    for path in sorted(here.rglob("*")):
        name = str(path.relative_to(here))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "device"
    return found


def changed_paths(before, after, leaves):
    """Return a fault for each path that is new, gone or different and that no pattern of `leaves` allows."""
    faults = []
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) == after.get(name):
            continue
        is_partial = name.endswith(".tmp") or "/.tmp." in f"/{name}"
        if name in after and (is_partial or not any(fnmatch.fnmatch(name, leaf) for leaf in leaves)):
            faults.append(f"{'left' if name not in before else 'changed'} {name}")
        elif name not in after and not any(fnmatch.fnmatch(name, leaf) for leaf in leaves):
            faults.append(f"removed {name}")
    return faults


def console_faults(case, status, out, err, everything):
    """Return what is wrong with the exit status and with what the console shows.

    everything: it and the logs, of which any part may hold what the case expects on success.
    """
    faults = []
    if status != case.status:
        faults.append(f"status {status}")
    err = re.sub(TORCHRUN, "", err, flags=re.S)
    for name, text in (("stdout", out), ("stderr", err)):
        if re.search(TRACES, text):
            faults.append(f"a traceback on {name}")

    lines = [line for line in err.splitlines() if line.strip()]
    own = [line for line in lines if not line.startswith(NOTE)]
    where = everything
    if case.status != 0 and case.lines:
        last = (own or lines or [""])[-1]
        where = "\n".join([last, *lines[-1:]])
        if len(own) > case.lines:
            faults.append(f"{len(own)} lines on stderr")
        if len(last) > LONGEST:
            faults.append(f"a last line of {len(last)} characters")
    faults += [f"does not say {words!r}" for words in case.says if words not in where]
    return faults


@cache
def missing_program(under):
    """Return why a program that runs commands cannot be used here, None if it can. It may make folders."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run([*under, "true"], capture_output=True, text=True, timeout=20, cwd=folder)
        except OSError as error:
            return f"{under[0]}: {error.strerror}"
    return None if done.returncode == 0 else f"{under[0]}: {done.stderr.strip()[:80] or done.returncode}"


def judge(case, parts, sound_files):
    """Run a case and return its Verdict."""
    started = time.monotonic()
    missing = missing_program(case.under) if case.under else None
    if missing is not None:
        return Verdict((), 0.0, skipped=missing)

    with tempfile.TemporaryDirectory(prefix="hostile-", ignore_cleanup_errors=True) as folder:
        place = Path(folder)
        here = place / "here"
        for name in ("here", "tmp"):
            (place / name).mkdir()
        sound_files.copy(parts, here)
        for break_it in case.setup:
            break_it(here)
        started = time.monotonic()
        faults, console = run_case(case, place, here)
        subprocess.run(["chmod", "-R", "u+rwX", folder], capture_output=True)
        shutil.rmtree(here, ignore_errors=True)
    return Verdict(tuple(faults), time.monotonic() - started, console=console)


def run_case(case, place, here):
    """Run a case that is set up. Returns what was wrong, and the console."""
    mark = place.name
    before = snapshot(here)
    consoles = [place / "stdout", place / "stderr"]
    process = start(case, here, environment(case, place, mark), consoles)
    hung = wait(process, case, consoles, here, mark)
    left = stop_all(mark, process.pid, 0.0 if hung else GRACE)
    process.wait()

    out, err = (read_text(path) for path in consoles)
    faults = [hung] if hung else []
    if left and not hung:
        faults.append(f"{left} processes left")
    faults += console_faults(case, process.returncode, out, err, shown(consoles, here))
    faults += changed_paths(before, snapshot(here), case.leaves)
    faults += [
        f"left TMPDIR/{path.name}"
        for path in (place / "tmp").iterdir()
        if not path.name.startswith("torch")  # torchinductor_USER, torchelastic_ID: torch's own
    ]
    wrong = None if case.holds is None else case.holds(here)
    if wrong is not None:
        faults.append(wrong)
    return faults, f"{out[-1500:]}\n{err[-2500:]}"
