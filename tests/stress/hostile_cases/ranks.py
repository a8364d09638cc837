"""Ranks: one is killed or refuses, wrong numbers of them, wrong variables, two runs of one name."""

import hashlib
import json
import signal
import struct
from collections.abc import Callable
from pathlib import Path

from tests.stress.hostile_cases.case import (
    Case,
    Group,
    Rank,
    Signal,
    copied,
    cut,
    edited,
    evaluate,
    folder,
    knobs,
    lab,
    pipe,
    removed,
    run_sh,
    shell,
    train,
)
from tests.stress.hostile_cases.paths import OUTPUT

LOG = ("out", "out/run.txt")
LONG = ("iterations=1000000", "train_log_every=1")
TWO = {"NPROC": "2"}
NAN = struct.pack("<f", float("nan"))

# Two ranks without torchrun. The status is rank 0's; "rank 1: STATUS" is printed.
BY_HAND = """
export WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo
RANK=1 LOCAL_RANK=1 "$@" 2>&1 & other=$!
RANK=0 LOCAL_RANK=0 "$@"; status=$?
wait $other; echo "rank 1: $?"
exit $status
"""
# The same, with an additional word for rank 1.
BY_HAND_APART = BY_HAND.replace('"$@" 2>&1 &', '"${@:2}" "$1" 2>&1 &').replace(
    '"$@"; status', '"${@:2}"; status'
)
# Start the same run twice, the second when the first one trains; the status is the second's.
TWICE = """
"$@" >/dev/null & first=$!
until grep -q "^step:1/" out/run.txt 2>/dev/null; do sleep 0.05; done
"$@"; status=$?
kill -KILL $first; wait $first 2>/dev/null
exit $status
"""


def both_end(status: int) -> tuple[str, ...]:
    """Return what the console says when rank 1 ended with this status."""
    return (f"rank 1: {status}",)


def run_of_two(*given: str) -> tuple[str, ...]:
    """Return the command of two ranks of run.sh."""
    return run_sh("train", *knobs(), *given)


def log_names_the_loss(here: Path) -> str | None:
    """Return what is wrong with the log of a run that lost a rank: it must say so."""
    text = (here / "out/run.txt").read_text()
    return None if "another rank is gone" in text else "the log does not say that a rank is gone"


VARIABLES = (
    ("RANK alone", {"RANK": "0"}),
    ("WORLD_SIZE alone", {"WORLD_SIZE": "2"}),
    ("a RANK beyond WORLD_SIZE", {"RANK": "2", "WORLD_SIZE": "2"}),
    ("WORLD_SIZE is a word", {"RANK": "0", "WORLD_SIZE": "two"}),
    ("WORLD_SIZE is empty", {"RANK": "0", "WORLD_SIZE": ""}),
    ("RANK is negative", {"RANK": "-1", "WORLD_SIZE": "2"}),
    ("LOCAL_WORLD_SIZE does not divide", {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"}),
    ("WORLD_SIZE is in other digits", {"RANK": "0", "WORLD_SIZE": "\u00b2"}),
)


def forged(change: Callable[[dict, bytes], tuple[object, bytes]]) -> Callable[[Path], None]:
    """Return a setup that changes header and payload of a checkpoint and makes its checksum right."""

    def forge(blob: bytes) -> bytes:
        end = 4 + int.from_bytes(blob[:4], "little")
        header, payload = change(json.loads(blob[4:end]), blob[end:-32])
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        body = len(text).to_bytes(4, "little") + text + payload
        return body + hashlib.sha256(body).digest()

    return edited(NEWEST, forge)


def number(key: str, value: object) -> Callable[[Path], None]:
    """Return a setup that changes a key of the newest checkpoint's header."""
    return forged(lambda header, payload: (header | {key: value}, payload))


def without_last_tensor(header: dict, payload: bytes) -> tuple[object, bytes]:
    """Drop the last tensor of a checkpoint."""
    *kept, (_, _, _, offset) = header["tensors"]
    return header | {"tensors": kept}, payload[:offset]


def with_swapped_names(header: dict, payload: bytes) -> tuple[object, bytes]:
    """Give the first tensor of a checkpoint the name of the last, and the last that of the first."""
    (first, *first_rest), *others, (last, *last_rest) = header["tensors"]
    return header | {"tensors": [[last, *first_rest], *others, [first, *last_rest]]}, payload


NEWEST = "run/run.step3.0of1.ckpt"
FITS_NOT = ("does not fit", "run_id")
# Newest checkpoints that resume=auto skips: what is wrong, and the setup.
SKIPPED = (
    ("a pipe", pipe(NEWEST)),
    ("of another step", number("step", 2)),
    ("of step -1", number("step", -1)),
    ("of a clock that is no number", number("train_ms", float("nan"))),
    ("of infinite progress", number("progress", float("inf"))),
    ("of position -1", number("position", -1)),
    ("of a deep header", forged(lambda header, payload: (b"[" * 100_000, payload))),
    ("of a weight that is no number", forged(lambda header, payload: (header, NAN + payload[4:]))),
)


def checkpoint_cases() -> tuple[Case, ...]:
    """Return the cases of checkpoints that a hand has made."""
    command = train("out_dir=run", "resume=auto")
    gone = removed("run/run.int6.xz")
    skipped = (
        Case(
            f"resume=auto and the newest checkpoint is {name}",
            command,
            ("checkpoint step:3 skipped", "resumed step:2"),
            0,
            setup=(gone, setup),
            leaves=("run/*",),
        )
        for name, setup in SKIPPED
    )
    refused = (
        Case(
            f"resume=auto and a checkpoint {name}",
            command,
            FITS_NOT,
            setup=(gone, forged(change)),
            leaves=("run/run.txt",),
        )
        for name, change in (
            ("lacks a tensor", without_last_tensor),
            ("has swapped two tensors", with_swapped_names),
        )
    )
    no_parts = Case(
        "resume=auto and a checkpoint of no parts",
        command,
        ("resumed step:3",),
        0,
        setup=(gone, copied(NEWEST, "run/run.step9.0of0.ckpt")),
        leaves=("run/*",),
    )
    return (*skipped, *refused, no_parts)


CASES = (
    *(Case(name, train(), ("WORLD_SIZE=", "RANK="), env=env) for name, env in VARIABLES),
    Case(
        "nodes of different sizes",
        train(),
        ("RANK=0", "LOCAL_WORLD_SIZE=3", "--nproc_per_node"),
        env={"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "3"},
    ),
    Case(
        "no address of the group",
        train(),
        ("cannot make the process group", "MASTER_ADDR"),
        env={"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": None},
    ),
    Case(
        "a port that is a word",
        train(),
        ("cannot make the process group",),
        env={"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
    ),
    Case(
        "NPROC does not divide the batch",
        run_of_two(),
        ("WORLD_SIZE=3", "change one of them"),
        env={"NPROC": "3"},
    ),
    Case("NPROC is more than the batch has", run_of_two(), ("WORLD_SIZE=64",), env={"NPROC": "64"}),
    Case(
        "two ranks train",
        run_of_two(),
        ("final_score", "artifact: "),
        0,
        env=TWO,
        leaves=("out", "out/*"),
        seconds=150,
    ),
    Case(
        "two ranks score",
        run_sh("eval", *evaluate("run/run.int6.xz")[3:]),
        ("eval_score",),
        0,
        env=TWO,
        leaves=OUTPUT,
        seconds=150,
    ),
    Case(
        "two ranks without data",
        run_of_two("data_path=gone"),
        ("gone", "no such data folder"),
        1,
        env=TWO,
        lines=0,
        seconds=150,
    ),
    Case(
        "two ranks and a cut shard",
        run_of_two(),
        ("tiny_val_000000.bin", "prepare it again"),
        1,
        setup=(edited("data/tiny_val_000000.bin", cut(-2)),),
        env=TWO,
        lines=0,
        seconds=150,
    ),
    Case(
        "two ranks and an out_dir that is a file",
        run_of_two("out_dir=data/manifest.json"),
        ("manifest.json", "out_dir"),
        1,
        env=TWO,
        lines=0,
        seconds=150,
    ),
    Case("two ranks and an unknown knob", run_of_two("sed=1"), ("sed",), env=TWO, seconds=150),
    *(
        Case(
            f"two ranks by hand, the second with another {word.partition('=')[0]}",
            shell(BY_HAND_APART, word, *train()),
            (f"rank 1 has a different {word.partition('=')[0]} from rank 0", *both_end(2)),
            lines=0,
        )
        for word in ("seed=2", "train_batch_tokens=1024", "iterations=5", "model_dim=64", "resume=auto")
    ),
    Case("two ranks by hand", shell(BY_HAND, *train()), ("final_score", *both_end(0)), 0, leaves=OUTPUT),
    Case(
        "two ranks by hand without data",
        shell(BY_HAND, *train("data_path=gone")),
        ("gone", *both_end(2)),
        lines=0,
    ),
    Case(
        "two ranks by hand and a log that is there",
        shell(BY_HAND, *train("out_dir=run")),
        ("run/run.txt", *both_end(2)),
        setup=(removed("run/run.int6.xz"),),
        lines=0,
    ),
    *(
        Case(
            f"rank {rank} is killed while training",
            shell(BY_HAND, *train(*LONG)),
            both_end(137 if rank == 1 else 1),
            137 if rank == 0 else 1,
            lines=0,
            signals=(Signal(signal.SIGKILL, "^step:3/", 0.0, Rank(rank)),),
            leaves=LOG,
            holds=log_names_the_loss,
        )
        for rank in (0, 1)
    ),
    Case(
        "rank 1 of run.sh is killed while importing",
        run_of_two(),
        status=1,
        lines=0,
        env=TWO,
        signals=(Signal(signal.SIGKILL, "running: ", 0.5, Rank(1)),),
        seconds=150,
    ),
    Case(
        "rank 1 is killed in the warm-up",
        shell(BY_HAND, *train("warmup_steps=1000000")),
        both_end(137),
        1,
        lines=0,
        signals=(Signal(signal.SIGKILL, "^warmup_step", 0.2, Rank(1)),),
        leaves=LOG,
    ),
    Case(
        "rank 1 is killed while scoring",
        shell(BY_HAND, *train("eval_stride=1", "eval_batch_tokens=32")),
        both_end(137),
        1,
        lines=0,
        signals=(Signal(signal.SIGKILL, "^final_int6_roundtrip_exact", 0.0, Rank(1)),),
        leaves=OUTPUT,
    ),
    Case(
        "rank 1 of run.sh is killed",
        run_of_two(*LONG),
        ("another rank is gone",),
        1,
        lines=0,
        env=TWO,
        signals=(Signal(signal.SIGKILL, "^step:3/", 0.0, Rank(1)),),
        leaves=("out", "out/run.txt", "out/run.png"),
        seconds=150,
    ),
    Case(
        "SIGTERM to run.sh with two ranks",
        run_of_two(*LONG, "checkpoint_every=1e-6"),
        ("stopping_early: signal", "final_score"),
        143,
        lines=0,
        env=TWO,
        signals=(Signal(signal.SIGTERM, "^step:3/", 0.2),),
        leaves=("out", "out/*"),
        seconds=150,
    ),
    Case("the same run twice", shell(TWICE, *train(*LONG)), ("out/run.txt", "run_id"), leaves=LOG),
    Case(
        "the same run twice with resume=auto",
        shell(TWICE, *train(*LONG, "resume=auto")),
        ("another process is writing it", "run_id"),
        leaves=LOG,
    ),
    Case(
        "resume with another seed", train("out_dir=run", "resume=auto", "seed=2"), ("another seed", "run_id")
    ),
    Case(
        "resume with another model",
        train("out_dir=run", "resume=auto", "model_dim=64"),
        ("another model_dim", "run_id"),
    ),
    Case(
        "resume from a set with a missing part",
        train("resume=run/run.step3.0of2.ckpt"),
        ("1of2.ckpt", "resume=auto"),
        setup=(lambda here: (here / "run/run.step3.0of1.ckpt").rename(here / "run/run.step3.0of2.ckpt"),),
    ),
    Case(
        "resume from a damaged checkpoint by name",
        train("resume=run/run.step3.0of1.ckpt"),
        ("run.step3.0of1.ckpt", "resume=auto"),
        setup=(edited("run/run.step3.0of1.ckpt", cut(-9)),),
        leaves=(),
    ),
    Case(
        "resume=auto and every checkpoint is damaged",
        train("out_dir=run", "resume=auto"),
        ("skipped", "from the beginning"),
        0,
        setup=(
            removed("run/run.int6.xz"),
            *(edited(f"run/run.step{step}.0of1.ckpt", cut(-9)) for step in (2, 3)),
        ),
        leaves=("run/*",),
    ),
    Case(
        "resume=auto and a checkpoint is a folder",
        train("out_dir=run", "resume=auto"),
        ("skipped", "resumed step:2"),
        0,
        setup=(removed("run/run.int6.xz"), folder("run/run.step3.0of1.ckpt")),
        leaves=("run/*",),
    ),
    *checkpoint_cases(),
    Case(
        "resume from a set of 10^11 parts",
        train(f"resume=run/run.step3.0of{10**11}.ckpt"),
        (f"1of{10**11}.ckpt", "resume=auto"),
        setup=(copied("run/run.step3.0of1.ckpt", f"run/run.step3.0of{10**11}.ckpt"),),
    ),
    Case("wire of no ranks", lab("wire", "--ranks", "0"), ("--ranks",), lines=0),
)

GROUP = Group("ranks", ("data", "run"), CASES)
