"""Disks: full, read-only or with a limit on file sizes, at the log, the artifact, checkpoints and shards."""

import os

from tests.stress.hostile_cases.case import (
    TRAINER,
    WITH_SAFETENSORS,
    Case,
    Group,
    data,
    evaluate,
    export,
    lab,
    linked,
    record,
    run_sh,
    shell,
    text,
    train,
    written,
)
from tests.stress.hostile_cases.paths import OUTPUT, new

HEAD = os.path.getsize(TRAINER) // 1024  # KiB of a log's head, which is the script


def small_disk(path: str, kib: int) -> tuple[str, ...]:
    """Return a program that runs a command with a disk of its own at a path, then lists what is there."""
    script = f'mkdir -p {path} && mount -t tmpfs -o size={kib}k none {path} && "$@"; status=$?; '
    script += f'echo "there: $(ls -A {path} | tr "\\n" " ")"; exit $status'
    return ("unshare", "-m", "bash", "-c", script, "-")


def read_only(path: str) -> tuple[str, ...]:
    """Return a program that runs a command with a read-only disk at a path."""
    script = f'mkdir -p {path} && mount -t tmpfs -o ro none {path} && exec "$@"'
    return ("unshare", "-m", "bash", "-c", script, "-")


def at_most(size: int) -> tuple[str, ...]:
    """Return a program that runs a command whose files may have at most `size` bytes."""
    return ("prlimit", f"--fsize={size}")


FULL = "No space left on device"
TOO_LARGE = "File too large"
LOG = ("out", "out/run.txt")
ELSEWHERE = '"$@"; status=$?; rm -rf "$TMPDIR"/run.*; exit $status'  # a log or artifact that moved

CASES = (
    Case(
        "the log is a link to a full disk",
        train("resume=auto"),
        ("out/run.txt", FULL, "free space"),
        setup=(linked("out/run.txt", "/dev/full"),),
    ),
    Case(
        "no room for the log's head",
        train(),
        ("out/run.txt", FULL, "free space"),
        under=small_disk("out", 64),
        leaves=("out",),
    ),
    Case(
        "no room for a line of the log",
        train("iterations=100000", "train_log_every=1"),
        ("out/run.txt", FULL, "free space"),
        under=small_disk("out", HEAD + 20),
        leaves=("out",),
    ),
    Case(
        "a log of limited size",
        train("iterations=100000", "train_log_every=1"),
        ("out/run.txt", TOO_LARGE),
        under=at_most(1024 * (HEAD + 20)),
        leaves=LOG,
    ),
    Case(
        "no room for the artifact",
        shell(ELSEWHERE, *train()),
        ("artifact file:", "cannot be written"),
        1,
        under=small_disk("out", HEAD + 16),
        lines=0,
        leaves=("out",),
    ),
    Case(
        "no room for checkpoints",
        train("checkpoint_every=1e-6"),
        ("checkpoint step:", "failed:", FULL, "score: val_bpb"),
        0,
        under=small_disk("out", HEAD + 80),
        leaves=("out",),
    ),
    Case(
        "a read-only disk",
        train(),
        ("out/run.txt", "Read-only file system", "out_dir"),
        under=read_only("out"),
        leaves=("out",),
    ),
    Case(
        "a read-only disk for eval",
        evaluate("run/run.int6.xz"),
        ("out/scored.txt", "Read-only file system"),
        under=read_only("out"),
        leaves=("out",),
    ),
    Case(
        "no room for the log of eval",
        evaluate("run/run.int6.xz"),
        ("out/scored.txt", FULL),
        under=small_disk("out", 64),
        leaves=("out",),
    ),
    Case(
        "read-only data",
        train(),
        ("final_score",),
        0,
        under=read_only("elsewhere"),
        leaves=("elsewhere", *OUTPUT),
    ),
    Case(
        "run.sh: no room for the log",
        run_sh(*train("out_dir=out")[2:]),
        ("out/run.txt", FULL),
        lines=0,
        under=small_disk("out", 64),
        leaves=("out",),
    ),
    Case(
        "data text: no room for shards",
        text(),
        ("made", "no space left", "free some space"),
        under=small_disk("made", 16),
        lines=0,
        leaves=("made",),
    ),
    Case(
        "data text: no room for the tokenizer",
        text(),
        ("made", "no space left", "free some space"),
        under=small_disk("made", 4),
        lines=0,
        leaves=("made",),
    ),
    Case(
        "data text: a read-only disk",
        text(),
        ("made", "read-only file system"),
        under=read_only("made"),
        leaves=("made",),
    ),
    Case(
        "data text: shards of limited size",
        text(),
        ("made", "file too large", "--shard-tokens"),
        under=at_most(9000),
        lines=0,
    ),
    *(
        Case(
            f"export: no room in {kib} KiB",
            export("made/x"),
            ("made/", "No space left"),
            under=(*WITH_SAFETENSORS, *small_disk("made", kib)),
            leaves=("made",),
        )
        for kib in (60, 140)  # for the weights; for what follows them
    ),
    Case(
        "export: a read-only disk",
        export("made/x"),
        ("made/", "Read-only"),
        under=(*WITH_SAFETENSORS, *read_only("made")),
        leaves=("made",),
    ),
    Case(
        "data offline: no room",
        data("offline", "--out", "made/x"),
        ("made", "no space left", "free some space"),
        under=small_disk("made", 100),
        lines=0,
        leaves=("made",),
        seconds=240,
    ),
    Case(
        "record plot: no room",
        record("plot", "Base", "--out", "made/x.png"),
        ("made/x.png", FULL),
        under=small_disk("made", 8),
        leaves=("made",),
    ),
    Case("record plot: a full disk", record("plot", "Base", "--out", "/dev/full/x.png"), ("/dev/full",)),
    Case(
        "record diff --html: no room",
        record("diff", "a.py", "Base", "--html", "made/x.html"),
        ("made/x.html", FULL),
        setup=(written("a.py", "print(1)\n" * 3000),),
        under=small_disk("made", 16),
        leaves=("made",),
    ),
    Case(
        "record new: no room",
        shell('cp -r repo/* made/; exec "$@"', *new("X", root="made")),
        ("No space left",),
        under=small_disk("made", 260),
        leaves=("made",),
    ),
    Case("record new: files of limited size", new("X"), ("X", TOO_LARGE), under=at_most(20_000)),
    Case("record board: files of limited size", record("board"), ("repo", TOO_LARGE), under=at_most(300)),
    Case(
        "record board: a read-only disk",
        lab("--root", "made", "board"),
        ("made",),
        under=read_only("made"),
        leaves=("made",),
    ),
    Case(
        "sweep: a read-only disk",
        lab("sweep", "--row", "a", "--rates", "0.1", "preset=cpu", "--out", "made/x"),
        ("made/x", "Read-only"),
        under=read_only("made"),
        leaves=("made",),
    ),
)

GROUP = Group("disks", ("docs", "data", "run", "repo"), CASES)
