"""The ledger: folders of garbage, empty and binary logs, edited figures, wrong types, unknown tracks."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.stress.hostile_cases.case import (
    Case,
    Group,
    copied,
    cut,
    edited,
    folder,
    lab,
    pipe,
    record,
    removed,
    replaced,
    shell,
    with_huge,
    written,
)
from tests.stress.hostile_cases.paths import UNPRIVILEGED, UNREADABLE, new

TRACK = "repo/records/track_h100x1_5min"
BASE = f"{TRACK}/2026-11-22_Base"
LOG = f"{BASE}/logs/seed42.txt"
SUBMISSION = f"{BASE}/submission.json"
INPUT = "repo/logs_Base/run42.txt"
SCALING_PAGE = "<!-- scaling:start -->\n<!-- scaling:end -->\n"
VERBS = (("verify",), ("plot",), ("compare",), ("diff",), ("reproduce", "--dry-run"))


def key(name: str, value: object) -> Callable[[Path], None]:
    """Return a setup that sets a key of submission.json."""
    return edited(SUBMISSION, lambda blob: json.dumps({**json.loads(blob), name: value}).encode())


def without(name: str) -> Callable[[Path], None]:
    """Return a setup that removes a key of submission.json."""

    def change(blob: bytes) -> bytes:
        kept = json.loads(blob)
        del kept[name]
        return json.dumps(kept).encode()

    return edited(SUBMISSION, change)


def end_of(path: str, old: str, new_text: str) -> Callable[[Path], None]:
    """Return a setup that replaces the last `old` in a file, which must be there."""

    def change(blob: bytes) -> bytes:
        before, found, after = blob.decode().rpartition(old)
        assert found, f"{old!r} is not in {path}"
        return f"{before}{new_text}{after}".encode()

    return edited(path, change)


# Logs that no record can be made of: what is wrong, the setup of one of three, what `new` and `compare` say.
LOGS = (
    ("empty", written(INPUT), ("run42.txt", "not a training log")),
    ("binary", written(INPUT, bytes(range(256)) * 40), ("run42.txt", "not UTF-8")),
    ("of NUL", written(INPUT, b"\0" * 5000), ("run42.txt", "not a training log")),
    ("of text", copied("docs/val.txt", INPUT), ("run42.txt", "not a training log")),
    ("cut in its source", edited(INPUT, cut(900)), ("run42.txt", "not a training log")),
    ("without final_score", end_of(INPUT, "final_score ", "final_store "), ("run42.txt", "final_score")),
    ("with a loss of nan", end_of(INPUT, "val_loss:2.", "val_loss:nan 2."), ("run42.txt",)),
    ("with a seed of words", end_of(INPUT, " seed:42 ", " seed:x "), ("run42.txt", "seed")),
    ("with a negative seed", end_of(INPUT, " seed:42 ", " seed:-42 "), ("run42.txt", "seed")),
    ("with a seed twice", end_of(INPUT, " seed:42 ", " seed:1337 "), ("1337",)),
    (
        "with a size of 5000 digits",
        end_of(INPUT, " bytes_total:", " bytes_total:" + "9" * 5000),
        ("claims fail",),
    ),
    ("with steps of infinity", end_of(INPUT, " steps:1500", " steps:inf"), ("run42.txt", "steps")),
    (
        "with a resumed line of no step",
        edited(INPUT, lambda blob: blob + b"resumed step:x \n"),
        ("run42.txt", "resumed"),
    ),
    ("that is a folder", folder(INPUT), ("run42.txt",)),
)
LAST_DAY = "9999-12-31"  # after which a picture has no room


def author_is(wanted: str) -> Callable[[Path], str | None]:
    """Return a check that the record X has this author."""

    def check(here: Path) -> str | None:
        found = json.loads((here / TRACK / "2026-11-23_X/submission.json").read_text())["author"]
        return None if found == wanted else f"the author is {found!r}"

    return check


def moved_to(day: str) -> Callable[[Path], None]:
    """Return a setup that gives the record another day."""

    def setup(here: Path) -> None:
        key("date", day)(here)
        (here / BASE).rename(here / TRACK / f"{day}_Base")

    return setup


NO_GZIP = written("x.txt.gz", b"\x1f\x8b\x08\0garbage")

# Folders that do not verify: what is wrong, the setup, what verify says.
FAILURES = (
    (
        "the curve is edited",
        edited(LOG, replaced("step:500/20000 val_loss:", "step:500/20000 val_loss:1")),
        (),
    ),
    ("the score is edited", end_of(LOG, "val_bpb:1", "val_bpb:0"), ()),
    ("a log is empty", written(LOG), ("seed42.txt",)),
    ("a log is binary", written(LOG, b"\xff\0" * 99), ("seed42.txt", "not UTF-8")),
    ("a log is cut", edited(LOG, cut(-400)), ("seed42.txt",)),
    ("a log is missing", removed(LOG), ()),
    ("all logs are missing", removed(f"{BASE}/logs"), ()),
    ("a log is a folder", folder(LOG), ()),
    ("submission.json is missing", removed(SUBMISSION), ("submission.json",)),
    ("submission.json is empty", written(SUBMISSION), ("submission.json",)),
    ("submission.json is a list", written(SUBMISSION, "[]"), ()),
    ("submission.json is deep", written(SUBMISSION, "[" * 100_000), ("submission.json",)),
    ("submission.json is binary", written(SUBMISSION, b"\xff\xfe\0"), ("submission.json",)),
    ("submission.json is a folder", folder(SUBMISSION), ("submission.json",)),
    ("val_bpb is a string", key("val_bpb", "1.2"), ("val_bpb",)),
    ("val_bpb is null", key("val_bpb", None), ("val_bpb",)),
    ("val_bpb is nan", key("val_bpb", float("nan")), ("val_bpb",)),
    ("seeds is a number", key("seeds", 42), ("seeds",)),
    ("seeds is empty", key("seeds", []), ("seeds",)),
    ("seed_results is a list", key("seed_results", []), ("seed_results",)),
    ("seed_results is of words", key("seed_results", {"x": 1}), ("seed_results",)),
    ("track is another", key("track", "track_cpu"), ("track",)),
    ("track is none of ours", key("track", "track_moon"), ("track",)),
    ("track escapes", key("track", "../.."), ("track",)),
    ("track is a list", key("track", ["track_cpu"]), ("track",)),
    ("parent is missing", key("parent", "track_cpu/2026-01-01_Gone"), ("Gone",)),
    ("parent escapes", key("parent", "../../docs"), ("docs",)),
    ("date is a number", key("date", 20261122), ("date",)),
    ("blurb is a number", key("blurb", 5), ("blurb",)),
    ("bytes_total is huge", key("bytes_total", 10**40), ("bytes_total",)),
    ("no key seeds", without("seeds"), ("seeds",)),
    ("a key too many", key("more", 1), ("more",)),
    ("the script is empty", written(f"{BASE}/train_gpt.py"), ()),
    ("the script is binary", written(f"{BASE}/train_gpt.py", b"\xff\0"), ()),
    ("the script exits", written(f"{BASE}/train_gpt.py", "raise SystemExit(0)"), ()),
    ("config.json is a list", written(f"{BASE}/config.json", "[]"), ()),
    ("artifact.sha256 is binary", written(f"{BASE}/artifact.sha256", b"\xff"), ()),
    ("the folder is empty", removed(f"{BASE}/*"), ()),
)

GARBAGE = (
    written("g/a.bin", b"\0\1"),
    written("g/logs/x.txt", b"\xff\xfe"),
    written("g/submission.json", "5"),
)


def cases() -> tuple[Case, ...]:
    """Return the cases of the tables above."""
    made = []
    for name, setup, says in LOGS:
        made.append(Case(f"new: a log {name}", new("X"), says, setup=(setup,), lines=0))
        if "twice" not in name and "5000" not in name:  # it does not compare bytes
            made.append(
                Case(f"compare: a log {name}", record("compare", INPUT, "Base"), says, setup=(setup,))
            )
    made += [
        Case(f"verify: {name}", record("verify"), ("fail", *says), 1, setup=(setup,), lines=0)
        for name, setup, says in FAILURES
    ]
    for verb, *options in VERBS:
        words = ["g", "g"] if verb in ("compare", "diff") else ["g"]
        status = 1 if verb == "verify" else 2
        lines = 0 if verb == "verify" else 1
        made.append(
            Case(
                f"{verb} of garbage",
                record(verb, *words, *options),
                ("g",),
                status,
                setup=GARBAGE,
                lines=lines,
            )
        )
        if verb != "verify":
            empty = [word.replace("g", "e") for word in words]
            made.append(
                Case(
                    f"{verb} of an empty folder", record(verb, *empty, *options), ("e",), setup=(folder("e"),)
                )
            )
    return tuple(made)


# A folder of the ledger that may not be read, the verb that meets it, and the words of it.
# verify goes on with the other folders; what needs all of them refuses, and writes nothing.
PERMISSIONS = (
    (BASE, ("verify",), ("readable", "Permission denied", "2 folders")),
    (f"{BASE}/logs", ("verify",), ("fail", "logs", "2 folders")),
    (TRACK, ("verify",), ("readable", "Permission denied", "2 folders")),
    (BASE, ("board",), ("2026-11-22_Base", "Permission denied")),
    (TRACK, ("board",), (TRACK, "Permission denied")),
    (TRACK, ("scaling",), (TRACK, "Permission denied")),
    (f"{BASE}/logs", ("scaling",), (f"{BASE}/logs", "Permission denied")),
    (f"{BASE}/logs", ("compare", "Base", "Base"), (f"{BASE}/logs", "Permission denied")),
)


def unreadable_folders() -> tuple[Case, ...]:
    """Return a case for each row of PERMISSIONS, beside a sweep that may be read."""
    return tuple(
        Case(
            f"{words[0]}: {Path(place).name} may not be read",
            shell(UNREADABLE.replace("$0", place), *record(*words)),
            says,
            1 if words[0] == "verify" else 2,
            setup=(written("repo/records/sweeps/toy/log.txt"), written("repo/docs/scaling.md", SCALING_PAGE)),
            under=UNPRIVILEGED,
            leaves=(place, f"{place}/*"),
            lines=0 if words[0] == "verify" else 1,
        )
        for place, words, says in PERMISSIONS
    )


OTHERS = (
    *unreadable_folders(),
    Case("no verb", record(), ("VERB",), lines=0),
    Case("an unknown verb", record("fly"), ("fly",), lines=0),
    Case("new of an unknown track", new("X", track="track_moon"), ("track_moon", "track_cpu"), lines=0),
    Case("new of a track that escapes", new("X", track="../.."), ("--track", "track_cpu"), lines=0),
    Case(
        "new of another track's time",
        new("X", track="track_10min_16mb"),
        ("claims fail", "--non-record"),
        lines=0,
    ),
    Case("new of a day after all others", new("X", date=LAST_DAY), (f"--date {LAST_DAY}", "YYYY-MM-DD")),
    Case("new of a day without dashes", new("X", date="20261123"), ("--date 20261123", "YYYY-MM-DD")),
    Case(
        "board of a day after all others", record("board"), (LAST_DAY, "century"), setup=(moved_to(LAST_DAY),)
    ),
    Case(
        "verify of a day after all others",
        record("verify"),
        ("century",),
        1,
        setup=(moved_to(LAST_DAY),),
        lines=0,
    ),
    Case(
        "new of an author who sends codes to the terminal",
        new("X", author="a\x1b[31m\u202eb"),
        status=0,
        leaves=("repo/records/*",),
        holds=author_is("a [31m b"),
    ),
    Case(
        "the name of a log sends codes to the terminal",
        record("plot", "a\x1b]0;b\x07.txt"),
        ("a\\x1b]0;b\\x07.txt",),
        setup=(written("a\x1b]0;b\x07.txt"),),
    ),
    Case(
        "new of a log that is a pipe",
        record("new", "X", "--logs", "p", "--track", "track_cpu"),
        ("p: ",),
        setup=(pipe("p"),),
    ),
    Case(
        "new of a log that is endless",
        record("new", "X", "--logs", "/dev/zero", "--track", "track_cpu"),
        ("/dev/zero", "not a file"),
    ),
    Case(
        "new of notes that are a pipe",
        new("X", notes="p"),
        status=0,
        setup=(pipe("p"),),
        leaves=("repo/records/*",),
    ),
    Case("verify: a log is a pipe", record("verify"), ("fail", "seed42.txt"), 1, setup=(pipe(LOG),), lines=0),
    Case(
        "verify: submission.json is a pipe",
        record("verify"),
        ("fail",),
        1,
        setup=(pipe(SUBMISSION),),
        lines=0,
    ),
    Case("a log is huge", with_huge("huge.txt", record("plot", "huge.txt")), ("huge.txt", "more than")),
    Case(
        "a gzip log is a bomb",
        shell(
            "ulimit -v 1200000; head -c 1G /dev/zero | gzip -1 >x.txt.gz; "
            '"$@"; status=$?; rm x*; exit $status',
            *record("plot", "x.txt.gz"),
        ),
        ("x.txt.gz", "more than"),
    ),
    Case(
        "two commands make the same record",
        shell(
            '"$@" >/dev/null 2>&1 & "$@" 2>err; first=$?; wait $!; echo $((first + $?)); cat err >&2; exit 0',
            *new("X"),
        ),
        ("2",),
        0,
        leaves=("repo/records/*", "err"),
    ),
    Case(
        "diff --html to a pipe",
        shell('cat p & "$@"; status=$?; wait; exit $status', *record("diff", LOG, "Base", "--html", "p")),
        ("<html",),
        0,
        setup=(pipe("p"),),
        seconds=20,
    ),
    Case("new of no date", new("X", date="yesterday"), ("--date yesterday", "YYYY-MM-DD")),
    Case("new of a date that is none", new("X", date="2026-02-30"), ("--date 2026-02-30", "YYYY-MM-DD")),
    Case(
        "new of an author with a line break",
        new("X", author="a\nb"),
        status=0,
        leaves=("repo/records/*",),
    ),
    Case(
        "new of the same log twice",
        record("new", "X", "--logs", INPUT, INPUT, "--track", "track_cpu"),
        ("42",),
        lines=0,
    ),
    Case(
        "board with a damaged record",
        record("board"),
        ("submission.json",),
        setup=(written(SUBMISSION, "{"),),
    ),
    Case("board with an empty record", record("board"), ("submission.json",), setup=(removed(f"{BASE}/*"),)),
    Case(
        "board without its markers",
        record("board"),
        ("repo/README.md",),
        setup=(written("repo/README.md", "# x\n"),),
    ),
    Case(
        "board with a page that is binary",
        record("board"),
        ("README.md", "not UTF-8"),
        setup=(written("repo/records/README.md", b"\xff"),),
    ),
    Case("board without pages", record("board"), ("README.md",), setup=(removed("repo/README.md"),)),
    Case("a gzip log is garbage", record("plot", "x.txt.gz"), ("x.txt.gz",), setup=(NO_GZIP,)),
    Case(
        "diff of binary scripts",
        record("diff", "a.py", "Base"),
        ("a.py", "not UTF-8"),
        setup=(written("a.py", b"\xff"),),
    ),
    Case("diff of empty scripts", record("diff", "a.py", "Base"), ("source:",), 0, setup=(written("a.py"),)),
    Case("reproduce with a seed of words", record("reproduce", "Base", "--seed", "x"), ("--seed",), lines=0),
    Case(
        "reproduce on other data", record("reproduce", "Base", "--data", "docs"), ("docs", "--data"), lines=0
    ),
    Case("plot of several targets", record("plot", "Base", INPUT), ("--out FILE.png",)),
    Case(
        "a sweep's table is garbage",
        record("verify"),
        ("fail",),
        1,
        setup=(written("repo/records/sweeps/2026-11-22_X/table.json", "[5]"),),
        lines=0,
    ),
    Case(
        "a sweep's table is binary",
        record("board"),
        ("table.json",),
        setup=(written("repo/records/sweeps/2026-11-22_X/table.json", b"\xff"),),
    ),
    Case(
        "a sweep folder is empty",
        record("verify"),
        ("fail",),
        1,
        setup=(folder("repo/records/sweeps/2026-11-22_X"),),
        lines=0,
    ),
    Case(
        "a sweep's folder of binary logs",
        lab("sweep", "s"),
        ("s",),
        setup=(written("s/logs/a.txt", b"\xff"), written("s/table.json", "{}")),
    ),
    Case(
        "a measurement is garbage",
        record("verify"),
        ("fail",),
        1,
        setup=(written("repo/records/directions/2026-11-22_cpu/log.txt", b"\xff\0"),),
        lines=0,
    ),
    Case(
        "a measurement is empty",
        record("board"),
        (),
        2,
        setup=(folder("repo/records/directions/2026-11-22_cpu"),),
    ),
    Case(
        "a track folder is a file",
        record("verify"),
        status=0,
        setup=(written("repo/records/track_cpu", "x"),),
    ),
    Case(
        "a record's name is odd",
        record("verify"),
        ("fail",),
        1,
        setup=(written(f"{TRACK}/\u00e9 \n x/a", "x"),),
        lines=0,
    ),
)

GROUP = Group("ledger", ("docs", "repo"), (*cases(), *OTHERS))
