"""Data folders: shards and manifests that are missing, damaged or another's, and wrong tokenizers."""

import json
import struct
from collections.abc import Callable

import numpy as np

from tests.stress.hostile_cases.case import (
    Case,
    Group,
    copied,
    cut,
    data,
    edited,
    evaluate,
    flip,
    pipe,
    put,
    removed,
    shell,
    train,
    with_huge,
    written,
)
from tests.stress.hostile_cases.paths import OUTPUT

VAL = "data/tiny_val_000000.bin"
TRAIN = "data/tiny_train_000001.bin"
MANIFEST = "data/manifest.json"
MODEL = "data/tokenizer.model"
AGAIN = "prepare it again"
NO_MANIFEST = removed(MANIFEST)
WITH_MODEL = f"tokenizer_path={MODEL}"


def shard(tokens: list[int], count: int | None = None, magic: int = 20240520, version: int = 1) -> bytes:
    """Return a shard. count: a false number of tokens."""
    header = struct.pack("<3i", magic, version, len(tokens) if count is None else count)
    return header.ljust(1024, b"\0") + np.asarray(tokens, dtype="<u2").tobytes()


def with_key(*keys: str | int, value: object) -> tuple[Callable, ...]:
    """Return a setup that sets a key of the manifest. keys: those that lead to it."""

    def change(blob: bytes) -> bytes:
        manifest = json.loads(blob)
        place = manifest
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        return json.dumps(manifest).encode()

    return (edited(MANIFEST, change),)


def without_key(*keys: str) -> tuple[Callable, ...]:
    """Return a setup that removes a key of the manifest."""

    def change(blob: bytes) -> bytes:
        manifest = json.loads(blob)
        place = manifest
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]
        return json.dumps(manifest).encode()

    return (edited(MANIFEST, change),)


# What is broken, the setup, what the trainer says of it, and what `data verify` says, None if nothing.
FOLDERS = (
    ("val is missing", (removed(VAL),), ("data", "_val_"), VAL),
    ("train is missing", (removed("data/tiny_train_*"),), ("data", "train"), "tiny_train_000000.bin"),
    ("one train shard is missing", (removed(TRAIN),), ("tiny_train_000001.bin is missing", AGAIN), TRAIN),
    (
        "a train shard too many",
        (copied(TRAIN, "data/tiny_train_000077.bin"),),
        ("tiny_train_000077.bin", "remove it"),
        "tiny_train_000077.bin",
    ),
    (
        "a val shard too many",
        (copied(VAL, "data/other_val_000001.bin"),),
        ("other_val_000001.bin", "remove it"),
        "other_val_000001.bin",
    ),
    ("val is cut", (edited(VAL, cut(-100)),), (VAL, "length", AGAIN), VAL),
    ("val is cut within its header", (edited(VAL, cut(500)),), (VAL, AGAIN), VAL),
    ("val is empty", (written(VAL),), (VAL, AGAIN), VAL),
    ("val is longer", (edited(VAL, lambda blob: blob + b"\1\0"),), (VAL, "length", AGAIN), VAL),
    ("a bit of val is flipped", (edited(VAL, flip(1100)),), (VAL, "sha256", AGAIN), VAL),
    ("train is cut", (edited(TRAIN, cut(-99)),), (TRAIN, "length", AGAIN), TRAIN),
    ("val has another magic", (edited(VAL, put(0, b"\0\0")),), (VAL, AGAIN), VAL),
    ("train has another magic", (edited(TRAIN, put(0, b"\0\0")),), (TRAIN, AGAIN), TRAIN),
    ("train has another version", (edited(TRAIN, put(4, b"\2")),), (TRAIN, AGAIN), TRAIN),
    ("train's count is false", (edited(TRAIN, put(8, b"\xff")),), (TRAIN, AGAIN), TRAIN),
    ("train's count is negative", (edited(TRAIN, put(8, b"\xff" * 4)),), (TRAIN, AGAIN), TRAIN),
    (
        "train has a token above the vocabulary",
        (edited(TRAIN, put(1100, b"\xff\xff")),),
        (TRAIN, "65535"),
        TRAIN,
    ),
    ("the manifest is empty", (written(MANIFEST),), (MANIFEST, "make it again"), MANIFEST),
    ("the manifest is garbage", (written(MANIFEST, b"\xff\0\x80{"),), (MANIFEST, "make it again"), MANIFEST),
    ("the manifest is a list", (written(MANIFEST, "[]"),), (MANIFEST, "make it again"), MANIFEST),
    ("the manifest is null", (written(MANIFEST, "null"),), (MANIFEST, "make it again"), MANIFEST),
    ("the manifest is a string", (written(MANIFEST, '"tokenizer"'),), (MANIFEST, "make it again"), MANIFEST),
    ("the manifest is an empty object", (written(MANIFEST, "{}"),), (MANIFEST, "make it again"), MANIFEST),
    ("the manifest is cut", (edited(MANIFEST, cut(300)),), (MANIFEST, "make it again"), MANIFEST),
    ("the manifest is deep", (written(MANIFEST, "[" * 100_000),), (MANIFEST, "make it again"), MANIFEST),
    (
        "the manifest is twice there",
        (edited(MANIFEST, lambda b: b + b),),
        (MANIFEST, "make it again"),
        MANIFEST,
    ),
    ("no key bos_id", without_key("bos_id"), (MANIFEST, "bos_id"), "bos_id"),
    ("no key tokenizer", without_key("tokenizer"), (MANIFEST, "tokenizer"), "tokenizer"),
    ("no key tokenizer.sha256", without_key("tokenizer", "sha256"), (MANIFEST, "sha256"), "sha256"),
    ("bos_id is a string", with_key("bos_id", value="1"), (MANIFEST, "bos_id"), "bos_id"),
    ("bos_id is another", with_key("bos_id", value=2), (MANIFEST, "set bos_id=2"), None),
    ("tokenizer is a list", with_key("tokenizer", value=[]), (MANIFEST, "make it again"), "tokenizer"),
    ("tokenizer.sha256 is a number", with_key("tokenizer", "sha256", value=5), (MANIFEST,), "sha256"),
    ("tokenizer.file is a number", with_key("tokenizer", "file", value=7), (MANIFEST,), "file"),
    ("tokenizer.file is missing", with_key("tokenizer", "file", value="gone"), ("data/gone",), "file"),
    ("tokenizer.file is empty", with_key("tokenizer", "file", value=""), ("tokenizer",), "tokenizer"),
    ("tokenizer.file escapes", with_key("tokenizer", "file", value="../docs/val.txt"), ("val.txt",), "file"),
    (
        "an unknown encoding",
        with_key("tokenizer", "encoding", value="nope"),
        ("nope", "check the name"),
        None,
    ),
    ("splits is a list", with_key("splits", value=[]), (MANIFEST, "make it again"), "splits"),
    ("splits.val is null", with_key("splits", "val", value=None), (MANIFEST, "make it again"), "splits.val"),
    ("shards is a string", with_key("splits", "val", "shards", value="x"), (MANIFEST, "val"), "shards"),
    ("tokens is false", with_key("splits", "train", "tokens", value=7), (MANIFEST, "make it again"), "train"),
    ("tokens is a string", with_key("splits", "train", "tokens", value="7"), (MANIFEST, "7"), "tokens"),
    (
        "a shard's tokens are a string",
        with_key("splits", "val", "shards", 0, "tokens", value="1"),
        (MANIFEST, "make it again"),
        "tokens",
    ),
    (
        "a shard's tokens are infinite",
        with_key("splits", "val", "shards", 0, "tokens", value=float("inf")),
        (MANIFEST, "make it again"),
        "tokens",
    ),
    (
        "a shard's sha256 is a number",
        with_key("splits", "val", "shards", 0, "sha256", value=5),
        (VAL, "sha256"),
        "sha256",
    ),
    (
        "a shard's file escapes",
        with_key("splits", "val", "shards", 0, "file", value="../x_val_0.bin"),
        ("x_val_0.bin",),
        "file",
    ),
    (
        "a shard's file is a list",
        with_key("splits", "val", "shards", 0, "file", value=[1]),
        (MANIFEST,),
        "file",
    ),
    ("the manifest is a pipe", (pipe(MANIFEST),), (MANIFEST,), MANIFEST),
    ("the tokenizer is a pipe", (pipe(MODEL),), (MODEL, "tokenizer_path=FILE"), MODEL),
    (
        "a shard's name sends codes to the terminal",
        with_key("splits", "val", "shards", 0, "file", value="\x1b]0;a_val_0.bin"),
        ("\\x1b]0;a_val_0.bin",),
        "\\x1b]0;a_val_0.bin",
    ),
    ("the tokenizer is missing", (removed(MODEL),), (MODEL, "tokenizer_path=FILE"), MODEL),
    ("the tokenizer is empty", (written(MODEL),), (MODEL, "tokenizer_path=FILE"), MODEL),
    ("the tokenizer is cut", (edited(MODEL, cut(-200)),), (MODEL,), MODEL),
    ("the tokenizer is another's", (edited(MODEL, flip(-5)),), (MODEL,), MODEL),
    ("the tokenizer is text", (copied("docs/val.txt", MODEL),), (MODEL, "tokenizer_path=FILE"), MODEL),
)


def folder_cases() -> tuple[Case, ...]:
    """Return two cases for each row of FOLDERS: training on the folder, and verifying it."""
    cases = []
    for name, setup, says, verified in FOLDERS:
        cases.append(Case(f"train: {name}", train(), says, setup=setup))
        if verified:
            cases.append(
                Case(f"verify: {name}", data("verify", "data"), (verified,), 1, setup=setup, lines=0)
            )
    return tuple(cases)


# Folders without a manifest: the trainer has only the shards to go by.
BARE = (
    ("val has no token", (written(VAL, shard([])),), ("data", "0 tokens of val", "use more text")),
    ("val has one token", (written(VAL, shard([1])),), ("data", "1 tokens of val", "use more text")),
    ("val is empty", (written(VAL),), (VAL, AGAIN)),
    ("val is cut to an odd size", (edited(VAL, cut(-1)),), (VAL, AGAIN)),
    (
        "val has a token above the vocabulary",
        (edited(VAL, put(1100, b"\xff\xff")),),
        (VAL, "65535", "data_path"),
    ),
    (
        "train has no token",
        (removed("data/tiny_train_*"), written(TRAIN, shard([]))),
        ("data", "the train split has 0 tokens", "use more text"),
    ),
    (
        "train has no document start",
        (removed("data/tiny_train_*"), written(TRAIN, shard([5] * 3000))),
        ("data", "bos_id", "prepare the data again"),
    ),
    ("train has a bad header", (edited(TRAIN, put(0, b"\0\0")),), (TRAIN, AGAIN)),
    ("train is cut", (edited(TRAIN, cut(-99)),), (TRAIN, AGAIN)),
    ("train's count is negative", (edited(TRAIN, put(8, b"\xff" * 4)),), (TRAIN, AGAIN)),
)


def bare_cases() -> tuple[Case, ...]:
    """Return a case for each row of BARE."""
    return tuple(
        Case(f"no manifest: {name}", train(WITH_MODEL), says, setup=(NO_MANIFEST, *setup))
        for name, setup, says in BARE
    )


OTHERS = (
    Case("no manifest and no tokenizer", train(), ("data", "tokenizer_path=FILE"), setup=(NO_MANIFEST,)),
    Case(
        "a train shard without a token among others",
        train(WITH_MODEL),
        status=0,
        setup=(NO_MANIFEST, written("data/tiny_train_000009.bin", shard([]))),
        leaves=OUTPUT,
    ),
    Case(
        "a train shard without a document start among others",
        train(WITH_MODEL),
        status=0,
        setup=(NO_MANIFEST, written("data/tiny_train_000009.bin", shard([5] * 90))),
        leaves=OUTPUT,
    ),
    Case(
        "val without a document start",
        train(WITH_MODEL),
        status=0,
        setup=(NO_MANIFEST, written(VAL, shard([5] * 900))),
        leaves=OUTPUT,
    ),
    Case(
        "a bit of train is flipped: verify",
        data("verify", "data"),
        (TRAIN, "sha256"),
        status=1,
        setup=(edited(TRAIN, flip(1100)),),
    ),
    Case(
        "a killed build's temporary file is no shard",
        train(),
        status=0,
        setup=(written("data/.tmp.tiny_train_000009.bin", b"half"),),
        leaves=OUTPUT,
    ),
    Case(
        "the manifest is huge: verify",
        with_huge(MANIFEST, data("verify", "data")),
        (MANIFEST, "more than"),
        1,
        leaves=(MANIFEST,),
    ),
    Case(
        "times of files are in the future",
        shell('find . -exec touch -h -d 2099-01-01 {} +; "$@"', *train("out_dir=run", "resume=auto")),
        ("score: val_bpb",),
        0,
        setup=(removed("run/run.int6.xz"),),
        leaves=("run/*",),
    ),
    Case("vocab_size is another", train("vocab_size=1024"), ("vocab_size", "set vocab_size=")),
    Case("bos_id is another", train("bos_id=3"), (MANIFEST, "set bos_id=1")),
    Case(
        "the text is too short for eval_seq_len",
        train("eval_seq_len=8192", "eval_batch_tokens=8192"),
        ("eval_seq_len=8192", "use more text"),
    ),
    Case("report_split is missing", train("report_split=gone"), ("_gone_", "data_path")),
    Case("report_split escapes", train("report_split=../x"), ("../x",)),
    Case("report_split is a pattern", train("report_split=*"), ("_*_", "prepare that split")),
    Case(
        "a shard is cut while it is read",
        shell(
            '"$@" & pid=$!; until grep -q "^step:5/" out/run.txt 2>/dev/null; do sleep 0.05; done; '
            "for f in data/tiny_train_*.bin; do truncate -s 1024 $f; done; wait $pid",
            *train("iterations=100000", "mix_tokens=0"),
        ),
        ("data/tiny_train_",),
        status=2,
        leaves=(*OUTPUT, "data/tiny_train_*"),
    ),
    Case("eval on a cut val", evaluate("run/run.int6.xz"), (VAL, AGAIN), setup=(edited(VAL, cut(-2)),)),
    Case(
        "eval on another's tokenizer", evaluate("run/run.int6.xz"), (MODEL,), setup=(edited(MODEL, flip(-5)),)
    ),
    Case(
        "verify twice the same shard",
        data("verify", "data"),
        ("file",),
        status=1,
        setup=with_key("splits", "train", "shards", 1, "file", value="tiny_train_000000.bin"),
    ),
)

GROUP = Group("data", ("docs", "data", "run"), (*folder_cases(), *bare_cases(), *OTHERS))
