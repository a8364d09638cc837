"""Documents, files and arguments that the tests of data/ share."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

import shards

ENGLISH = (
    "the of and to a in is that for it as be on by with this are not or an if from at can which model "
    "token train loss value returns when given function weight learns slowly quickly because every "
    "layer adds its own small correction to the stream"
).split()
ODD = ["caf\u00e9", "3.14", "1984", "\u201cquoted\u201d", "\u65e5\u672c", "\U0001f642"]


def prose(seed, words):
    """Make a document of English words with capitals, digits, line breaks and a few non-ASCII characters."""
    rng = random.Random(seed)
    text = []  # words
    while len(text) < words:
        sentence = [rng.choice(ENGLISH) for _ in range(rng.randint(5, 14))]
        sentence[0] = sentence[0].capitalize()
        if rng.random() < 0.3:
            sentence[2] = rng.choice(ODD)
        text += sentence
        text[-1] += rng.choice([".", ".", ".\n", ".\n\n", "?  "])
    return f"{seed}. " + " ".join(text).strip()


def make_documents(start, count, words=60):
    """Return `count` different documents of about `words` words."""
    return [prose(start + i, words) for i in range(count)]


def write_docs(path, docs, field="text"):
    """Write documents in the format of the file name, .zst as two frames, and return the path."""
    name = str(path)
    if ".jsonl" in name:
        raw = "".join(
            json.dumps({"id": number, field: text}) + "\n" for number, text in enumerate(docs)
        ).encode()
    else:
        raw = "\0".join(docs).encode()
    if name.endswith(".zst"):
        compressor = pytest.importorskip("zstandard").ZstdCompressor()
        raw = compressor.compress(raw[:100]) + compressor.compress(raw[100:])
    path.write_bytes(raw)
    return path


def text_args(train, val, model, out, *more):
    """Return the arguments with which `text` builds a dataset in this process."""
    return [
        *("text", "--train", str(train), "--val", str(val), "--tokenizer", str(model)),
        *("--out", str(out), "--workers", "1", *more),
    ]


def replaced(args, **changes):
    """Return arguments with the values of some options changed."""
    args = list(args)
    for key, value in changes.items():
        args[args.index("--" + key) + 1] = str(value)
    return args


def read_split(out, split):
    """Return all ids of a split, shard after shard."""
    entries = shards.load_manifest(out)["splits"][split]["shards"]
    return np.concatenate([np.array(shards.load_tokens(Path(out) / entry["file"])) for entry in entries])


def documents_in(out, split):
    """Return the documents of a split as lists of ids without BOS."""
    tokens = read_split(out, split)
    starts = np.flatnonzero(tokens == 1)
    assert starts[0] == 0
    return [part[1:].tolist() for part in np.split(tokens, starts[1:])]


def one_line(capsys):
    """Return the error on stderr, which must be one line."""
    lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def content(folder):
    """Return {file name: bytes} of a folder."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
