"""Documents that become shards: bad JSON, bad UTF-8, NUL, a million spaces, wrong options."""

import json

from tests.stress.hostile_cases.case import (
    Case,
    Group,
    copied,
    cut,
    data,
    edited,
    linked,
    pipe,
    removed,
    shell,
    text,
    with_huge,
    written,
)

TOY = ("--name", "toy")
MADE = ("made", "made/*")


def lines(*rows: object) -> str:
    """Return rows as .jsonl."""
    return "".join(json.dumps(row) + "\n" for row in rows)


# What is wrong with docs/v.jsonl, its content, and what the error says.
JSONL = (
    ("a field is missing", lines({"body": "a"}), ("line 1", "'text'", "found: body", "--field")),
    ("the field is a number", lines({"text": "a"}, {"text": 5}), ("line 2", "'text'", "--field")),
    ("the field is null", lines({"text": None}), ("line 1", "--field")),
    ("a line is a list", lines(["text"]), ("line 1", "--field")),
    ("a line is no JSON", '{"text": "a"}\n{"text": \n', ("line 2: not JSON", "one object per line")),
    ("a key holds a line break", lines({"a\nb": 1}), ("line 1", "--field")),
    ("a line is deep", '{"text": ' + "[" * 100_000 + "\n", ("line 1", "one object per line")),
    ("a number is long", '{"text": "a", "n": ' + "1" * 5000 + "}\n", ("line 1", "one object per line")),
    ("bytes are not UTF-8", b'{"text": "caf\xe9"}\n', ("line 1", "UTF-8", "iconv")),
    ("a lone surrogate", '{"text": "\\ud800"}\n', ("line 1", "UTF-8")),
    ("bytes are UTF-16", lines({"text": "a"}).encode("utf-16"), ("v.jsonl", "line 1")),
    ("a NUL byte between the lines", b'{"text": "a"}\n\0\n', ("line 2",)),
    ("only blank lines", "\n \n\t\n", ("no documents", "fill it")),
    ("only blank texts", lines({"text": " "}, {"text": "\n"}), ("no documents", "fill it")),
    ("empty", "", ("empty file", "fill it")),
)

# The same for docs/v.txt.
TXT = (
    ("empty", b"", ("empty file", "fill it")),
    ("only blanks and NUL", b" \n\0\n\0\0", ("no documents", "fill it")),
    ("bytes are not UTF-8", b"fine\0\xff\xfe", ("document 2", "UTF-8", "iconv")),
    ("only control characters", b"\1\2\3\0\4", ("has any text",)),
    ("a document of train", b"", ("also occurs in train", "remove it")),
)


def bad_files() -> tuple[Case, ...]:
    """Return a case for each row of JSONL and TXT."""
    cases = []
    for kind, rows in (("jsonl", JSONL), ("txt", TXT)):
        for name, content, says in rows:
            setup = (written(f"docs/v.{kind}", content),)
            if "train" in name:
                setup = (copied("docs/train.txt", f"docs/v.{kind}"),)
            command = text(*TOY, val=f"docs/v.{kind}")
            cases.append(Case(f"{kind}: {name}", command, (f"v.{kind}", *says), setup=setup, lines=2))
    return tuple(cases)


SOUND = (
    ("two files for a split", text(*TOY, "--split", "val=docs/other.txt"), ()),
    (
        "a million spaces",
        text(*TOY, val="docs/v.txt"),
        (written("docs/v.txt", b"a" + b" " * 1_000_000 + b"b\0c"),),
    ),
    (
        "a NUL within a text of JSON",
        text(*TOY, val="docs/v.jsonl"),
        (written("docs/v.jsonl", lines({"text": "a\0b of the words"})),),
    ),
    (
        "a byte order mark and carriage returns",
        text(*TOY, val="docs/v.jsonl"),
        (written("docs/v.jsonl", b'\xef\xbb\xbf{"text": "word of"}\r\n{"text": "and to"}\r\n'),),
    ),
    (
        "another field than text",
        text(*TOY, "--field", "body", val="docs/v.jsonl"),
        (written("docs/v.jsonl", lines({"body": "a word", "text": 5})),),
    ),
    ("documents of one token a shard", text(*TOY, "--shard-tokens", "40"), ()),
    ("more processes than documents", text(*TOY, workers="9"), ()),
    (
        "a killed build's files are there",
        text(*TOY),
        (written("made/.tmp.toy_val_000000.bin", b"half"), written("made/toy_train_000000.bin", b"half")),
    ),
)

# Options that are refused: what is wrong, the options, the exit status, what the error says.
OPTIONS = (
    ("--shard-tokens is zero", ("--shard-tokens", "0"), 2, ("--shard-tokens 0", "choose")),
    ("--shard-tokens is negative", ("--shard-tokens", "-5"), 2, ("--shard-tokens -5", "choose")),
    ("--shard-tokens is huge", ("--shard-tokens", "9" * 30), 2, ("--shard-tokens", "choose")),
    ("--shard-tokens is a word", ("--shard-tokens", "many"), 2, ("--shard-tokens", "'many'")),
    ("--workers is zero", ("--workers", "0"), 2, ("--workers 0", "choose 1")),
    ("--workers is negative", ("--workers", "-1"), 2, ("--workers -1", "choose 1")),
    ("--workers is a fraction", ("--workers", "1.5"), 2, ("--workers", "'1.5'")),
    ("--split has no file", ("--split", "val_news"), 2, ("--split 'val_news'", "NAME=FILE")),
    ("--split has no name", ("--split", "=docs/other.txt"), 2, ("--split ''", "lower-case")),
    ("--split matches another", ("--split", "two_val=docs/other.txt"), 2, ("two_val", "choose another")),
    ("an unknown option", ("--fast",), 2, ("--fast", "--help")),
    ("no such tokenizer", ("--tokenizer", "nope"), 2, ("nope", "give a SentencePiece")),
    ("an unknown format", ("--val", "docs/tokenizer.model"), 2, ("unknown input format", "name it")),
)


def bad_options() -> tuple[Case, ...]:
    """Return a case for each row of OPTIONS; of an option that is given twice, the last counts."""
    return tuple(Case(name, text(*TOY, *words), says, status) for name, words, status, says in OPTIONS)


OTHERS = (
    Case("no options", data("text"), ("--train", "--help")),
    Case("no verb", data(), ("VERB", "--help")),
    Case("an unknown verb", data("fly"), ("'fly'", "--help")),
    Case(
        "download of a negative number",
        data("download", "--train-shards", "-1", "--out", "made"),
        ("--train-shards",),
        2,
    ),
    Case("download of an unknown variant", data("download", "--variant", "x"), ("--variant", "sp1024")),
    Case(
        "--tokenizer is empty",
        text(tokenizer="docs/e.model"),
        ("e.model", "give"),
        2,
        setup=(written("docs/e.model"),),
    ),
    Case(
        "--tokenizer is cut",
        text(tokenizer="docs/e.model"),
        ("e.model", "give"),
        2,
        setup=(copied("docs/tokenizer.model", "docs/e.model"), edited("docs/e.model", cut(900))),
    ),
    Case("--tokenizer is text", text(tokenizer="docs/val.txt"), ("val.txt", "give"), 2),
    Case(
        "--tokenizer is huge",
        with_huge("docs/huge.model", text(tokenizer="docs/huge.model")),
        ("docs/huge.model", "more than"),
    ),
    Case("--tokenizer is a pipe", text(tokenizer="p"), ("p: not a file",), setup=(pipe("p"),)),
    Case(
        "a link stands where a shard is written first",
        text(*TOY),
        ("written",),
        0,
        setup=(written("precious", "x"), linked("made/.tmp.toy_val_000000.bin", "../precious")),
        leaves=MADE,
    ),
    Case(
        "two commands build one folder",
        shell('"$@" >/dev/null 2>&1 & "$@"; wait', *text(*TOY)),
        status=0,
        leaves=MADE,
    ),
    Case(
        "another data set is there", text(*TOY, out="data"), ("data", "holds another dataset", "--replace"), 2
    ),
    Case(
        "a damaged manifest is there",
        text(*TOY, out="data"),
        ("data/manifest.json",),
        2,
        setup=(written("data/manifest.json", "["),),
    ),
    Case(
        "others' shards are there",
        text(*TOY, out="data"),
        ("data", "manifest.json", "--replace"),
        2,
        setup=(removed("data/manifest.json"),),
    ),
    Case(
        "a zstd file is cut",
        text(*TOY, val="docs/v.txt.zst"),
        ("v.txt.zst",),
        2,
        setup=(written("docs/v.txt.zst", b"\x28\xb5\x2f\xfd\x04\x00"),),
    ),
    Case(
        "a zstd file is none",
        text(*TOY, val="docs/v.txt.zst"),
        ("v.txt.zst", "damaged"),
        2,
        setup=(copied("docs/val.txt", "docs/v.txt.zst"),),
    ),
    Case(
        "the folder is locked",
        shell('mkdir locked; flock -n locked "$@"', *text(*TOY, out="locked")),
        ("locked", "wait for it"),
        2,
        leaves=("locked",),
    ),
)


def sound_cases() -> tuple[Case, ...]:
    """Return a case for each row of SOUND: odd input that works."""
    return tuple(
        Case(name, command, ("written",), 0, setup=setup, leaves=MADE) for name, command, setup in SOUND
    )


GROUP = Group("texts", ("docs", "data"), (*bad_files(), *sound_cases(), *bad_options(), *OTHERS))
