"""Paths: blanks and other scripts, links, files for folders, names that escape, empty and long names."""

from tests.stress.hostile_cases.case import (
    Case,
    Group,
    copied,
    data,
    evaluate,
    folder,
    lab,
    linked,
    moved,
    pipe,
    record,
    removed,
    run_sh,
    scoring,
    shell,
    text,
    train,
    with_huge,
    written,
)

# Root without the right to ignore a file's mode.
UNPRIVILEGED = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
READ_ONLY_FOLDER = 'chmod 555 out; "$@"'
UNREADABLE = 'chmod 000 "$0"; exec "$@"'
ODD = "d\u00e4 ta [1] *\u65e5\u672c"
NOT_UTF8 = "caf\udce9"  # a byte that is no UTF-8
OUTPUT = ("out", "out/*")


def new(name: str, root: str = "repo", **options: str) -> tuple[str, ...]:
    """Return the command that makes a record of the logs of the record that is there."""
    logs = [f"repo/logs_Base/run{seed}.txt" for seed in (42, 1337, 2025)]
    words = ["new", name, "--logs", *logs]
    for key, value in ({"track": "track_h100x1_5min", "date": "2026-11-23"} | options).items():
        words += [f"--{key}", value]
    return lab("--root", root, *words)


TRAIN = (
    Case("blanks and Unicode in out_dir", train("out_dir=a b/\u65e5 \u672c"), status=0, leaves=("a b*",)),
    Case(
        "blanks, Unicode and wildcards in data_path",
        train(f"data_path={ODD}"),
        status=0,
        setup=(moved("data", ODD),),
        leaves=OUTPUT,
    ),
    Case(
        "data_path is a link",
        train("data_path=link"),
        status=0,
        setup=(linked("link", "data"),),
        leaves=OUTPUT,
    ),
    Case(
        "data_path is not UTF-8",
        train(f"data_path={NOT_UTF8}"),
        status=0,
        setup=(moved("data", NOT_UTF8),),
        leaves=OUTPUT,
    ),
    Case("out_dir is not UTF-8", train(f"out_dir={NOT_UTF8}"), status=0, leaves=("caf*",)),
    Case("data_path is missing", train("data_path=gone"), ("gone", "no such data folder")),
    Case("data_path is a dangling link", train("data_path=link"), ("link",), setup=(linked("link", "gone"),)),
    Case("data_path is a file", train("data_path=data/manifest.json"), ("manifest.json", "data_path=DIR")),
    Case("data_path is empty", train("data_path="), ("data_path",)),
    Case("data_path is a link to itself", train("data_path=l"), ("l: ",), setup=(linked("l", "l"),)),
    Case("data_path holds a line break", train("data_path=a\nb"), ("data_path", "control characters")),
    Case("out_dir is a file", train("out_dir=data/manifest.json"), ("manifest.json", "out_dir")),
    Case("out_dir lies below a file", train("out_dir=data/manifest.json/x"), ("manifest.json", "out_dir")),
    Case("out_dir is empty", train("out_dir="), status=0, leaves=("run.*",)),
    Case("out_dir is 300 characters", train(f"out_dir={'o' * 300}"), ("File name too long", "out_dir")),
    Case("out_dir is 5000 characters", train("out_dir=" + "o/" * 2500), ("out_dir", "more than 4000")),
    Case(
        "out_dir may not be written",
        shell(READ_ONLY_FOLDER, *train()),
        ("out/run.txt", "Permission denied", "out_dir"),
        setup=(folder("out"),),
        under=UNPRIVILEGED,
        leaves=("out",),
    ),
    Case(
        "out_dir is a dangling link",
        train(),
        ("out/run.txt", "out_dir"),
        setup=(linked("out", "gone/away"),),
    ),
    Case(
        "the log is a dangling link",
        train(),
        ("out/run.txt", "run_id"),
        setup=(linked("out/run.txt", "/nope/run.txt"),),
    ),
    Case("the log is a folder", train(), ("out/run.txt", "run_id"), setup=(folder("out/run.txt"),)),
    Case("the log is a pipe", train("resume=auto"), ("out/run.txt", "pipe"), setup=(pipe("out/run.txt"),)),
    Case(
        "the artifact is there and its log is not",
        train(),
        ("out/run.int6.xz", "exists", "run_id"),
        setup=(copied("run/run.int6.xz", "out/run.int6.xz"),),
    ),
    Case(
        "a pipe stands where the artifact is written first",
        train(),
        ("final_score",),
        0,
        setup=(pipe("out/run.int6.xz.tmp"),),
        leaves=(*OUTPUT,),
    ),
    Case(
        "a link stands where the artifact is written first",
        train(),
        ("final_score",),
        0,
        setup=(written("precious", "x"), linked("out/run.int6.xz.tmp", "../precious")),
        leaves=OUTPUT,
    ),
    Case(
        "data_path may be entered and not listed",
        shell('chmod 311 data; exec "$@"', *train()),
        ("data: cannot list", "Permission denied"),
        under=UNPRIVILEGED,
        leaves=("data",),
    ),
    Case(
        "data_path may not be entered",
        shell(UNREADABLE.replace("$0", "data"), *train()),
        ("data", "Permission denied"),
        under=UNPRIVILEGED,
        leaves=("data",),
    ),
    Case(
        "the manifest may not be read",
        shell(UNREADABLE.replace("$0", "data/manifest.json"), *train()),
        ("data/manifest.json", "Permission denied"),
        under=UNPRIVILEGED,
        leaves=("data/manifest.json",),
    ),
    Case(
        "a shard is huge",
        with_huge("data/tiny_train_000009.bin", train("tokenizer_path=data/tokenizer.model")),
        ("data/tiny_train_000009.bin", "not a token shard"),
        setup=(removed("data/manifest.json"),),
    ),
    Case(
        "the manifest is huge",
        with_huge("data/manifest.json", train()),
        ("data/manifest.json", "again"),
        leaves=("data/manifest.json",),
    ),
    Case("the manifest is a pipe", train(), ("data/manifest.json",), setup=(pipe("data/manifest.json"),)),
    Case(
        "a folder stands where the artifact goes",
        train(),
        ("out/run.int6.xz", "exists", "run_id"),
        setup=(folder("out/run.int6.xz"),),
    ),
    Case(
        "a folder stands where the artifact of a resumed run goes",
        shell('"$@"; status=$?; rm -r "$TMPDIR"/run.int6.xz.*; exit $status', *train("resume=auto")),
        status=1,
        lines=0,
        says=("artifact file:", "run.int6.xz.", "cannot be written"),
        setup=(folder("out/run.int6.xz"),),
        leaves=OUTPUT,
    ),
    Case("run_id escapes", train("run_id=../x"), ("run_id", "'../x'", "begin with")),
    Case("run_id is absolute", train("run_id=/tmp/x"), ("run_id", "'/tmp/x'", "begin with")),
    Case("run_id is a dot", train("run_id=."), ("run_id", "begin with")),
    Case("run_id is an option", train("run_id=--x"), ("run_id", "begin with")),
    Case("run_id has a line break", train("run_id=a\nb"), ("run_id", "control characters")),
    Case("run_id ends in a blank", train("run_id=a "), ("run_id", "begin with")),
    Case("run_id is 300 characters", train("run_id=" + "r" * 300), ("run_id", "at most 200 bytes")),
    Case("run_id is not UTF-8", train(f"run_id={NOT_UTF8}"), ("run_id", "begin with")),
    Case("run_id is in Unicode", train("run_id=\u00e9\u65e5"), status=0, leaves=OUTPUT),
    Case(
        "a shard may not be read",
        shell(UNREADABLE.replace("$0", "data/tiny_val_000000.bin"), *train()),
        ("tiny_val_000000.bin", "Permission denied"),
        under=UNPRIVILEGED,
        leaves=("data/tiny_val_000000.bin",),
    ),
    Case(
        "a shard is a folder",
        train(),
        ("data/tiny_val_000000.bin",),
        setup=(folder("data/tiny_val_000000.bin"),),
    ),
    Case(
        "a shard is a dangling link",
        train(),
        ("data/tiny_train_000001.bin",),
        setup=(linked("data/tiny_train_000001.bin", "gone"),),
    ),
    Case(
        "a shard is a pipe",
        shell('rm data/tiny_val_000000.bin; mkfifo data/tiny_val_000000.bin; exec "$@"', *train()),
        ("data/tiny_val_000000.bin",),
        leaves=("data/tiny_val_000000.bin",),
    ),
    Case(
        "a shard is a pipe, without a manifest",
        shell(
            'rm data/tiny_val_000000.bin; mkfifo data/tiny_val_000000.bin; exec "$@"',
            *train("tokenizer_path=data/tokenizer.model"),
        ),
        ("data/tiny_val_000000.bin",),
        setup=(removed("data/manifest.json"),),
        leaves=("data/tiny_val_000000.bin",),
    ),
    Case("the manifest is a folder", train(), ("data/manifest.json",), setup=(folder("data/manifest.json"),)),
    Case(
        "the manifest is a dangling link",
        train(),
        ("data", "tokenizer_path=FILE"),
        setup=(linked("data/manifest.json", "gone"),),
    ),
    Case(
        "tokenizer_path is missing",
        train("tokenizer_path=gone.model"),
        ("gone.model", "tokenizer_path=FILE"),
    ),
    Case("tokenizer_path is a folder", train("tokenizer_path=docs"), ("docs", "tokenizer_path=FILE")),
    Case("resume names a missing file", train("resume=gone.step1.0of1.ckpt"), ("gone.step1", "resume=auto")),
    Case("resume names a folder", train("resume=run"), ("resume", "run", "resume=auto")),
    Case("resume names a log", train("resume=run/run.txt"), ("run/run.txt", "resume=auto")),
)

ARTIFACTS = (
    Case(
        "an artifact with blanks in its path",
        evaluate("a b/\u65e5.int6.xz"),
        ("eval_score",),
        status=0,
        setup=(copied("run/run.int6.xz", "a b/\u65e5.int6.xz"),),
        leaves=OUTPUT,
    ),
    Case(
        "the artifact is missing", evaluate("gone.int6.xz"), ("gone.int6.xz", "name a file that train wrote")
    ),
    Case("the artifact is a folder", evaluate("run"), ("run", "name a file that train wrote")),
    Case(
        "the artifact is a pipe",
        shell('mkfifo pipe; exec "$@"', *evaluate("pipe")),
        ("pipe", "name a file that train wrote"),
        leaves=("pipe",),
    ),
    Case(
        "the artifact is huge",
        with_huge("huge.int6.xz", evaluate("huge.int6.xz")),
        ("huge.int6.xz", "artifact"),
    ),
    Case("the artifact is /dev/null", evaluate("/dev/null"), ("/dev/null",)),
    Case(
        "the artifact is endless",
        shell('ulimit -v 40000000; exec "$@"', *evaluate("/dev/zero")),
        ("/dev/zero", "name a file that train wrote"),
    ),
    Case(
        "the log of eval is there", evaluate("run/run.int6.xz", "out_dir=run", "run_id=run"), ("run/run.txt",)
    ),
    Case("eval's run_id escapes", evaluate("run/run.int6.xz", "run_id=../x"), ("run_id", "begin with")),
    Case("run.sh: no artifact", run_sh("eval", "gone.int6.xz"), ("gone.int6.xz", "train writes them")),
    Case("run.sh: the artifact is a folder", run_sh("audit", "run"), ("no artifact at run",)),
    Case("run.sh: the artifact's name is empty", run_sh("eval", ""), ("eval", "artifact")),
    Case("run.sh: no script", run_sh("audit", "run/run.int6.xz", "--script", "gone.py"), ("gone.py",)),
    Case("run.sh: the script is a folder", run_sh("bench", "--script", "run"), ("'run'", "--script")),
    Case(
        "run.sh: the artifact is there",
        run_sh("train", "run_id=run", "out_dir=run"),
        ("run_id=run", "resume"),
    ),
    Case(
        "run.sh from another folder",
        shell(
            'cd docs && exec "$@"',
            *run_sh("eval", "../a b/x.xz", *scoring("data_path=../data", "out_dir=../out")),
        ),
        ("eval_score",),
        status=0,
        setup=(copied("run/run.int6.xz", "a b/x.xz"),),
        leaves=OUTPUT,
    ),
    Case(
        "run.sh by a link with a blank",
        shell('ln -s "$1" "a b"; shift; ./a\\ b "$@"', *run_sh("config", "seed=7")),
        ("seed: 7",),
        status=0,
        leaves=("a b",),
    ),
    Case(
        "run.sh in a folder that is gone",
        shell('mkdir d && cd d && rmdir ../d && "$@"', *run_sh("config", "seed=7")),
        ("the current folder is gone", "change to"),
        lines=0,
    ),
)

TEXTS = (
    Case(
        "blanks and Unicode in --out",
        text("--name", "toy", out="a b/\u65e5"),
        status=0,
        leaves=("a b*",),
    ),
    Case("--out lies below a file", text(out="docs/val.txt/made"), ("docs/val.txt",)),
    Case("--out is a file", text(out="docs/val.txt"), ("docs/val.txt",)),
    Case(
        "--out is a dangling link",
        text(out="link"),
        ("link",),
        setup=(linked("link", "gone/away"),),
    ),
    Case("--out is empty", text(out=""), ("--out", "is empty")),
    Case("--out is 300 characters", text("--name", "x", out="o" * 300), ("file name too long",)),
    Case("--name escapes", text("--name", "../x"), ("--name", "use letters")),
    Case("--name is empty", text("--name", ""), ("--name", "use letters")),
    Case("--name is 300 characters", text("--name", "n" * 300), ("--name",)),
    Case("--split escapes", text("--split", "../x=docs/other.txt"), ("--split", "lower-case")),
    Case("an input is a folder", text(val="docs.txt"), ("docs.txt",), setup=(folder("docs.txt"),)),
    Case("an input is missing", text(val="gone.txt"), ("gone.txt", "no such file")),
    Case(
        "an input is a dangling link",
        text(val="link.txt"),
        ("link.txt", "no such file"),
        setup=(linked("link.txt", "gone"),),
    ),
    Case(
        "an input is a pipe",
        shell('mkfifo p.txt; exec "$@"', *text(val="p.txt")),
        ("p.txt",),
        leaves=("p.txt",),
    ),
    Case(
        "an input has a line break in its name",
        text(val="a\nb.txt"),
        ("no such file",),
    ),
    Case(
        "an input may not be read",
        shell(UNREADABLE.replace("$0", "docs/val.txt"), *text()),
        ("docs/val.txt", "permission denied"),
        under=UNPRIVILEGED,
        leaves=("docs/val.txt",),
    ),
    Case("--tokenizer is a folder", text(tokenizer="docs"), ("docs", "give a file")),
    Case("--tokenizer is empty", text(tokenizer=""), ("--tokenizer",)),
    Case("verify of a missing folder", data("verify", "gone"), ("gone", "give a folder"), status=1),
    Case("data verify of a file", data("verify", "docs/val.txt"), ("docs/val.txt",), status=1),
    Case("data verify of an empty name", data("verify", ""), ("DIR", "is empty")),
    Case(
        "verify by a link in Unicode",
        data("verify", "\u65e5"),
        ("ok, ",),
        status=0,
        setup=(linked("\u65e5", "data"),),
    ),
    Case(
        "verify of a name that is not UTF-8",
        data("verify", NOT_UTF8),
        ("ok, ",),
        status=0,
        setup=(moved("data", NOT_UTF8),),
    ),
)

RECORDS = (
    Case("a name escapes", new("../x"), ("'../x'", "only letters")),
    Case("a name is empty", new(""), ("name ''", "only letters")),
    Case("a name is 300 characters", new("n" * 300), ("name",)),
    Case("a record is there", new("Base", date="2026-11-22"), ("exists", "choose another name")),
    Case("the notes are missing", new("X", notes="gone.md"), ("gone.md",)),
    Case("the notes are a folder", new("X", notes="docs"), ("docs",)),
    Case("a parent is missing", new("X", parent="gone"), ("gone", "no such folder")),
    Case("a parent escapes", new("X", parent="../../docs"), ("claims fail",)),
    Case("a log is a folder", record("new", "X", "--logs", "docs", "--track", "track_cpu"), ("docs",)),
    Case("a log is missing", record("plot", "gone.txt"), ("gone.txt", "no such folder")),
    Case("a log is a dangling link", record("compare", "l", "l"), ("l: ",), setup=(linked("l", "gone"),)),
    Case("verify of a file", record("verify", "docs/val.txt"), ("docs/val.txt", "no such folder")),
    Case("verify of an empty name", record("verify", ""), ("no such folder",)),
    Case("--root is missing", lab("--root", "gone", "board"), ("gone",)),
    Case("--root is a file", lab("--root", "docs/val.txt", "board"), ("docs/val.txt",)),
    Case("--root is missing for verify", lab("--root", "gone", "verify"), ("gone",)),
    Case("plot --out in a missing folder", record("plot", "Base", "--out", "gone/x.png"), ("gone/x.png",)),
    Case("plot --out below a file", record("plot", "Base", "--out", "docs/val.txt/x.png"), ("docs/val.txt",)),
    Case("plot --out is a folder", record("plot", "Base", "--out", "docs"), ("docs",)),
    Case("plot --out of no format", record("plot", "Base", "--out", "x.nope"), ("x.nope",)),
    Case("diff --html in a missing folder", record("diff", "Base", "Base", "--html", "gone/x"), ("gone/x",)),
    Case(
        "sweep --out is a file",
        lab("sweep", "--row", "a", "--rates", "0.1", "--out", "docs/val.txt"),
        ("docs",),
    ),
    Case("a sweep's plan is missing", lab("sweep", "gone.json"), ("gone.json",)),
    Case("a sweep's folder is not one", lab("sweep", "docs"), ("docs",)),
    Case("a sweep's plan is no JSON", lab("sweep", "p.json"), ("p.json",), setup=(written("p.json", "{"),)),
)

GROUP = Group("paths", ("docs", "data", "run", "repo"), (*TRAIN, *ARTIFACTS, *TEXTS, *RECORDS))
