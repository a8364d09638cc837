"""Shows runs in progress on a page of this machine: `./run.sh watch [LOG...]`.

It reads logs and nothing else: the runs do not know of it, and go on when it ends.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

from ledger.folders import logs_of, record_folders, shown
from ledger.read.progress import Followed, fraction_done, seconds_left, setting
from ledger.read.runlog import RunLog, parse_log
from ledger.run_verb import run_verb
from ledger.show.board import best_first, read_submission
from ledger.show.standing import compare_with_board, is_same_text
from ledger.show.web import library
from ledger.show.web.curves import run_curves
from ledger.tracks import track_of
from script import ROOT, BadInput

POLL_SECONDS = 1.0  # between two looks at the logs
LINGER_SECONDS = 5.0  # that the server waits for a page to fetch the end
RECORDS = ROOT / "records"
LOGS = ROOT / "logs"


# ---- which logs ----------------------------------------------------------------------------------


def newest_log() -> Path:
    """Return the log in logs/ that was written last. Raises BadInput if there is none."""
    found = sorted(LOGS.glob("*.txt"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        with suppress(BadInput):
            Followed(path).refresh()
            return path
    raise BadInput(f"{shown(LOGS)}: no log of a run; start one, or name its log: ./run.sh watch LOG")


def follow(paths: list[Path]) -> list[Followed]:
    """Return logs that are being written. Raises BadInput for a file that is no log, or if all have ended."""
    all_followed = []
    for path in paths:
        if not path.is_file():
            raise BadInput(f"{path}: no such log; train writes them as logs/RUN_ID.txt")
        followed = Followed(path)
        followed.refresh()
        all_followed.append(followed)
    if all(followed.end is not None for followed in all_followed):
        raise BadInput(
            f"{shown(paths[0])}: this run has ended ({all_followed[0].end}); ./run.sh record plot draws its "
            "curves, ./run.sh watch LOG watches another"
        )
    return all_followed


# ---- what the page shows -------------------------------------------------------------------------


def clock(seconds: float) -> str:
    """Return seconds as minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"


def facts_of(run: RunLog) -> list[tuple[str, str]]:
    """Return figures of a run, each with its name, as far as the log has them."""
    facts = []
    limit = setting(run, "max_wallclock_seconds")
    if run.steps:
        last = run.steps[-1]
        of_limit = f" of {clock(limit)}" if limit else ""
        facts.append(("step", f"{last.step:,}" if limit else f"{last.step:,} of {last.total:,}"))
        facts.append(("training time", f"{clock(last.time_ms / 1000)}{of_limit}"))
        facts.append(("ms a step", f"{last.step_avg_ms:,.1f}"))
    left = seconds_left(run)
    if left is not None and fraction_done(run) < 1:
        facts.append(("left, about", clock(left)))
    for kind, name in (("train", "training loss"), ("val", "validation loss")):
        lines = [line for line in run.steps if line.kind == kind]
        if lines:
            facts.append((name, f"{lines[-1].loss:.4f}"))
            if lines[-1].bpb is not None:
                facts.append(("bits per byte", f"{lines[-1].bpb:.4f}"))
    if "total" in run.sizes:
        facts.append(("bytes", f"{run.sizes['total']:,}"))
    if run.has("final_score", "val_bpb"):
        facts.append(("score, bits per byte", run.text("final_score", "val_bpb")[:6]))
    return facts


def phase_of(followed: Followed) -> str:
    """Return what a run is doing, or why it has ended."""
    run = followed.run
    if followed.end is not None:
        return followed.end
    if run is None or not run.config:
        return "starting"
    if not run.steps:
        return "loading and compiling"
    if fraction_done(run) < 1:
        return "training"
    return "scoring the artifact" if "total" in run.sizes else "making the artifact"


def run_view(followed: Followed) -> dict:
    """Return what the page shows of a run."""
    run = followed.run
    known = run is not None and bool(run.config)
    standing = compare_with_board(run, RECORDS) if followed.is_scored else ""
    return {
        "name": followed.path.stem,
        "path": shown(followed.path),
        "phase": phase_of(followed),
        "ended": followed.end is not None,
        "fraction": fraction_done(run) if known else 0.0,
        "about": f"preset {run.preset}, {run.hardware}" if known and run.has("machine", "device") else "",
        "standing": standing,
        "facts": facts_of(run) if known else [],
        **(run_curves(run) if known else {}),
    }


class BestRecord(NamedTuple):
    """The best record of a track on the same text: its name, and its first run."""

    name: str
    run: RunLog


def best_record(run: RunLog) -> BestRecord | None:
    """Return the best record to set beside a run, or None if there is none."""
    folders = [folder for folder in record_folders(RECORDS) if folder.parent.name == track_of(run.preset)]
    by_name = {folder.name: folder for folder in folders}
    subs = [sub for sub in map(read_submission, folders) if sub["record"] and is_same_text(run, sub)]
    if not subs:
        return None
    best = best_first(subs)[0]
    first_log = logs_of(by_name[f"{best['date']}_{best['name']}"])[0]
    return BestRecord(best["name"], parse_log(first_log))


def best_curves(run: RunLog) -> dict | None:
    """Return the curves of the best record of a run's track, to be drawn behind; None if there is none."""
    with suppress(BadInput):  # a damaged record is the business of `record verify`
        if best := best_record(run):
            return {"name": f"{best.name}, the best record", "muted": True, **run_curves(best.run)}
    return None


class Told(NamedTuple):
    """What the page is told: a version of the state, as JSON, and whether it is the last one."""

    version: int
    body: bytes
    is_over: bool


class State:
    """The runs and what the page is told of them. One thread refreshes it, the server reads `told`."""

    def __init__(self, all_followed: list[Followed]):
        self.all_followed = all_followed
        self.behind: dict[Path, dict | None] = {}  # best_curves of each log that names its text, found once
        self.seen_end = threading.Event()  # a page has fetched the last version
        self.told = Told(version=0, body=b"", is_over=False)
        self.tell()

    def tell(self) -> None:
        """Make the next version from what is known of the logs."""
        version = self.told.version + 1
        is_over = all(followed.end is not None for followed in self.all_followed)
        view = {
            "version": version,
            "over": is_over,
            "runs": [run_view(followed) for followed in self.all_followed],
            "references": self.curves_behind(),
        }
        self.told = Told(version, json.dumps(view, allow_nan=False).encode("utf-8"), is_over)

    def curves_behind(self) -> list[dict]:
        """Return the curves to be drawn behind all runs, each record once."""
        for followed in self.all_followed:
            names_text = followed.run is not None and followed.run.has("data", "val_tokens")
            if names_text and followed.path not in self.behind:
                self.behind[followed.path] = best_curves(followed.run)
        by_name = {found["name"]: found for found in self.behind.values() if found is not None}
        return list(by_name.values())

    def refresh(self) -> None:
        """Read the logs again, and tell the page if one has changed."""
        changed = [followed.refresh() for followed in self.all_followed]
        if any(changed):
            self.tell()


# ---- the server ----------------------------------------------------------------------------------


def page() -> bytes:
    """Return the page, without figures: it asks for them."""
    from markupsafe import Markup

    text = library.fill(
        "watch.html",
        styles=Markup(library.asset("page.css")),
        theme=Markup(library.asset("theme.js")),
        programs=Markup(library.asset("charts.js") + library.asset("watch.js")),
    )
    return text.encode("utf-8")


def make_server(state: State, port: int) -> ThreadingHTTPServer:
    """Return a server of this machine alone, for the page, the library and the state.

    port: 0 takes a free one. Raises BadInput if the port is taken.
    """
    files = {"/": ("text/html; charset=utf-8", page())}
    files["/plotly.min.js"] = ("text/javascript; charset=utf-8", library.plotly_file().read_bytes())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            address = urlsplit(self.path)
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in ("127.0.0.1", "localhost"):  # another site's name that leads here
                self.send_error(HTTPStatus.FORBIDDEN)
            elif address.path == "/runs.json":
                self.answer_runs(parse_qs(address.query).get("version", [""])[0])
            elif address.path in files:
                self.answer(*files[address.path])
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

        def answer_runs(self, known: str) -> None:
            told = state.told
            if known == str(told.version):
                self.send_response(HTTPStatus.NO_CONTENT)
                self.end_headers()
                return
            self.answer("application/json", told.body)
            if told.is_over:
                state.seen_end.set()

        def answer(self, kind: str, body: bytes) -> None:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Print no line for each request."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise BadInput(
            f"--port {port}: {error.strerror}; leave the option out, and a free one is taken"
        ) from None
    server.daemon_threads = True
    return server


def watch(logs: list[Path], port: int) -> int:
    """Serve the page until all runs have ended. Returns the exit status."""
    library.require_packages()
    state = State(follow(logs or [newest_log()]))
    with make_server(state, port) as server:
        serving = threading.Thread(target=server.serve_forever, daemon=True)
        serving.start()
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        names = ", ".join(shown(followed.path) for followed in state.all_followed)
        try:
            print(f"watch: {address} shows {names}; Ctrl-C ends it, and the runs go on", flush=True)
            wait_for_end(state)
        except KeyboardInterrupt:
            print("\nwatch: stopped; the runs go on", file=sys.stderr)
            return 128 + signal.SIGINT
        finally:
            server.shutdown()
    return 0


def wait_for_end(state: State) -> None:
    """Read the logs until all runs have ended, print a line for each, and let an open page fetch the end."""
    told: set[Path] = set()
    while True:
        for followed in state.all_followed:
            if followed.end is not None and followed.path not in told:
                told.add(followed.path)
                print(f"watch: {shown(followed.path)}: {last_words(followed)}", flush=True)
        if state.told.is_over:
            break
        time.sleep(POLL_SECONDS)
        state.refresh()
    state.seen_end.wait(LINGER_SECONDS)
    print("watch: no run is in progress any more", flush=True)


def last_words(followed: Followed) -> str:
    """Return how a run has ended, with its score if it has one."""
    run = followed.run
    if followed.is_scored and run.has("final_score", "val_bpb"):
        steps = run.count("final_score", "steps")
        return f"scored {run.number('final_score', 'val_bpb'):.4f} bits per byte after {steps:,} steps"
    return followed.end


# ---- command line --------------------------------------------------------------------------------


def port_number(text: str) -> int:
    """Read a port. Raises ArgumentTypeError for what is none."""
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no port: give a number up to 65535")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(
        prog="watch", description="Show runs in progress on a page of this machine, until they have ended."
    )
    top.add_argument("logs", nargs="*", metavar="LOG", help="default: the newest in logs/")
    top.add_argument("--port", type=port_number, default=0, metavar="N", help="default: a free one")
    return top


def main(argv: list[str]) -> int:
    """Watch the runs of a command line and return the exit status. Bad input is one line."""
    args = parser().parse_args(argv)
    return run_verb(lambda: watch([Path(log) for log in args.logs], args.port), tool="watch")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
