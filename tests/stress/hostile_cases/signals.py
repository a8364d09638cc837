"""Signals: Ctrl-C and SIGTERM in every phase of a run, twice, and to the other programs."""

import json
import signal
from pathlib import Path

from tests.helpers import english
from tests.stress.hostile_cases.case import (
    Case,
    Group,
    Receiver,
    Signal,
    data,
    evaluate,
    knobs,
    lab,
    record,
    run_sh,
    text,
    train,
    written,
)
from tests.stress.hostile_cases.paths import OUTPUT

INT = signal.SIGINT
TERM = signal.SIGTERM
SAVES = "checkpoint_every=1e-6"
LONG = "iterations=1000000"
FIRST_STEP = r"^step:1/"
SLOW_CALIBRATION = ("iterations=40", "train_log_every=1", "gptq_batches=60")
VERY_SLOW_CALIBRATION = (*SLOW_CALIBRATION, "gptq_batches=1200")
SLOW_SCORING = ("eval_stride=1", "eval_batch_tokens=32", "eval_seq_len=32", "val_tokens=1500")


def resumes(here: Path) -> str | None:
    """Return what is wrong with what a stopped run left: it must hold a checkpoint to go on from."""
    return None if list(here.glob("out/run.step*.ckpt")) else "left no checkpoint"


def cases_of(number: int, name: str, at_once: int) -> tuple[Case, ...]:
    """Return the cases of a signal. at_once: the status with which it ends the process at once."""
    stopped = f"{name} while training"
    return (
        Case(f"{name} while importing", train(), status=-number, signals=(Signal(number, seconds=0.5),)),
        Case(
            f"{name} in the warm-up",
            train("warmup_steps=1000000"),
            status=at_once,
            signals=(Signal(number, "^warmup_step"),),
            leaves=("out", "out/run.txt"),
        ),
        Case(
            stopped,
            train(LONG, SAVES),
            ("stopping_early: signal", "final_score", "artifact: "),
            0,
            signals=(Signal(number, FIRST_STEP, 0.5),),
            leaves=OUTPUT,
            holds=resumes,
        ),
        Case(
            f"{name} twice at once while training",
            train(LONG, SAVES),
            ("stopping_early: signal", "final_score"),
            0,
            signals=(Signal(number, FIRST_STEP, 0.5), Signal(number)),
            leaves=OUTPUT,
            holds=resumes,
        ),
        Case(
            f"{name} while calibrating",
            train(*SLOW_CALIBRATION),
            ("final_score", "artifact: "),
            0,
            signals=(Signal(number, "^step:40/40 train_loss", 0.3),),
            leaves=OUTPUT,
        ),
        Case(
            f"{name} twice while calibrating, the second later",
            train(*VERY_SLOW_CALIBRATION),
            status=at_once,
            signals=(Signal(number, "^step:40/40 train_loss", 0.3), Signal(number, "", 3.5)),
            lines=0,
            leaves=("out", "out/run.txt"),
        ),
        Case(
            f"{name} while scoring",
            train(*SLOW_SCORING),
            ("final_score", "artifact: "),
            0,
            signals=(Signal(number, "^final_int6_roundtrip_exact"),),
            leaves=OUTPUT,
        ),
        Case(
            f"{name} to eval",
            evaluate("run/run.int6.xz", "eval_stride=1", "eval_batch_tokens=32"),
            status=at_once,
            lines=0,
            signals=(Signal(number, "^final_int6_roundtrip_exact"),),
            leaves=("out", "out/scored.txt"),
        ),
    )


SWEEP = lab("sweep", "sweep.json", "--out", "swept")
LONG_TEXT = written("docs/long.txt", "\0".join(english(4000, 5)))


def sweep_plan() -> str:
    """Return a plan of two configurations that take long."""
    given = dict(word.split("=", 1) for word in knobs(iterations=1_000_000))
    base = {key: value for key, value in given.items() if key not in ("run_id", "out_dir", "eval_stride")}
    return json.dumps({"base": base, "rates": [0.02, 0.04], "seeds": [1], "rows": {"a": {}}})


SWEEP_PLAN = written("sweep.json", sweep_plan())

OTHERS = (
    Case(
        "SIGINT from the terminal to run.sh train",
        run_sh(*train(LONG, SAVES)[2:]),
        ("stopping_early: signal", "final_score"),
        0,
        signals=(Signal(INT, FIRST_STEP, 0.5, Receiver.TERMINAL),),
        leaves=("out", "out/*"),
        holds=resumes,
    ),
    Case(
        "SIGTERM to run.sh train",
        run_sh(*train(LONG, SAVES)[2:]),
        ("stopping_early: signal", "final_score"),
        0,
        signals=(Signal(TERM, FIRST_STEP, 0.5),),
        leaves=("out", "out/*"),
        holds=resumes,
    ),
    Case(
        "SIGHUP while training",
        train(LONG, SAVES),
        ("stopping_early: signal", "final_score", "artifact: "),
        0,
        signals=(Signal(signal.SIGHUP, FIRST_STEP, 0.3),),
        leaves=OUTPUT,
        holds=resumes,
    ),
    Case(
        "SIGHUP under nohup while training",
        ("nohup", *train("iterations=60")),
        ("step:60/60", "final_score"),
        0,
        signals=(Signal(signal.SIGHUP, FIRST_STEP),),
        leaves=OUTPUT,
    ),
    Case(
        "SIGHUP to run.sh train",
        run_sh(*train(LONG, SAVES)[2:]),
        ("stopping_early: signal", "final_score"),
        0,
        signals=(Signal(signal.SIGHUP, FIRST_STEP, 0.3),),
        leaves=("out", "out/*"),
        holds=resumes,
    ),
    Case(
        "SIGSTOP while training, SIGCONT a second later",
        train("iterations=60"),
        ("step:60/60", "final_score"),
        0,
        signals=(Signal(signal.SIGSTOP, FIRST_STEP), Signal(signal.SIGCONT, "", 1.0)),
        leaves=OUTPUT,
    ),
    Case(
        "SIGHUP to run.sh train while importing",
        run_sh(*train()[2:]),
        status=-signal.SIGHUP,
        lines=0,
        signals=(Signal(signal.SIGHUP, "", 1.0, Receiver.TERMINAL),),
    ),
    Case(
        "SIGINT from the terminal to data text",
        text("--name", "toy", "--shard-tokens", "50", workers="2", train="docs/long.txt"),
        ("interrupted", "repeat the command"),
        130,
        lines=0,
        setup=(LONG_TEXT,),
        signals=(Signal(INT, "^tokenize val", 0.2, Receiver.TERMINAL),),
    ),
    Case(
        "SIGTERM to data text",
        text("--name", "toy", "--shard-tokens", "50", workers="2", train="docs/long.txt"),
        ("interrupted", "repeat the command"),
        143,
        lines=0,
        setup=(LONG_TEXT,),
        signals=(Signal(TERM, "^tokenize val", 0.2),),
    ),
    Case(
        "SIGINT to record verify",
        record("verify", *["Base"] * 600),
        ("interrupted",),
        130,
        lines=0,
        signals=(Signal(INT, "", 1.5, Receiver.TERMINAL),),
    ),
    Case(
        "SIGTERM to a sweep",
        SWEEP,
        ("interrupted; the same command continues",),
        2,
        signals=(Signal(TERM, "^sweep ", 6.0),),
        setup=(SWEEP_PLAN,),
        leaves=("swept*",),
    ),
    Case(
        "SIGINT from the terminal to a sweep",
        SWEEP,
        ("interrupted; the same command continues",),
        2,
        lines=0,
        signals=(Signal(INT, "^sweep ", 6.0, Receiver.TERMINAL),),
        setup=(SWEEP_PLAN,),
        leaves=("swept*",),
    ),
    Case(
        "SIGINT to data verify while importing",
        data("verify", "data"),
        status=-INT,
        lines=0,
        signals=(Signal(INT, "", 0.1),),
    ),
)

GROUP = Group(
    "signals",
    ("docs", "data", "run", "repo"),
    (*cases_of(INT, "SIGINT", 130), *cases_of(TERM, "SIGTERM", 143), *OTHERS),
)
