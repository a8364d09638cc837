"""The ledger: makes record folders from logs, proves, lists, compares and reproduces them.

`./run.sh record --help` lists the verbs, from VERBS.

Exit status: 0 done, or all claims hold; 1 a claim failed, or not reproduced; 2 bad input (one line says it).
Without run.sh: PYTHONPATH=tools python -m ledger.record VERB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ledger import races
from ledger.files import named_path, read_text, write_atomic
from ledger.folders import (
    find_folder,
    find_target,
    is_date,
    is_measurement,
    is_sweep,
    logs_of,
    measurement_folders,
    record_folders,
    shown,
    sweep_folders,
)
from ledger.lab_verbs import listing
from ledger.make import ladder, markdown, pictures, record_folder, scaling
from ledger.prove.challenge_claims import is_challenge_folder
from ledger.prove.claim_table import examine_challenge_folder, examine_race, examine_record
from ledger.prove.claims import Finding, Verdict
from ledger.prove.direction_claims import examine_measurement
from ledger.prove.sweep_claims import examine_sweep
from ledger.read.runlog import parse_log
from ledger.run_verb import run_verb
from ledger.show import diff
from ledger.show.board import read_submission, rewrite_board
from ledger.show.compare import print_comparison, read_samples
from ledger.show.reproduce import reproduce
from ledger.show.site import write_site
from ledger.show.track import TRACKERS, track
from ledger.tracks import TRACKS, target_of
from progress import Progress
from script import ROOT, BadInput

LONGEST_NAME = 100  # characters


# ---- new -----------------------------------------------------------------------------------------


def new(args: argparse.Namespace) -> int:
    """Make a record folder beside the ledger, examine it, and move it in only if no claim fails."""
    records = args.root / "records"
    target = new_folder(args, records)
    parent = find_folder(args.parent, records) if args.parent else None
    runs = [parse_log(Path(log)) for log in args.logs]
    notes = read_text(Path(args.notes)) if args.notes else ""

    records.mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=records))
    try:
        draft = scratch / args.track / target.name
        record_folder.build(draft, runs, submission_meta(args, parent), notes, args.root)
        refuse_failures(draft, records, args.non_record)
        target.parent.mkdir(parents=True, exist_ok=True)
        refuse_existing(target)  # another command may have made it in the meantime
        os.rename(draft, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

    print(
        f"{shown(target)}: {summary(read_submission(target))}\n"
        "next: add what changed and why below the notes line of its README.md, then ./run.sh record board"
    )
    return 0


def summary(sub: dict) -> str:
    """Return the figures of a new folder."""
    if target_of(sub["track"]):
        return f"val_loss {sub['val_loss']:.5f} after {sub['steps']:,} steps, {len(sub['seeds'])} runs"
    return f"val_bpb {sub['val_bpb']:.4f}, {len(sub['seeds'])} seeds, {sub['bytes_total']:,} bytes"


def new_folder(args: argparse.Namespace, records: Path) -> Path:
    """Return the path of a folder to be made. Raises BadInput if its name is not allowed or is taken."""
    if not is_date(args.date):
        raise BadInput(f"--date {args.date}: not a day of this century; write YYYY-MM-DD")

    name = f"{args.date}_{args.name}"
    if not record_folder.FOLDER_NAME.match(name) or len(args.name) > LONGEST_NAME:
        raise BadInput(
            f"name {args.name[:40]!r}: only letters, digits and dots, no dot first, {LONGEST_NAME} at most, "
            "as in PolarHyperball"
        )
    target = records / args.track / name
    refuse_existing(target)
    return target


def refuse_existing(target: Path) -> None:
    """Raise BadInput if a record is there."""
    if target.exists():
        raise BadInput(f"{target}: exists; records are not overwritten, choose another name or remove it")


def submission_meta(args: argparse.Namespace, parent: Path | None) -> dict[str, object]:
    """Return the keys of submission.json that no log gives."""
    return {
        "name": args.name,
        "author": markdown.one_line(args.author),
        "github_id": markdown.one_line(args.github_id),
        "date": args.date,
        "track": args.track,
        "record": not args.non_record,
        "blurb": markdown.one_line(args.blurb),
        "parent": f"{parent.parent.name}/{parent.name}" if parent else None,
    }


def refuse_failures(draft: Path, records: Path, non_record: bool) -> None:
    """Raise BadInput, after printing them, when claims of a new folder fail."""
    failed = [finding for finding in examine(draft, records) if finding.verdict == Verdict.FAIL]
    if not failed:
        return

    print("\n".join(map(line_of, failed)))
    way_out = "" if non_record else "; --non-record waives time, seeds and hardware"
    raise BadInput(f"{draft.name} is not made: {len(failed)} of its claims fail, see above{way_out}")


# ---- verify --------------------------------------------------------------------------------------


def verify(args: argparse.Namespace) -> int:
    """Examine folders and print a line per claim. Returns 1 when a claim fails."""
    records = args.root / "records"
    folders = [find_folder(text, records) for text in args.folders]
    if not folders:
        folders = record_folders(records) + measurement_folders(records) + sweep_folders(records)

    totals: Counter[Verdict] = Counter()
    with Progress("verifying") as progress:
        for folder in progress.each(folders, "folders"):
            findings = examine(folder, records)
            totals.update(finding.verdict for finding in findings)
            if args.quiet:
                findings = [finding for finding in findings if finding.verdict == Verdict.FAIL]
            if findings:
                progress.print("\n".join([shown(folder), *map(line_of, findings)]))

    counts = ", ".join(f"{totals[verdict]} {verdict}" for verdict in Verdict)
    noun = "folder" if len(folders) == 1 else "folders"
    print(f"{len(folders)} {noun}: {counts}")
    return 1 if totals[Verdict.FAIL] else 0


def examine(folder: Path, records: Path) -> list[Finding]:
    """Return the findings about a folder of any kind; a single failure if the system refuses to read it."""
    try:
        return examine_by_kind(folder, records)
    except OSError as error:
        place = Path(error.filename or "/")
        if not place.is_relative_to(folder):
            raise
        evidence = f"cannot be read ({place.name}: {error.strerror}); check the permissions"
        return [Finding(Verdict.FAIL, "readable", evidence)]


def examine_by_kind(folder: Path, records: Path) -> list[Finding]:
    """Return the findings about a folder: a measurement, a sweep, a published folder, a race or a record."""
    if is_measurement(folder):
        return examine_measurement(folder)
    if is_sweep(folder):
        return examine_sweep(folder)
    if is_challenge_folder(folder):
        return examine_challenge_folder(folder)
    examine_track = examine_race if target_of(folder.parent.name) else examine_record
    return examine_track(folder, records)


def line_of(finding: Finding) -> str:
    """Return the line of a claim: verdict, name, evidence."""
    return f"  {finding.verdict:<13} {finding.claim:<12} {finding.evidence}"


# ---- the other verbs -----------------------------------------------------------------------------


def board(args: argparse.Namespace) -> int:
    """Rewrite the tables of both README.md."""
    return rewrite_board(args.root)


def plot(args: argparse.Namespace) -> int:
    """Draw one picture of all runs of all targets, and print its path."""
    targets = [find_target(text, args.root / "records") for text in args.targets]
    if args.out is None and len(targets) > 1:
        raise BadInput("several targets: name the picture with --out FILE.png")

    out = default_picture(targets[0]) if args.out is None else args.out
    if out.suffix != ".png":
        raise BadInput(f"--out {args.out}: pictures are PNG; name it FILE.png")
    logs = [log for target in targets for log in logs_of(target)]
    pictures.plot_runs(logs, out)
    print(shown(out))
    return 0


def default_picture(target: Path) -> Path:
    """Return where the picture of a folder or a log goes."""
    return target / "loss.png" if target.is_dir() else target.with_suffix(".png")


def show_diff(args: argparse.Namespace) -> int:
    """Print what differs, or write a page with both sources side by side.

    On a terminal, the number of lines by section comes first and all of them in a pager, which opens with it.
    """
    records = args.root / "records"
    a = diff.load_side(find_target(args.a, records))
    b = diff.load_side(find_target(args.b, records))
    settings = diff.config_diff(a.config, b.config)
    sections = diff.section_diffs(a.source, b.source)
    if args.html:
        page = diff.html_diff(a.source, b.source, (args.a, args.b), [*settings, diff.diff_total(sections)])
        write_atomic(args.html, page)
        print(args.html)
        return 0

    stat = [*settings, "", *diff.source_stat(sections)]
    everything = diff.source_diff(sections)
    if args.stat:
        print("\n".join(stat))
    elif not sys.stdout.isatty():
        print("\n".join([*settings, "", *everything]))
    else:
        show_on_terminal(stat, everything)
    return 0


def show_on_terminal(stat: list[str], everything: list[str]) -> None:
    """Open the stat and, below it, the whole diff in a pager; print the stat alone if there is none."""
    colored = everything if "NO_COLOR" in os.environ else diff.colored(everything)
    if not diff.show_in_pager("\n".join([*stat, "", *colored, ""])):
        print("\n".join([*stat, "", "all changes: add `| cat`, or set PAGER"]))


def compare(args: argparse.Namespace) -> int:
    """Print t-tests between the seeds of two targets."""
    records = args.root / "records"
    a = read_samples(args.a, find_target(args.a, records))
    b = read_samples(args.b, find_target(args.b, records))
    print_comparison(a, b)
    return 0


def rewrite_study(root: Path, name: str, study: ModuleType, found: list) -> int:
    """Rewrite the tables and the picture of one page of docs/, and print the tables.

    name: the page and its picture, without their endings.
    study: the module that makes both from what it found in the ledger. No picture is drawn of nothing.
    """
    docs = root / "docs"
    page = docs / f"{name}.md"
    lines = study.lines_of(found)
    text = study.BLOCK.replaced(read_text(page), "\n".join([*lines, ""]), page)

    if found:
        study.draw(found, docs / "pictures" / f"{name}.png")
    write_atomic(page, text)
    print("\n".join(lines))
    return 0


def show_ladder(args: argparse.Namespace) -> int:
    """Rewrite and print what effects at little compute tell about more."""
    return rewrite_study(args.root, "ladder", ladder, ladder.find_ideas(args.root / "records"))


def show_scaling(args: argparse.Namespace) -> int:
    """Rewrite and print how the loss falls with compute."""
    return rewrite_study(args.root, "scaling", scaling, scaling.find_curves(args.root / "records"))


def target(args: argparse.Namespace) -> int:
    """Print how the runs of a race stand to a target loss. Returns 1 if neither rule shows it reached."""
    folders = [find_target(text, args.root / "records") for text in args.targets]
    runs = [parse_log(log) for folder in folders for log in logs_of(folder)]
    print("\n".join(races.describe_race(runs, args.loss, with_time=args.time)))
    outcome = races.outcome_of(runs, args.loss)
    return 0 if any(outcome.holds(rule) for rule in races.RULES) else 1


def loss(text: str) -> float:
    """Read a loss in nats per token. Raises ArgumentTypeError for what is none."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no loss in nats per token, as in 3.28")
    return value


def reproduce_record(args: argparse.Namespace) -> int:
    """Train a record again. Returns 1 when its score is not reproduced."""
    folder = find_folder(args.folder, args.root / "records")
    return reproduce(folder, args.root, seed=args.seed, data=args.data, dry_run=args.dry_run)


def track_logs(args: argparse.Namespace) -> int:
    """Send logs to a tracker."""
    return track([Path(log) for log in args.logs], args.to, args.dir, args.follow)


def site(args: argparse.Namespace) -> int:
    """Write the ledger as a page, and print its path and size."""
    records = args.root / "records"
    started = time.monotonic()

    def examine_folder(folder: Path) -> list[Finding]:
        return examine(folder, records)

    with Progress("site") as progress:
        page = write_site(args.root, args.out, None if args.no_verify else examine_folder, progress)
    print(f"{shown(page)}: {page.stat().st_size:,} bytes in {time.monotonic() - started:.1f} s")
    return 0


# ---- command line --------------------------------------------------------------------------------


class Argument(NamedTuple):
    """An argument of a verb, with the options of argparse's add_argument."""

    name: str
    options: dict[str, Any]


class Verb(NamedTuple):
    """A row of VERBS. help: what it does, as a clause."""

    run: Callable[[argparse.Namespace], int]
    help: str
    arguments: tuple[Argument, ...] = ()


def argument(name: str, **options: Any) -> Argument:
    """Return an argument, written as add_argument takes it."""
    return Argument(name, options)


ARGUMENTS_OF_NEW = (
    argument("name"),
    argument("--logs", nargs="+", required=True, metavar="LOG"),
    argument("--track", required=True, choices=list(TRACKS)),
    argument("--parent", metavar="FOLDER", help="the record this one starts from"),
    argument("--author", default="anonymous"),
    argument("--github-id", default=""),
    argument("--blurb", default="", help="the idea, in one sentence"),
    argument("--non-record", action="store_true", help="kept for what it shows; only the cap holds"),
    argument("--date", default=date.today().isoformat(), help="YYYY-MM-DD (default: today)"),
    argument("--notes", metavar="FILE.md", help="text to append to the README"),
)

ARGUMENTS_OF_DIFF = (
    argument("a", metavar="A"),
    argument("b", metavar="B"),
    argument("--stat", action="store_true", help="only count the lines changed in each section"),
    argument("--html", type=named_path, metavar="FILE", help="write both sources side by side as a page"),
)

ARGUMENTS_OF_REPRODUCE = (
    argument("folder", metavar="FOLDER"),
    argument("--seed", type=int, help="default: the first of the record"),
    argument("--data", metavar="DIR", help="data folder (default: the script's)"),
    argument("--dry-run", action="store_true", help="only compare the machine and print the command"),
)

ARGUMENTS_OF_TRACK = (
    argument("logs", nargs="+", metavar="LOG"),
    argument("--to", required=True, choices=list(TRACKERS)),
    argument("--dir", type=named_path, required=True, metavar="DIR", help="where the tracker keeps them"),
    argument("--follow", action="store_true", help="until each run is over"),
)

VERBS = {
    "new": Verb(new, "make a record folder from finished logs, one per seed", ARGUMENTS_OF_NEW),
    "verify": Verb(
        verify,
        "prove every claim of the folders",
        (
            argument("folders", nargs="*", metavar="FOLDER", help="default: all"),
            argument("--quiet", action="store_true", help="print only failed claims and a summary"),
        ),
    ),
    "board": Verb(board, "rewrite the tables of README.md and records/README.md"),
    "plot": Verb(
        plot,
        "draw loss curves of logs or folders, finished or not",
        (
            argument("targets", nargs="+", metavar="TARGET"),
            argument("--out", type=named_path, metavar="FILE.png"),
        ),
    ),
    "diff": Verb(show_diff, "show what differs between two folders, logs or scripts", ARGUMENTS_OF_DIFF),
    "compare": Verb(
        compare,
        "test whether the seeds of B are better than those of A",
        (argument("a", metavar="A"), argument("b", metavar="B")),
    ),
    "ladder": Verb(show_ladder, "show what effects at little compute tell about more, in docs/ladder.md"),
    "scaling": Verb(show_scaling, "show loss against compute over depths, and its law, in docs/scaling.md"),
    "target": Verb(
        target,
        "hold the runs of a race against a target loss",
        (
            argument("targets", nargs="+", metavar="TARGET", help="a folder of logs, or logs"),
            argument("--loss", required=True, type=loss, metavar="L", help="nats per token"),
            argument("--time", action="store_true", help="also mean and spread of the training time"),
        ),
    ),
    "reproduce": Verb(reproduce_record, "run a record again and compare the scores", ARGUMENTS_OF_REPRODUCE),
    "track": Verb(track_logs, "send the figures of logs to a tracker", ARGUMENTS_OF_TRACK),
    "site": Verb(
        site,
        "write the whole ledger as one page that needs no network",
        (
            argument(
                "--out", type=named_path, required=True, metavar="DIR", help="the page is DIR/index.html"
            ),
            argument(
                "--no-verify",
                action="store_true",
                help="prove no claim, which takes most of the time; none is marked",
            ),
        ),
    ),
}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(
        prog="record",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--root", type=Path, default=ROOT, help="repository (default: this one)")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        description = f"{verb.help[0].upper()}{verb.help[1:]}."
        added = verbs.add_parser(name, help=verb.help, description=description)
        added.set_defaults(run=verb.run)
        for each in verb.arguments:
            added.add_argument(each.name, **each.options)
    return top


def run(args: argparse.Namespace) -> int:
    """Run the verb of a command line. Raises BadInput if there is no repository."""
    if not args.root.is_dir():
        raise BadInput(f"--root {args.root}: no such folder; give the folder of a repository")
    return args.run(args)


def main(argv: list[str]) -> int:
    """Run a verb and return the exit status. An error the user can fix is printed as one line."""
    args = parser().parse_args(argv)
    args.root = args.root.resolve()
    return run_verb(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
