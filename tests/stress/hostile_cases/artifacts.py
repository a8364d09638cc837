"""Artifacts: cut, flipped, with values that are not finite, of other models, bombs, and none at all."""

import functools
import json
import lzma
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import train_gpt as t
from tests.stress.bombs import BOMBS
from tests.stress.hostile_cases.case import (
    WITH_SAFETENSORS,
    Case,
    Group,
    audit,
    copied,
    cut,
    edited,
    evaluate,
    export,
    flip,
    lab,
    pipe,
    removed,
    run_sh,
    sample,
    scoring,
    shell,
    with_huge,
    written,
)
from tests.stress.hostile_cases.paths import OUTPUT
from tests.stress.mutations import container, small_artifact
from tests.stress.xz_streams import compress, with_dictionary

GOOD = "run/run.int6.xz"
BAD = "bad.int6.xz"


# ---------------------------------------------------------------- changes of the sound artifact


def header(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    """Return a change of an artifact: change(header) edits its header in place, or returns another."""

    def edit(blob: bytes) -> bytes:
        found, payload = t.open_artifact(blob)
        other = change(found)
        return container(json.dumps(found if other is None else other), payload)

    return edit


def knob(key: str, value: object) -> Callable[[bytes], bytes]:
    """Return a change of an artifact: another value of a knob in its header."""
    return header(lambda found: found["config"].update({key: value}))


def without(key: str) -> Callable[[bytes], bytes]:
    """Return a change of an artifact: no such knob in its header."""

    def drop(found: dict) -> None:
        del found["config"][key]

    return header(drop)


def entry(field: int, value: object) -> Callable[[bytes], bytes]:
    """Return a change of an artifact: another field of the entry of its first tensor."""

    def change(found: dict) -> None:
        found["tensors"][0][field] = value

    return header(change)


def payload(encoding: str, value: bytes, last: bool) -> Callable[[bytes], bytes]:
    """Return a change of an artifact: the first bytes of a tensor so encoded, or those after its codes."""

    def change(blob: bytes) -> bytes:
        found, values = t.open_artifact(blob)
        for _, stored, shape, offset in found["tensors"]:
            if stored == encoding:
                at = offset + (functools.reduce(int.__mul__, shape) if last else 0)
                values = values[:at] + value + values[at + len(value) :]
                return container(json.dumps(found), values)
        raise AssertionError(f"no tensor of encoding {encoding}")

    return change


def key_twice(blob: bytes) -> bytes:
    """Give the header a second list of tensors, which is empty."""
    found, values = t.open_artifact(blob)
    return container(json.dumps(found)[:-1] + ', "tensors": []}', values)


def long_number(blob: bytes) -> bytes:
    """Give the header a number that Python refuses to read."""
    found, values = t.open_artifact(blob)
    text = json.dumps(found)
    assert '"num_layers": 2' in text
    return container(text.replace('"num_layers": 2', '"num_layers": ' + "9" * 5000), values)


NAN = struct.pack("<e", float("nan"))
INFINITE = struct.pack("<e", float("inf"))

# What is wrong with the artifact, how the sound one is changed, and what the error says besides its name.
CHANGES = (
    ("cut by a byte", cut(-1), ("artifact",)),
    ("cut in half", cut(2000), ("artifact",)),
    ("cut to 5 bytes", cut(5), ("artifact",)),
    ("empty", cut(0), ("artifact",)),
    ("a flipped bit in the xz header", flip(7), ("artifact",)),
    ("a flipped bit in the middle", flip(3000), ("artifact",)),
    ("a flipped bit at the end", flip(-3), ("artifact",)),
    ("bytes after its end", lambda blob: blob + b"more", ("artifact",)),
    ("twice the same", lambda blob: blob + blob, ("artifact",)),
    ("text", lambda blob: b"<html>Not found</html>", ("artifact",)),
    ("a pointer of Git LFS", lambda blob: b"version https://git-lfs.github.com/spec/v1\n", ("artifact",)),
    ("a pickle", lambda blob: pickle.dumps({"w": 1}), ("artifact",)),
    ("a pickle in xz", lambda blob: lzma.compress(pickle.dumps({"w": 1})), ("artifact", "magic")),
    ("no xz", lambda blob: lzma.decompress(blob), ("artifact",)),
    ("of the old xz format", lambda blob: lzma.compress(b"x", format=lzma.FORMAT_ALONE), ("artifact",)),
    ("of another magic", lambda blob: compress(b"GPT5" + lzma.decompress(blob)[4:]), ("artifact", "magic")),
    ("a header of no JSON", lambda blob: container(b"{", b""), ("header",)),
    ("a header of a list", lambda blob: container("[]", b""), ("header",)),
    ("a deep header", lambda blob: container("[" * 100_000, b""), ("header",)),
    ("a dictionary of 4 GiB", lambda blob: with_dictionary(blob, 40), ("artifact",)),
    ("no layers", knob("num_layers", 0), ("num_layers",)),
    ("-1 layers", knob("num_layers", -1), ("num_layers",)),
    ("2^40 layers", knob("num_layers", 1 << 40), ("num_layers",)),
    ("a model of 2^40", knob("model_dim", 1 << 40), ("model_dim",)),
    ("another model_dim", knob("model_dim", 64), ("use the script that wrote it",)),
    ("another vocab_size", knob("vocab_size", 64), ("use the script that wrote it",)),
    ("vocab_size as a string", knob("vocab_size", "320"), ("config",)),
    ("mlp_mult as an integer", knob("mlp_mult", 2), ("config",)),
    ("mlp_mult not a number", knob("mlp_mult", float("nan")), ("mlp_mult",)),
    ("rope_base infinite", knob("rope_base", float("inf")), ("rope_base",)),
    ("an eval_stride of 0", knob("eval_stride", 0), ("eval_stride",)),
    ("an eval_seq_len of 2^50", knob("eval_seq_len", 1 << 50), ("eval_seq_len",)),
    ("attn_windows of words", knob("attn_windows", "all"), ("attn_windows",)),
    ("bos_id above the vocabulary", knob("bos_id", 5000), ("bos_id",)),
    ("doc_mask as a number", knob("doc_mask", 1), ("config",)),
    ("a knob missing", without("rope_dims"), ("'rope_dims'",)),
    ("a knob too many", knob("copy_dim", 64), ("'copy_dim'", "use the script that wrote it")),
    ("no config", header(lambda found: {"tensors": found["tensors"]}), ("header",)),
    ("no tensors", header(lambda found: found.update(tensors=[])), ("bytes after",)),
    ("a tensor twice", header(lambda found: found["tensors"].append(found["tensors"][0])), ("repeated",)),
    ("a tensor missing", header(lambda found: {**found, "tensors": found["tensors"][:-1]}), ("bytes after",)),
    ("a tensor renamed", entry(0, "other"), ("use the script that wrote it",)),
    ("a tensor of an unknown encoding", entry(1, "f64"), ("tensor",)),
    ("a tensor of a huge shape", entry(2, [1 << 27] * 3), ("tensor",)),
    ("a tensor of a negative shape", entry(2, [-1]), ("tensor",)),
    ("a tensor elsewhere", entry(3, 1), ("out of order",)),
    ("an int6 code beyond its limit", payload("int6", b"\x7f", False), ("code beyond",)),
    ("an int6 scale that is no number", payload("int6", NAN, True), ("not finite",)),
    ("an int8 scale that is infinite", payload("int8", INFINITE, True), ("not finite",)),
    ("a header with a key twice", key_twice, ("bytes after",)),
    ("a number of 5000 digits", long_number, ("header",)),
    ("a header with a byte order mark", lambda blob: container("\ufeff{}", b""), ("header",)),
    ("a tensor whose name sends codes to the terminal", entry(0, "\x1b]0;x\x07"), ("'\\x1b]0;x\\x07'",)),
    ("a tensor of a true dimension", entry(2, [True, 2, 32]), ("tensor",)),
    ("a tensor at a fraction", entry(3, 0.0), ("tensor",)),
    ("a stream before it", lambda blob: lzma.compress(b"") + blob, ("artifact",)),
    ("no payload", lambda blob: container(json.dumps(t.open_artifact(blob)[0]), b""), ("past the end",)),
)
FEW_BOMBS = ("1 GiB of zeros", "1 GiB after a sound start", "a header of empty lists", "a shape of ones")


def bomb(name: str) -> Callable[[Path], None]:
    """Return a setup that writes a bomb of bombs.py."""
    return lambda here: written(BAD, BOMBS[name](small_artifact()))(here)


def changed() -> tuple[Case, ...]:
    """Return the cases of the tables above."""
    changes = (
        Case(name, evaluate(BAD), (BAD, *says), setup=(copied(GOOD, BAD), edited(BAD, change)))
        for name, change, says in CHANGES
    )
    bombs = (
        Case(f"bomb: {name}", evaluate(BAD), (BAD, "artifact"), setup=(bomb(name),)) for name in FEW_BOMBS
    )
    return (*changes, *bombs)


AUDITED = (("cut", cut(-1)), ("empty", cut(0)), ("of no layers", knob("num_layers", 0)))
OTHERS = (
    *(
        Case(f"audit: {name}", audit(BAD), (BAD,), setup=(copied(GOOD, BAD), edited(BAD, change)))
        for name, change in AUDITED
    ),
    Case("sample: a prompt that is not UTF-8", sample("prompt=\udce9x"), ("prompt=", "not UTF-8")),
    Case("sample: a temperature that is no number", sample("temperature=nan"), ("temperature=nan",)),
    Case("sample: more texts than there are", sample("held_out=9999"), ("held_out=9999", "ask for fewer")),
    Case(
        "sample: an artifact that is cut",
        run_sh("sample", BAD, "data_path=data"),
        (BAD, "artifact"),
        setup=(copied(GOOD, BAD), edited(BAD, cut(-1))),
    ),
    Case("sample | head", shell('"$@" | head -c 1', *sample("tokens=3000")), status=0),
    Case(
        "export: below a file",
        export("data/manifest.json/x"),
        ("data/manifest.json",),
        under=WITH_SAFETENSORS,
    ),
    Case("export: a folder that is there", export("data"), ("data", "exists"), under=WITH_SAFETENSORS),
    Case(
        "two evals of one name",
        shell(
            '"$@" >/dev/null 2>&1 & "$@" 2>&1; first=$?; wait $!; echo "$((first + $?)) in all"',
            *evaluate(GOOD),
        ),
        ("2 in all",),
        0,
        leaves=OUTPUT,
    ),
    Case("audit: a pipe", audit("p"), ("p: cannot read", "not a file"), setup=(pipe("p"),)),
    Case(
        "audit: a script that is a pipe",
        audit(GOOD, "--script", "p"),
        ("p: cannot read",),
        setup=(pipe("p"),),
    ),
    Case("codecs of a pipe", lab("codecs", "p"), ("p: cannot read", "not a file"), setup=(pipe("p"),)),
    Case("run.sh eval: huge", with_huge(BAD, run_sh("eval", BAD)), (BAD, "artifact")),
    Case("audit: a folder", audit("run"), ("run", "name a file")),
    Case("audit: without an artifact", audit("--script"), ("usage",)),
    Case("audit: a script that is missing", audit(GOOD, "--script", "gone.py"), ("gone.py", "--script PATH")),
    Case(
        "audit: a script that does not parse",
        audit(GOOD, "--script", "s.py"),
        ("s.py", "fix it"),
        setup=(written("s.py", "def f(:"),),
    ),
    Case(
        "audit: a script that exits",
        audit(GOOD, "--script", "s.py"),
        ("s.py", "fix it"),
        setup=(written("s.py", "raise SystemExit(0)"),),
    ),
    Case(
        "audit: a script that is empty",
        audit(GOOD, "--script", "s.py"),
        ("s.py", "audit"),
        setup=(written("s.py"),),
    ),
    Case(
        "audit: a script that is no text",
        audit(GOOD, "--script", "s.py"),
        ("s.py", "fix it"),
        setup=(written("s.py", b"\xff\0\xfe"),),
    ),
    Case(
        "audit: a knob that the artifact fixes", audit(GOOD, "model_dim=64"), ("model_dim=64", "leave it out")
    ),
    Case("audit: an unknown knob", audit(GOOD, "sed=1"), ("sed",)),
    Case("a knob that the artifact fixes", evaluate(GOOD, "num_layers=3"), ("num_layers=3", "leave it out")),
    Case("a knob of scoring out of bounds", evaluate(GOOD, "eval_stride=99"), ("eval_stride",)),
    Case("an unknown knob", evaluate(GOOD, "sed=1"), ("sed",)),
    Case(
        "a fixed knob in the environment",
        evaluate(GOOD),
        ("eval_score",),
        0,
        env={"MODEL_DIM": "64"},
        leaves=OUTPUT,
    ),
    Case("no data", evaluate(GOOD, "data_path=gone"), ("gone", "data_path=DIR")),
    Case("run.sh eval: empty", run_sh("eval", BAD, *scoring()), (BAD, "artifact"), setup=(written(BAD),)),
    Case(
        "run.sh audit: text", run_sh("audit", BAD, *scoring()), (BAD, "artifact"), setup=(written(BAD, "no"),)
    ),
    Case(
        "read by eval while data is gone",
        shell('rm -r data/tiny_val*; exec "$@"', *evaluate(GOOD)),
        ("data", "_val_"),
        leaves=("data/tiny_val*",),
    ),
    Case(
        "without the training shards",
        evaluate(GOOD),
        ("eval_score",),
        0,
        setup=(removed("data/tiny_train_*"),),
        leaves=OUTPUT,
    ),
)

GROUP = Group("artifacts", ("data", "run"), (*changed(), *OTHERS))
