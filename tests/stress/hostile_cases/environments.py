"""Environments: no HOME, ASCII consoles, closed and full streams, no network, few files, wrong variables."""

from pathlib import Path

from tests.helpers import ROOT
from tests.stress.hostile_cases.case import (
    PYTHON,
    TRAINER,
    Case,
    Group,
    config,
    data,
    evaluate,
    lab,
    linked,
    moved,
    record,
    run_sh,
    shell,
    text,
    train,
    written,
)
from tests.stress.hostile_cases.paths import OUTPUT, new

ASCII = {
    "LANG": "C",
    "LC_ALL": "C",
    "PYTHONIOENCODING": "ascii",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
}
NO_HOME = {"HOME": None, "XDG_CACHE_HOME": None, "MPLCONFIGDIR": None}
NO_NETWORK = ("unshare", "-n")
ONLY_LOOPBACK = ("unshare", "-n", "bash", "-c", 'ip link set lo up && exec "$@"', "-")
CLOSED = 'exec "$@" >&-'
TO_FULL_DISK = 'exec "$@" >/dev/full'
HEAD = '"$@" | head -n 1'
CLONE = 'mkdir -p clone/tools; cd "$0"; cp run.sh requirements.txt train_gpt.py "$OLDPWD/clone"; '
CLONE += 'cp tools/*.py "$OLDPWD/clone/tools"; cd "$OLDPWD"; exec "$@"'

# A folder of the caller's with modules named like ours.
OWN_MODULES = tuple(
    written(f"{name}.py", "raise SystemExit('a module of the caller was imported')")
    for name in ("script", "lab", "ledger", "torch", "numpy", "shards", "audit", "train_gpt")
)
SWEEP = (
    *("sweep", "--row", "a", "--rates", "0.02", "--out", "swept", "data_path=data"),
    *("preset=cpu", "iterations=2", "vocab_size=1"),
)


def clone(*words: str) -> tuple[str, ...]:
    """Return a command of run.sh in a copy of it that has no .venv."""
    return ("bash", "-c", CLONE, str(ROOT), "clone/run.sh", *words)


# Python without docstrings, and programs that print theirs.
BARE = {"PYTHONOPTIMIZE": "2"}
HELPED = (
    ("train_gpt.py", (PYTHON, TRAINER, "--help"), "usage: train_gpt.py"),
    ("audit", (PYTHON, str(ROOT / "tools/audit.py"), "--help"), "usage: audit.py"),
    ("sample", (PYTHON, "-m", "use.sample", "--help"), "usage: sample.py"),
    ("record", record("--help"), "usage: record"),
    ("data", data("--help"), "usage: data"),
    ("run.sh", run_sh("--help"), "usage: ./run.sh"),
)
TOOLS = {"PYTHONPATH": str(ROOT / "tools")}

# Each is imported as Python starts and changes the system's clock for the program.
BACK = "import time; t = iter(range(10**9, 0, -3600)); time.time = lambda: float(next(t))"
FIXED = "import time; time.time = lambda: {0}; g = time.gmtime; time.gmtime = lambda: g({0})"
CLOCKS = (
    ("set back an hour at each look", BACK),
    ("at 1970", FIXED.format(0.0)),
    ("past the year 9999", FIXED.format(3e11)),
)

CASES = (
    *(
        Case(f"python -OO: help of {name}", command, (says,), 0, env=BARE | TOOLS)
        for name, command, says in HELPED
    ),
    Case("python -OO: train", train(), ("final_score",), 0, env=BARE, leaves=OUTPUT),
    Case(
        "CDPATH has a folder of the repository's name",
        shell("mkdir -p other/link; CDPATH=$PWD/other:$PWD exec bash link/run.sh config seed=7"),
        ("seed: 7",),
        0,
        setup=(linked("link", str(ROOT)),),
        leaves=("other*",),
    ),
    Case("PYTHONHOME is missing", run_sh("config", "seed=7"), ("seed: 7",), 0, env={"PYTHONHOME": "/nope"}),
    Case(
        "MPLBACKEND is a word",
        record("plot", "Base"),
        status=0,
        env={"MPLBACKEND": "nonsense"},
        leaves=("*/loss.png",),
    ),
    Case(
        "a matplotlibrc that is no text",
        record("plot", "Base"),
        ("matplotlib", "check the file matplotlibrc"),
        lines=2,
        setup=(written("matplotlibrc", b"\xff"),),
    ),
    Case(
        "no such network interface",
        train(),
        ("nope9", "GLOO_SOCKET_IFNAME"),
        env={"GLOO_SOCKET_IFNAME": "nope9"},
    ),
    Case(
        "download from an address that is none",
        data("download", "--out", "made"),
        ("hub", "not a url"),
        3,
        env={"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "not a url"},
        lines=0,
    ),
    *(
        Case(
            f"the clock is {name}: train",
            train("checkpoint_every=1e-6", "run_id="),
            ("final_score",),
            0,
            setup=(written("clock/sitecustomize.py", source),),
            env={"PYTHONPATH": "clock"},
            leaves=("out", "out/*"),
        )
        for name, source in CLOCKS
    ),
    Case("train without HOME", train(), status=0, env=NO_HOME, leaves=OUTPUT),
    Case("train with a HOME that is missing", train(), status=0, env={"HOME": "/nope"}, leaves=OUTPUT),
    Case("plot without HOME", record("plot", "Base"), status=0, env=NO_HOME, leaves=("*/loss.png",)),
    Case(
        "plot with a HOME that is a file",
        record("plot", "Base"),
        status=0,
        env={"HOME": "/dev/null"},
        leaves=("*/loss.png",),
    ),
    Case(
        "train on an ASCII console",
        train("data_path=d\u00e4ta", "out_dir=\u00f6ut"),
        status=0,
        setup=(moved("data", "d\u00e4ta"),),
        env=ASCII,
        leaves=("\u00f6ut*",),
    ),
    Case("a refusal on an ASCII console", train("data_path=d\u00e4ta"), ("no such data folder",), env=ASCII),
    Case(
        "data text on an ASCII console",
        text("--name", "toy", out="\u00f6ut"),
        status=0,
        env=ASCII,
        leaves=("\u00f6ut*",),
    ),
    Case(
        "data verify on an ASCII console",
        data("verify", "d\u00e4ta"),
        ("ok, ",),
        status=0,
        setup=(moved("data", "d\u00e4ta"),),
        env=ASCII,
    ),
    Case(
        "record plot on an ASCII console",
        record("plot", "Base", "--out", "\u00f6.png"),
        status=0,
        env=ASCII,
        leaves=("\u00f6.png",),
    ),
    Case(
        "an unknown locale",
        config("seed=7"),
        ("seed: 7",),
        status=0,
        env={"LC_ALL": "xx_YY.UTF-8", "LANG": "xx_YY"},
    ),
    Case("train with stdout closed", shell(CLOSED, *train()), status=0, leaves=OUTPUT),
    Case("config with stdout closed", shell(CLOSED, *config()), status=0),
    Case("data verify with stdout closed", shell(CLOSED, *data("verify", "data")), status=0),
    Case("record verify with stdout closed", shell(CLOSED, *record("verify")), status=0),
    Case(
        "train with stderr closed",
        shell('exec "$@" 2>&-', *train()),
        ("final_score",),
        status=0,
        leaves=OUTPUT,
    ),
    Case("a refusal with stderr closed", shell('exec "$@" 2>&-', *train("seed=x")), status=2),
    Case("train with stdin closed", shell('exec "$@" <&-', *train()), status=0, leaves=OUTPUT),
    Case("config to a full disk", shell(TO_FULL_DISK, *config()), ("standard output", "o space left")),
    Case(
        "data verify to a full disk",
        shell(TO_FULL_DISK, *data("verify", "data")),
        ("standard output",),
    ),
    Case(
        "record verify to a full disk",
        shell(TO_FULL_DISK, *record("verify")),
        ("standard output", "o space left"),
    ),
    Case("run.sh config to a full disk", shell(TO_FULL_DISK, *run_sh("config")), ("standard output",)),
    Case("run.sh --help to a full disk", shell(TO_FULL_DISK, *run_sh("--help")), ("standard output",)),
    Case("config | head", shell(HEAD, *config()), ("adam_beta1",), 0),
    Case("run.sh --help | head", shell(HEAD, *run_sh("--help")), ("usage",), status=0),
    Case("run.sh config | head", shell(HEAD, *run_sh("config")), ("adam_beta1",), 0),
    Case("record verify | head", shell(HEAD, *record("verify")), status=0),
    Case("data --help | head", shell(HEAD, *data("text", "--help")), ("usage",), status=0),
    Case(
        "train without a network",
        train(),
        ("process group", "ip link set lo up"),
        under=NO_NETWORK,
    ),
    Case("train with only a loopback network", train(), status=0, under=ONLY_LOOPBACK, leaves=OUTPUT),
    Case(
        "download without a network",
        data("download", "--out", "made"),
        ("hub", ";"),
        status=3,
        under=NO_NETWORK,
        env={"HF_HUB_OFFLINE": "0"},
        lines=0,
    ),
    Case(
        "download from an address that nobody answers",
        data("download", "--out", "made"),
        ("hub",),
        status=3,
        env={"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
        lines=0,
    ),
    Case(
        "a tiktoken encoding without a network",
        text(tokenizer="gpt2"),
        ("gpt2",),
        under=NO_NETWORK,
        env={"TIKTOKEN_CACHE_DIR": "none"},
    ),
    Case(
        "300 shards and 256 files",
        shell(
            "for i in {100..399}; do cp data/tiny_train_000000.bin data/tiny_train_000$i.bin; done; "
            'ulimit -n 256; exec "$@"',
            *train("tokenizer_path=data/tokenizer.model"),
        ),
        status=0,
        setup=(moved("data/manifest.json", "manifest.json"),),
        leaves=(*OUTPUT, "data/*"),
    ),
    Case("data text with 64 files", shell('ulimit -n 64; exec "$@"', *text()), status=0, leaves=("made*",)),
    Case(
        "PYTHON is missing",
        clone("config"),
        ("PYTHON=/nope", "give the path"),
        env={"BANKSHOT_PYTHON": None, "PYTHON": "/nope"},
        leaves=("clone*",),
    ),
    Case(
        "PYTHON is no Python",
        clone("config"),
        ("PYTHON=/bin/ls",),
        env={"BANKSHOT_PYTHON": None, "PYTHON": "/bin/ls"},
        leaves=("clone*",),
    ),
    Case(
        "PYTHON is a folder",
        clone("config"),
        ("PYTHON=/tmp",),
        env={"BANKSHOT_PYTHON": None, "PYTHON": "/tmp"},
        leaves=("clone*",),
    ),
    Case("BANKSHOT_PYTHON is missing", run_sh("config"), ("/nope",), env={"BANKSHOT_PYTHON": "/nope"}),
    Case(
        "BANKSHOT_PYTHON is a folder",
        run_sh("config"),
        ("BANKSHOT_PYTHON=/tmp",),
        env={"BANKSHOT_PYTHON": "/tmp"},
    ),
    Case(
        "BANKSHOT_PYTHON is no Python",
        run_sh("config"),
        ("BANKSHOT_PYTHON=/bin/ls",),
        env={"BANKSHOT_PYTHON": "/bin/ls"},
    ),
    Case(
        "BANKSHOT_PYTHON does nothing",
        run_sh("config"),
        ("BANKSHOT_PYTHON=/bin/true",),
        env={"BANKSHOT_PYTHON": "/bin/true"},
    ),
    Case("NPROC is a word", run_sh("train"), ("NPROC=two", "such as 1, 2, 4 or 8"), env={"NPROC": "two"}),
    Case("NPROC is negative", run_sh("train"), ("NPROC=-1", "such as 1, 2, 4 or 8"), env={"NPROC": "-1"}),
    Case("NPROC is zero", run_sh("eval", "run/run.int6.xz"), ("NPROC=0",), env={"NPROC": "0"}),
    Case("train without TMPDIR", train(), status=0, env={"TMPDIR": "/nope"}, leaves=OUTPUT),
    Case("data text without TMPDIR", text(), status=0, env={"TMPDIR": "/nope"}, leaves=("made*",)),
    Case(
        "record verify with a TMPDIR that is a file",
        record("verify"),
        status=0,
        env={"TMPDIR": "/dev/null"},
    ),
    Case(
        "PYTHONPATH of folders that are missing",
        run_sh("record", "--root", "repo", "verify"),
        status=0,
        env={"PYTHONPATH": "/nope:::/dev/null"},
    ),
    Case(
        "the caller has modules named like ours: train", train(), status=0, setup=OWN_MODULES, leaves=OUTPUT
    ),
    Case(
        "the caller has modules named like ours: run.sh eval",
        run_sh("eval", "run/run.int6.xz", "data_path=data", "out_dir=out", "eval_batch_tokens=512"),
        ("eval_score",),
        status=0,
        setup=OWN_MODULES,
        leaves=OUTPUT,
    ),
    Case("the caller has modules named like ours: ledger", record("verify"), status=0, setup=OWN_MODULES),
    Case("the caller has modules named like ours: data", data("verify", "data"), status=0, setup=OWN_MODULES),
    Case(
        "the caller has modules named like ours: sweep",
        lab(*SWEEP),
        ("vocab_size",),
        setup=OWN_MODULES,
        leaves=("swept*",),
    ),
    Case(
        "the caller has modules named like ours: train_gpt.py bench",
        (*config()[:2], "bench", "--steps", "x"),
        ("--steps",),
        setup=OWN_MODULES,
    ),
    Case(
        "the script alone: bench",
        (PYTHON, "alone/train_gpt.py", "bench"),
        ("tools/lab/bench.py", "./run.sh bench"),
        setup=(written("alone/train_gpt.py", Path(TRAINER).read_bytes()),),
    ),
    Case(
        "the repository by a link",
        (PYTHON, "link/train_gpt.py", "config", "seed=7"),
        ("seed: 7",),
        0,
        setup=(linked("link", str(ROOT)),),
    ),
    Case(
        "new without HOME",
        new("X", date="2026-11-23", **{"parent": "Base"}),
        status=0,
        env=NO_HOME,
        leaves=("repo/records/*",),
    ),
    Case(
        "eval with HOME and TMPDIR missing",
        evaluate("run/run.int6.xz"),
        ("eval_score",),
        status=0,
        env={"HOME": "/nope", "TMPDIR": "/nope"},
        leaves=OUTPUT,
    ),
)

GROUP = Group(
    "environments", ("docs", "data", "run", "repo"), tuple(case._replace(fresh=True) for case in CASES)
)
