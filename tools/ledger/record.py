"""The ledger: makes record folders from logs, proves them, lists them, compares and reproduces them.

    ./run.sh record new NAME --logs LOG... --track TRACK      make records/TRACK/DATE_NAME/ from finished logs
    ./run.sh record verify [FOLDER...]                        prove every claim of the folders (default: all)
    ./run.sh record board                                     rewrite the tables of both README.md
    ./run.sh record plot TARGET... [--out FILE]               loss curves of logs or folders
    ./run.sh record diff A B [--html FILE]                    config first, then source by section
    ./run.sh record compare A B                               t-tests between two sets of seeds
    ./run.sh record reproduce FOLDER [--seed S] [--data DIR]  run it again, compare with the recorded figures
    ./run.sh record directions [key=value...]                 time and quality of ORTHO and STEP_RULES, here
    ./run.sh record wire [--ranks N] [key=value...]           count an optimizer step's bytes, predict their time
    ./run.sh record sweep PLAN [key=value...] [--workers N]   train many configurations, tabulate them

Exit status: 0 done, or all claims hold; 1 a claim failed, or not reproduced; 2 bad input (one line says it).
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ledger import checks
from ledger import direction_log
from ledger import foreign
from ledger import stats
from ledger import sweep_table
from ledger import views
from ledger.runlog import BadInput, Run, parse_log, read_text, same, sha256

HERE = Path(__file__).resolve().parent


def find_folder(text: str, records: Path) -> Path:
    """A record folder from a path, `track/folder`, the folder's name or its part after the date.

    BadInput when there is none, or when two have that name.
    """
    name = Path(text).name
    exact = [path.resolve() for path in (Path(text), records / text) if path.is_dir()]
    folders = all_folders(records) + sweep_table.all_sweeps(records)
    found = exact[:1] or [path for path in folders if name in (path.name, path.name[11:])]
    if len(found) > 1:
        listed = ", ".join(f"{path.parent.name}/{path.name}" for path in found)
        raise BadInput(f"{text}: more than one folder: {listed}")
    if not found:
        raise BadInput(f"{text}: no such folder; give its path or TRACK/NAME as listed in records/README.md")
    return found[0]


def target_path(text: str, records: Path) -> Path:
    """A file as it is, else a record folder."""
    return Path(text) if Path(text).exists() else find_folder(text, records)


def all_folders(records: Path) -> list[Path]:
    """Every record folder of the ledger, by track and date."""
    return sorted(path for path in records.glob("track_*/[!.]*") if path.is_dir())


# ---- new -----------------------------------------------------------------------------------------

def pins(root: Path, run: Run) -> list[str]:
    """numpy and sentencepiece as the repository pins them, and FlashAttention-4 where the run used it."""
    names = ["requirements.txt"] + ["requirements-flash4.txt"] * checks.uses_flash4(run)
    lines = [line for name in names if (root / name).exists() for line in read_text(root / name).splitlines()]
    return [line.strip() for line in lines if re.match(r"(numpy|sentencepiece|flash-attn-4\[cu13\])==", line)]


def build(place: Path, runs: list[Run], meta: dict, notes: str, root: Path) -> None:
    """Writes every file of a record folder into `place`, a new folder. BadInput when the logs disagree."""
    same(runs, "source", lambda run: sha256(run.source)[:16])
    answer = checks.probe(runs[0].source, runs[0].preset)
    if "error" in answer:
        raise BadInput(f"{runs[0].path}: the script at its head does not import: {answer['error']}")
    texts = checks.contents(runs, meta, answer)
    texts["requirements.txt"] = checks.requirements(runs[0], pins(root, runs[0]))
    texts["README.md"] += f"\n{notes}" if notes else ""
    (place / "logs").mkdir(parents=True)
    for name, text in texts.items():
        (place / name).write_bytes(text.encode("utf-8"))
    views.plot_runs(sorted((place / "logs").glob("*.txt")), place / "loss.png")


def verb_new(args: argparse.Namespace, root: Path) -> int:
    """Builds the folder beside the ledger, examines it, and only then moves it in."""
    records, name = root / "records", f"{args.date}_{args.name}"
    try:
        date.fromisoformat(args.date)
    except ValueError:
        raise BadInput(f"--date {args.date}: not a date; write YYYY-MM-DD") from None
    if not checks.FOLDER_NAME.match(name):
        raise BadInput(f"name {args.name!r}: only letters, digits and dots, as in PolarHyperball")
    target = records / args.track / name
    if target.exists():
        raise BadInput(f"{target}: exists; records are not overwritten, choose another name or remove it")
    parent = find_folder(args.parent, records) if args.parent else None
    runs = [parse_log(Path(log)) for log in args.logs]
    meta = {"name": args.name, "author": args.author, "github_id": args.github_id, "date": args.date,
            "track": args.track, "record": not args.non_record, "blurb": " ".join(args.blurb.split()),
            "parent": f"{parent.parent.name}/{parent.name}" if parent else None}
    notes = read_text(Path(args.notes)) if args.notes else ""
    records.mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=records))
    try:
        place = scratch / args.track / name
        build(place, runs, meta, notes, root)
        fails = [row for row in checks.examine(place, records) if row[0] == "fail"]
        if fails:
            print_rows(fails)
            way_out = "" if args.non_record else "; --non-record waives time, seeds and hardware"
            raise BadInput(f"{name} is not made: {len(fails)} of its claims fail, see above{way_out}")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(place, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sub = json.loads(read_text(target / "submission.json"))
    print(f"{shown(target)}: val_bpb {sub['val_bpb']:.4f}, {len(sub['seeds'])} seeds, "
          f"{sub['bytes_total']:,} bytes\n"
          "next: add what changed and why below the notes line of its README.md, then ./run.sh record board")
    return 0


def shown(path: Path) -> str:
    """The path as the user would type it: relative when it lies below here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


# ---- verify --------------------------------------------------------------------------------------

def print_rows(rows: list[tuple[str, str, str]]) -> None:
    """One line per claim: status, name, evidence."""
    for status, claim, evidence in rows:
        print(f"  {status:<13} {claim:<12} {evidence}")


def verb_verify(args: argparse.Namespace, root: Path) -> int:
    """Examines folders; exit status 1 when a claim fails."""
    records = root / "records"
    folders = [find_folder(text, records) for text in args.folders] or \
        all_folders(records) + direction_log.folders(records) + sweep_table.all_sweeps(records)
    totals = {"ok": 0, "fail": 0, "not checkable": 0}
    for folder in folders:
        if direction_log.is_measurement(folder):
            rows = direction_log.examine(folder)
        elif sweep_table.is_sweep(folder):
            rows = sweep_table.examine(folder)
        else:
            rows = foreign.examine(folder) if foreign.is_foreign(folder) else checks.examine(folder, records)
        for status, _, _ in rows:
            totals[status] += 1
        rows = [row for row in rows if row[0] == "fail"] if args.quiet else rows
        if rows:
            print(shown(folder))
            print_rows(rows)
    print(f"{len(folders)} folder{'s' * (len(folders) != 1)}: {totals['ok']} ok, {totals['fail']} fail, "
          f"{totals['not checkable']} not checkable")
    return 1 if totals["fail"] else 0


# ---- board ---------------------------------------------------------------------------------------

START, END = "<!-- board:start -->", "<!-- board:end -->"
SWEEPS = "<!-- sweeps:start -->", "<!-- sweeps:end -->"


def cell(text: object) -> str:
    """Text inside a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def table(subs: list[dict], link: str, limit: int | None = None) -> list[str]:
    """Rows by bpb, best first; `link` is the path from the page to records/."""
    lines = ["| # | val_bpb | std | val_loss | seeds | bytes | what | date | by |",
             "|---:|---:|---:|---:|---:|---:|---|---|---|"]
    best_first = sorted(subs, key=lambda sub: (sub["val_bpb"], sub["date"], sub["name"]))
    for rank, sub in enumerate(best_first[:limit], 1):
        spread = "-" if sub["val_bpb_std"] is None else f"{sub['val_bpb_std']:.5f}"
        folder = f"{link}{sub['track']}/{sub['date']}_{sub['name']}"
        what = f"[{sub['name']}]({folder}/)" + (f": {cell(sub['blurb'])}" if sub["blurb"] else "")
        lines.append(f"| {rank} | {sub['val_bpb']:.4f} | {spread} | {sub['val_loss']:.4f} | "
                     f"{len(sub['seeds'])} | {sub['bytes_total']:,} | {what} | {sub['date']} | "
                     f"{cell(sub['author'])} |")
    return lines


def board_text(subs: list[dict], link: str, short: bool) -> str:
    """The tables of one page: by track the ten best records, or (not short) all records and non-records."""
    lines: list[str] = []
    for track, rules in checks.TRACKS.items():
        here = [sub for sub in subs if sub["track"] == track]
        best, rest = [sub for sub in here if sub["record"]], [sub for sub in here if not sub["record"]]
        if best or (rest and not short):
            lines += [f"**{track}** ({rules.title})", ""]
        if best:
            lines += [*table(best, link, 10 if short else None), ""]
        if rest and not short:
            lines += ["Non-records:", "", *table(rest, link), ""]
    if not lines:
        lines = ["No records yet.", ""]
    elif not short and any(sub["record"] for sub in subs):
        lines += ["![records over time](history.png)", ""]
    return "\n".join(lines)


def with_board(page: Path, text: str, old: str | None = None, markers: tuple[str, str] = (START, END)) -> str:
    """The page (or `old`, its text so far) with what stands between the markers replaced.

    BadInput when a marker is missing or the pair is out of order.
    """
    old, (start, end) = read_text(page) if old is None else old, markers
    if old.count(start) != 1 or old.count(end) != 1 or old.index(start) > old.index(end):
        raise BadInput(f"{page}: needs the line {start} and below it {end}, once each, around the table")
    return f"{old[:old.index(start)]}{start}\n{text}{old[old.index(end):]}"


def verb_board(args: argparse.Namespace, root: Path) -> int:
    """Rewrites both pages and the history picture; all pages are read before one is written."""
    records, subs = root / "records", []
    for folder in all_folders(records):
        path = folder / "submission.json"
        try:
            sub = json.loads(read_text(path))
        except ValueError as error:
            raise BadInput(f"{path}: not JSON ({error})") from None
        if errors := checks.schema_errors(sub, checks.schema()):
            raise BadInput(f"{path}: {errors[0]}; ./run.sh record verify {folder.name} says more")
        subs.append(sub)
    pages = {root / "README.md": board_text(subs, "records/", True),
             records / "README.md": board_text(subs, "", False)}
    texts = {page: with_board(page, text) for page, text in pages.items()}
    texts[records / "README.md"] = direction_log.with_block(texts[records / "README.md"], records)
    sweeps, ledger = sweep_table.all_sweeps(records), records / "README.md"
    if sweeps or SWEEPS[0] in texts[ledger]:
        texts[ledger] = with_board(ledger, sweep_table.board(records), texts[ledger], SWEEPS)
    winners = [sub for sub in subs if sub["record"]]
    by_track = {track: [sub for sub in winners if sub["track"] == track]
                for track in checks.TRACKS if any(sub["track"] == track for sub in winners)}
    if by_track:
        views.plot_history(by_track, records / "history.png")
    for page, text in texts.items():
        views.write_atomic(page, text)
    print(f"{len(subs)} folders, {len(winners)} records, {len(sweeps)} sweeps: README.md and "
          "records/README.md rewritten")
    return 0


# ---- plot, diff ----------------------------------------------------------------------------------

def verb_plot(args: argparse.Namespace, root: Path) -> int:
    """One picture of all runs of all targets."""
    targets = [target_path(text, root / "records") for text in args.targets]
    if args.out is None and len(targets) > 1:
        raise BadInput("several targets: name the picture with --out FILE.png")
    first = targets[0]
    out = Path(args.out) if args.out else first / "loss.png" if first.is_dir() else first.with_suffix(".png")
    views.plot_runs([log for target in targets for log in views.logs_of(target)], out)
    print(shown(out))
    return 0


def verb_diff(args: argparse.Namespace, root: Path) -> int:
    """Settings first, then source by section; or a page with both sources side by side."""
    sides = [target_path(text, root / "records") for text in (args.a, args.b)]
    (config_a, a), (config_b, b) = map(views.load_side, sides)
    head = views.config_diff(config_a, config_b)
    lines = views.source_diff(a, b)
    if args.html:
        views.write_atomic(Path(args.html), views.html_diff(a, b, args.a, args.b, head + lines[:1]))
        print(args.html)
        return 0
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print("\n".join(head + [""] + (views.colored(lines) if color else lines)))
    return 0


# ---- compare -------------------------------------------------------------------------------------

BAR_NATS, BAR_P = 0.005, 0.01           # the challenge: better by at least 0.005 nats, shown at p < 0.01


def samples(target: Path) -> dict[int, dict[str, float]]:
    """By seed: val_bpb, val_loss (nats per token) and step_avg (ms) of finished logs."""
    out: dict[int, dict[str, float]] = {}
    for log in views.logs_of(target):
        run = parse_log(log)
        train_ms, steps = run.number("final_score", "train_time"), run.number("final_score", "steps")
        if run.seed in out:
            raise BadInput(f"{log}: seed {run.seed} is in two logs of {target}")
        scores = {key: run.number("final_score", key) for key in ("val_bpb", "val_loss")}
        out[run.seed] = {**scores, "step_avg": train_ms / max(steps, 1)}
    return out


def verb_compare(args: argparse.Namespace, root: Path) -> int:
    """Both tests on three figures, then the challenge's bar on val_loss."""
    a, b = (samples(target_path(text, root / "records")) for text in (args.a, args.b))
    common = sorted(set(a) & set(b))

    def column(side: dict, key: str, seeds: list[int] | None = None) -> list[float]:
        return [side[seed][key] for seed in (seeds or sorted(side))]

    print(f"A {args.a}: {len(a)} seeds\nB {args.b}: {len(b)} seeds, {len(common)} shared\n")
    print(f"{'':<10} {'A mean':>10} {'std':>8} {'B mean':>10} {'std':>8}   {'test':<7} {'B - A':>9} "
          f"{'95 % interval':>20} {'p':>8}")
    for key, unit in (("val_bpb", "bpb"), ("val_loss", "nats"), ("step_avg", "ms")):
        tests = {"welch": stats.welch(column(a, key), column(b, key)),
                 "paired": stats.paired(column(a, key, common), column(b, key, common)) if common else None}
        ends = ""
        for side in (a, b):
            spread = stats.std(column(side, key))
            ends += f" {stats.mean(column(side, key)):>10.4f} {'-' if spread is None else f'{spread:.4f}':>8}"
        for i, (name, test) in enumerate(tests.items()):
            head = f"{key:<10}{ends}" if i == 0 else " " * (10 + len(ends))
            if test is None:
                what = "shared seeds" if name == "paired" else "seeds on each side"
                print(f"{head}   {name:<7} needs two {what}")
                continue
            low, high = test.interval()
            span = f"[{low:+.4f}, {high:+.4f}]"
            print(f"{head}   {name:<7} {test.diff:>+9.4f} {span:>20} {test.p_two_sided():>8.2g} {unit}")
    test = stats.welch(column(a, "val_loss"), column(b, "val_loss"))
    if test is None:
        print("\nbar: not checkable, Welch's test needs two seeds on each side")
        return 0
    p = test.p_less(-BAR_NATS)
    met = "yes" if p < BAR_P else "no"
    print(f"\nbar (B better by >= {BAR_NATS} nats at p < {BAR_P}, one-sided Welch): {met}, "
          f"{-test.diff:+.4f} nats better, p {p:.2g}; for any gain at all p {test.p_less():.2g}")
    return 0


# ---- reproduce -----------------------------------------------------------------------------------

def local_hardware(wanted: str) -> str:
    """`<count> x <name>` of this machine as a log would say it, with no more devices than `wanted` uses."""
    try:
        names = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
                               capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        names = []
    ranks = int(wanted.split(" x ")[0])
    if not names:
        return f"{ranks} x {platform.processor() or platform.machine()}"
    return f"{min(len(names), ranks)} x {names[0].strip()}"


def environment(sub: dict, data: Path) -> list[tuple[str, str, str]]:
    """(what, recorded, here) of everything that may explain a different result; the data come last."""
    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    manifest = data / "manifest.json"
    found = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else "none"
    return [("python", sub["python_version"], sys.version.split()[0]),
            ("torch", sub["pytorch_version"], version("torch")),
            ("hardware", sub["hardware"], local_hardware(sub["hardware"])),
            ("data", sub["data_manifest_sha256"], found)]


def run_command(argv: list[str], root: Path) -> str:
    """Runs it and passes its output through; the final_score line. BadInput when it fails or prints none."""
    launcher = [sys.executable] + ["-m", "torch.distributed.run"] * (argv[0] == "torchrun")
    found = ""
    with subprocess.Popen(launcher + argv[1:], cwd=root, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            found = line.strip() if line.startswith("final_score ") else found
    if process.returncode or not found:
        raise BadInput(f"not reproduced: the command ended with status {process.returncode} and "
                       f"{'a' if found else 'no'} final_score line")
    return found


def verb_reproduce(args: argparse.Namespace, root: Path) -> int:
    """Compares machine and data with the record, trains again, and compares the score."""
    folder = find_folder(args.folder, root / "records")
    sub = json.loads(read_text(folder / "submission.json"))
    if errors := checks.schema_errors(sub, checks.schema()):
        raise BadInput(f"{folder / 'submission.json'}: {errors[0]}")
    run = parse_log(views.logs_of(folder)[0])
    answer = checks.probe(read_text(folder / "train_gpt.py"), run.preset)
    if "error" in answer:
        raise BadInput(f"{folder / 'train_gpt.py'}: does not import here: {answer['error']}")
    data = Path(args.data).resolve() if args.data else root / answer["config"].get("data_path", "data")
    here = environment(sub, data)
    for what, recorded, found in here:
        equal = "same" if recorded == found else "differs"
        print(f"  {equal:<8} {what:<9} recorded {recorded}, here {found}")
    seed = sub["seeds"][0] if args.seed is None else args.seed
    argv = checks.command(run, answer, str(folder / "train_gpt.py"), seed)
    argv = [f"data_path={data}" if part == "data_path=DIR" else part for part in argv]
    if args.data and not any(part.startswith("data_path=") for part in argv):
        argv.append(f"data_path={data}")
    print(shlex.join(argv), flush=True)
    if args.dry_run:
        return 0
    if here[-1][1] not in (here[-1][2], "none"):
        raise BadInput(f"not reproduced: {data} is not the data of the record; --data names a folder whose "
                       f"manifest.json has sha256 {here[-1][1]}")
    bpb = float(run_command(argv, root).split("val_bpb:")[1].split()[0])
    spread = sub["val_bpb_std"]
    reach, why = (3 * spread, "3 std") if spread is not None else (0.003, "one seed recorded, no std")
    gap = bpb - sub["val_bpb"]
    told = (f"val_bpb {bpb:.5f}, recorded {sub['val_bpb']:.5f}, difference {gap:+.5f}, "
            f"allowed {reach:.5f} ({why})")
    print(f"reproduced: {told}" if abs(gap) <= reach else f"not reproduced: {told}")
    return 0 if abs(gap) <= reach else 1


# ---- directions ----------------------------------------------------------------------------------

def verb_directions(args: argparse.Namespace, root: Path) -> int:
    """tools/lab/directions.py; torch is imported only here."""
    from lab import directions
    return directions.run(args, root)


# ---- wire ----------------------------------------------------------------------------------------

def verb_wire(args: argparse.Namespace, root: Path) -> int:
    """tools/lab/wire.py; torch is imported only here."""
    from lab import wire
    return wire.run(args, root)


# ---- sweep ---------------------------------------------------------------------------------------

def verb_sweep(args: argparse.Namespace, root: Path) -> int:
    """Trains; the only verb that needs torch in this process."""
    from lab import sweep
    return sweep.command(args)


# ---- command line --------------------------------------------------------------------------------

def parser() -> argparse.ArgumentParser:
    """The command line."""
    main_parser = argparse.ArgumentParser(prog="record", description=__doc__.split("\n\n")[0],
                                          formatter_class=argparse.RawDescriptionHelpFormatter)
    main_parser.add_argument("--root", type=Path, default=HERE.parents[1], help="repository (default: this one)")
    verbs = main_parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text)

    new = verb("new", "make a record folder from finished logs, one per seed")
    new.add_argument("name")
    new.add_argument("--logs", nargs="+", required=True, metavar="LOG")
    new.add_argument("--track", required=True, choices=list(checks.TRACKS))
    new.add_argument("--parent", metavar="FOLDER", help="the record this one starts from")
    new.add_argument("--author", default="anonymous")
    new.add_argument("--github-id", default="")
    new.add_argument("--blurb", default="", help="one sentence: the idea")
    new.add_argument("--non-record", action="store_true", help="kept for what it shows; only the cap holds")
    new.add_argument("--date", default=date.today().isoformat(), help="YYYY-MM-DD (default: today)")
    new.add_argument("--notes", metavar="FILE.md", help="text appended to the README")
    verify = verb("verify", "prove every claim of record folders")
    verify.add_argument("folders", nargs="*", metavar="FOLDER", help="default: all")
    verify.add_argument("--quiet", action="store_true", help="only failed claims and a summary")
    verb("board", "rewrite the tables of README.md and records/README.md")
    plot = verb("plot", "loss curves of logs or folders, finished or not")
    plot.add_argument("targets", nargs="+", metavar="TARGET")
    plot.add_argument("--out", metavar="FILE.png")
    diff = verb("diff", "what differs between two folders, logs or scripts")
    diff.add_argument("a", metavar="A")
    diff.add_argument("b", metavar="B")
    diff.add_argument("--html", metavar="FILE", help="side by side, as a page")
    compare = verb("compare", "t-tests between two folders of seeds: is B better than A")
    compare.add_argument("a", metavar="A")
    compare.add_argument("b", metavar="B")
    reproduce = verb("reproduce", "run a record again and compare")
    reproduce.add_argument("folder", metavar="FOLDER")
    reproduce.add_argument("--seed", type=int, help="default: the first of the record")
    reproduce.add_argument("--data", metavar="DIR", help="data folder (default: the script's)")
    reproduce.add_argument("--dry-run", action="store_true", help="only check and print the command")
    directions = verb("directions", "measure the directions and step rules of train_gpt.py on this machine")
    direction_log.arguments(directions)
    sweep = verb("sweep", "train rows of settings at several rates and seeds, and tabulate them")
    sweep.add_argument("words", nargs="*", metavar="PLAN.json|FOLDER|key=value",
                       help="a plan, or a finished sweep to tabulate again; settings of all rows")
    sweep.add_argument("--row", action="append", default=[], metavar="NAME:key=value,...",
                       help="one more row")
    sweep.add_argument("--key", help="the knob that rates are values of (default: matrix_lr)")
    sweep.add_argument("--rates", metavar="X,Y,...", help="values to try")
    sweep.add_argument("--multipliers", metavar="X,Y,...", help="instead: factors of a row's own value")
    sweep.add_argument("--seeds", metavar="S,T,...", help="the first one chooses the rate (default: 1337)")
    sweep.add_argument("--workers", type=int, default=1, metavar="N", help="processes, each with its GPU")
    sweep.add_argument("--budget", type=float, default=0.0, metavar="SECONDS",
                       help="begin nothing that would end later (default: no limit)")
    sweep.add_argument("--out", metavar="DIR", help="logs and tables (default: logs/sweeps/PLAN)")
    sweep.add_argument("--sliding", action="store_true", help="score with the preset's stride, too (slow)")
    wire = verb("wire", "count what one optimizer step puts on the wire, and predict what of it is seen")
    wire.add_argument("words", nargs="*", metavar="key=value", help="knobs of Config: ortho=mud ...")
    wire.add_argument("--ranks", type=int, default=8, metavar="N", help="processes (default: 8)")
    wire.add_argument("--nodes", type=int, default=1, metavar="M", help="that they lie on (default: 1)")
    wire.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE",
                      help="another figure for the prediction; the output lists them")
    wire.add_argument("--script", type=Path, metavar="PATH", help="default: the repository's train_gpt.py")
    wire.add_argument("--out", type=Path, metavar="FILE.md", help="write the tables there, too")
    return main_parser


VERBS = {"new": verb_new, "verify": verb_verify, "board": verb_board, "plot": verb_plot, "diff": verb_diff,
         "compare": verb_compare, "reproduce": verb_reproduce, "directions": verb_directions,
         "wire": verb_wire, "sweep": verb_sweep}


def main(argv: list[str]) -> int:
    """Runs a verb; what a user can mend is said in one line. Returns the exit status."""
    reader = parser()
    args, rest = reader.parse_known_args(argv)
    if rest and (args.verb not in ("sweep", "wire") or any(word.startswith("-") for word in rest)):
        reader.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.words += rest                              # argparse takes key=value only in front of options
    try:
        status = VERBS[args.verb](args, args.root.resolve())
        sys.stdout.flush()
        return status
    except BadInput as error:
        print(f"record: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:                             # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
