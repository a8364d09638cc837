"""Tokens: damaged shards and datasets are refused in one line; the loader's stream holds every document."""

import dataclasses
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.helpers import (
    ROOT,
    english_args,
    english_dataset,
    joined,
    machine,
    random_documents,
    shard_folder,
    stop_one_line,
    tiny,
    train_tokenizer,
    write_shard,
)
from tests.rank_cases import run_ranks

# ---------------------------------------------------------------- shards


def test_load_shard_gives_the_tokens(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 65_536, 1000)
    got = t.load_shard(write_shard(tmp_path / "a.bin", tokens))
    assert got.dtype == np.uint16 and np.array_equal(got, tokens)
    with pytest.raises(ValueError):
        got[0] = 1  # read-only
    assert t.shard_tokens(str(tmp_path / "a.bin")) == 1000


# What is wrong with the file: arguments of write_shard, or the bytes that the file gets instead of its own.
FALSE_HEADERS = {
    "magic": dict(magic=20240521),
    "version": dict(version=2),
    "negative count": dict(count=-1),
    "huge count": dict(count=2**31 - 1),
}
FALSE_BYTES = {
    "truncated": lambda raw: raw[:-2],
    "half a token": lambda raw: raw[:-1],
    "longer": lambda raw: raw + b"\0\0",
    "header cut": lambda raw: raw[:1000],
    "empty": lambda raw: b"",
}


@pytest.mark.parametrize("damage", ["missing", *FALSE_HEADERS, *FALSE_BYTES])
def test_a_damaged_shard_is_named(tmp_path, damage):
    path = tmp_path / "x_train_000000.bin"
    if damage != "missing":
        write_shard(path, [1, 2, 3, 4, 5, 6], **FALSE_HEADERS.get(damage, {}))
    if damage in FALSE_BYTES:
        path.write_bytes(FALSE_BYTES[damage](path.read_bytes()))
    with pytest.raises(t.InputError) as e:
        t.load_shard(str(path))
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_a_false_shard_larger_than_the_memory_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "x_train_000000.bin"
    write_shard(path, [1, 2, 3])
    os.truncate(path, 1 << 40)  # takes no room on the disk
    with pytest.raises(t.InputError, match=f"{1 << 40} bytes but its header says 1030"):
        t.load_shard(str(path))
    assert len(t.read_file(str(path))) == 1 << 28


def test_a_token_beyond_the_vocabulary_is_named(tmp_path):
    path = write_shard(tmp_path / "x.bin", [1, 99, 4])
    assert len(t.load_shard(path, 100)) == 3
    with pytest.raises(t.InputError, match="99.*vocab_size 99") as e:
        t.load_shard(path, 99)
    assert path in str(e.value)


def test_a_folder_in_place_of_a_shard_is_named(tmp_path):
    with pytest.raises(t.InputError, match="cannot read"):
        t.load_shard(str(tmp_path))


def test_split_files(tmp_path):
    with pytest.raises(t.InputError, match="no such data folder"):
        t.split_files(str(tmp_path / "none"), "train")
    with pytest.raises(t.InputError, match="_val_"):
        t.split_files(str(tmp_path), "val")
    odd = tmp_path / "we[i]rd *"
    odd.mkdir()
    present = [
        "b_val_000001.bin",
        "b_val_000000.bin",
        "b_train_000000.bin",
        "b_val_x.bin",
        "b_val_000002.txt",
    ]
    for name in present:
        (odd / name).write_bytes(b"")
    names = [Path(f).name for f in t.split_files(str(odd), "val")]
    assert names == ["b_val_000000.bin", "b_val_000001.bin"]


def test_the_name_of_a_split_is_no_pattern(tmp_path):
    write_shard(tmp_path / "x_val_000000.bin", [1, 2, 3])
    assert t.find_shards(str(tmp_path), "*") == []


def test_a_data_folder_whose_name_is_not_utf8_is_read(copy, tmp_path):
    folder = tmp_path / "caf\udce9"
    copy.rename(folder)
    h = tiny(data_path=folder, vocab_size=english_dataset().vocab_size)
    assert len(t.load_dataset(h, trains=True).counts.base) == h.vocab_size


def test_load_split_concatenates_and_cuts(tmp_path):
    write_shard(tmp_path / "x_val_000001.bin", [4, 5, 6])
    write_shard(tmp_path / "x_val_000000.bin", [1, 2, 3])
    assert t.load_split(tiny(data_path=tmp_path), "val").tolist() == [1, 2, 3, 4, 5, 6]
    assert t.load_split(tiny(data_path=tmp_path, val_tokens=3), "val").tolist() == [1, 2, 3, 4]  # 3 targets
    assert t.load_split(tiny(data_path=tmp_path, val_tokens=99), "val").tolist() == [1, 2, 3, 4, 5, 6]


# ---------------------------------------------------------------- a dataset that does not fit together


@pytest.fixture
def copy(tmp_path):
    """Copy the English dataset, to damage it."""
    folder = tmp_path / "data"
    folder.mkdir()
    for file in Path(english_dataset().path).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit_manifest(folder, **changes):
    """Change keys of manifest.json; `tokenizer` changes keys of its entry."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tokenizer"] |= changes.pop("tokenizer", {})
    path.write_text(json.dumps(manifest | changes))


def refuse(folder, capsys, tmp_path, *args):
    """Return the one line with which training refuses the data in `folder`; no log may have been begun."""
    err = stop_one_line([*english_args(data_path=folder, out_dir=tmp_path / "logs"), *args], capsys)
    assert not (tmp_path / "logs").exists(), "a log was begun before the data was checked"
    return err


def test_the_copy_is_accepted_as_it_is(copy):
    data = english_dataset()
    dataset = t.load_dataset(tiny(data_path=copy, vocab_size=data.vocab_size))
    assert len(dataset.counts.base) == data.vocab_size


def remove(folder, pattern):
    for path in folder.glob(pattern):
        path.unlink()


def put_pipe(path):
    """Put a pipe that nobody writes to in place of a file."""
    path.unlink()
    os.mkfifo(path)


def refill(folder, pattern, tokens):
    """Write other tokens into the shards that match a pattern."""
    for path in folder.glob(pattern):
        write_shard(path, tokens)


class Damage(NamedTuple):
    """What is done to a dataset's folder, and the words of the line that refuses it."""

    do: Callable
    words: list[str]


DAMAGES = {
    "empty folder": Damage(lambda f: remove(f, "*"), ["_val_"]),
    "no val": Damage(lambda f: remove(f, "*_val_*"), ["_val_"]),
    "no train": Damage(lambda f: remove(f, "*_train_*"), ["_train_"]),
    "no tokenizer": Damage(lambda f: remove(f, "tokenizer.model"), ["tokenizer.model"]),
    "tokenizer junk": Damage(lambda f: (f / "tokenizer.model").write_bytes(b"junk"), ["tokenizer.model"]),
    "no manifest": Damage(lambda f: remove(f, "manifest.json"), ["manifest.json", "tokenizer_path"]),
    "manifest cut": Damage(lambda f: (f / "manifest.json").write_text("{"), ["manifest.json"]),
    "manifest list": Damage(lambda f: (f / "manifest.json").write_text("[]"), ["manifest.json"]),
    "manifest empty": Damage(lambda f: (f / "manifest.json").write_text("{}"), ["manifest.json"]),
    "manifest binary": Damage(lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), ["manifest.json"]),
    "tokenizer sha": Damage(
        lambda f: edit_manifest(f, tokenizer={"sha256": "0" * 64}),
        ["tokenizer.model", "manifest.json", "sha256"],
    ),
    "manifest bos": Damage(lambda f: edit_manifest(f, bos_id=2), ["bos_id"]),
    "manifest bos text": Damage(lambda f: edit_manifest(f, bos_id="1"), ["manifest.json", "bos_id"]),
    "manifest deep": Damage(lambda f: (f / "manifest.json").write_text("[" * 100_000), ["manifest.json"]),
    "manifest pipe": Damage(lambda f: put_pipe(f / "manifest.json"), ["manifest.json", "not a file"]),
    "tokenizer sha type": Damage(
        lambda f: edit_manifest(f, tokenizer={"sha256": 5}), ["manifest.json", "sha256"]
    ),
    "tokenizer sha none": Damage(
        lambda f: edit_manifest(f, tokenizer={"sha256": None}),
        ["manifest.json", "sha256"],
    ),
    "tokenizer file type": Damage(
        lambda f: edit_manifest(f, tokenizer={"file": 7}), ["manifest.json", "file"]
    ),
    "tokenizer pipe": Damage(lambda f: put_pipe(f / "tokenizer.model"), ["tokenizer.model", "not a file"]),
    "val pipe": Damage(lambda f: put_pipe(f / "tiny_val_000000.bin"), ["tiny_val_000000.bin", "not a file"]),
    "train link": Damage(
        lambda f: (f / "tiny_train_000009.bin").symlink_to("gone"), ["_train_000009", "a link"]
    ),
    "train folder": Damage(lambda f: (f / "tiny_train_000009.bin").mkdir(), ["_train_000009", "not a file"]),
    "short val": Damage(lambda f: refill(f, "*_val_*", [1] * 20), ["val", "eval_seq_len"]),
    "short train": Damage(lambda f: refill(f, "*_train_*", [1] * 9), ["train", "sequence"]),
    "token too large": Damage(lambda f: refill(f, "*_train_*", [1, 2, 60_000] * 99), ["_train_", "60000"]),
    "no bos": Damage(lambda f: refill(f, "*_train_*", [5] * 999), ["train", "no shard", "bos_id"]),
    "train cut": Damage(
        lambda f: cut(f / "tiny_train_000001.bin"), ["tiny_train_000001.bin", "its header says"]
    ),
    "val cut": Damage(lambda f: cut(f / "tiny_val_000000.bin"), ["tiny_val_000000.bin", "its header says"]),
    "val junk": Damage(lambda f: (f / "tiny_val_000000.bin").write_bytes(b"x" * 9999), ["not a token shard"]),
    "val token": Damage(
        lambda f: refill(f, "*_val_*", [1, 2, 60_000] * 99), ["tiny_val_000000.bin", "60000"]
    ),
}


def cut(path):
    """Remove the last token of a shard."""
    os.truncate(path, path.stat().st_size - 2)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_dataset_that_does_not_fit_is_one_line_and_leaves_no_log(copy, name, capsys, tmp_path):
    damage = DAMAGES[name]
    damage.do(copy)
    err = refuse(copy, capsys, tmp_path)
    assert all(word in err for word in damage.words), err


@pytest.mark.parametrize(
    "tokenizer",
    [{"file": None}, {"encoding": "no_such_encoding", "kind": "tiktoken"}],
    ids=["no file", "unknown encoding"],
)
def test_a_manifest_whose_tokenizer_cannot_be_had_is_one_line(copy, tokenizer, capsys, tmp_path):
    edit_manifest(copy, tokenizer=tokenizer)
    refuse(copy, capsys, tmp_path)


def list_shards(folder):
    """Make the manifest list the shards of all splits, as data/ does."""
    splits = {}
    for path in sorted(folder.glob("*.bin")):
        entry = {
            "file": path.name,
            "tokens": t.shard_tokens(str(path)),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        split = splits.setdefault(path.name.split("_")[1], {"tokens": 0, "shards": []})
        split["shards"].append(entry)
        split["tokens"] += entry["tokens"]
    edit_manifest(folder, splits=splits)


def edit_split(folder, split, **changes):
    """Change an entry of the manifest's splits; a shard's keys are those of its first shard."""
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    splits[split]["shards"][0] |= changes.pop("shard", {})
    splits[split] |= changes
    edit_manifest(folder, splits=splits)


def flip_a_bit(path):
    """Change a token of a shard into another one of the vocabulary."""
    blob = bytearray(path.read_bytes())
    blob[1024 + 2 * 50] ^= 1
    path.write_bytes(blob)


def add_shard(folder, split):
    """Write a shard that the manifest does not list."""
    write_shard(folder / f"tiny_{split}_000007.bin", [1, 5, 6] * 50)


# Done to a dataset whose manifest lists its shards.
DISAGREEMENTS = {
    "val missing": Damage(
        lambda f: remove(f, "*_val_000001.bin"),
        ["tiny_val_000001.bin is missing", "1 of 2 val"],
    ),
    "train missing": Damage(
        lambda f: remove(f, "*_train_000001.bin"), ["tiny_train_000001.bin", "1 of 2 train"]
    ),
    "val extra": Damage(lambda f: add_shard(f, "val"), ["tiny_val_000007.bin", "does not list it"]),
    "train extra": Damage(lambda f: add_shard(f, "train"), ["tiny_train_000007.bin", "does not list it"]),
    "val length": Damage(
        lambda f: refill(f, "*_val_000000.bin", [1] * 99), ["tiny_val_000000.bin", "length"]
    ),
    "train length": Damage(
        lambda f: refill(f, "*_train_000000.bin", [1] * 99), ["tiny_train_000000", "length"]
    ),
    "val flipped": Damage(lambda f: flip_a_bit(f / "tiny_val_000001.bin"), ["tiny_val_000001.bin", "sha256"]),
    "val total": Damage(lambda f: edit_split(f, "val", tokens=7), ["manifest.json", "val has 7 tokens"]),
    "splits are a list": Damage(lambda f: edit_manifest(f, splits=[]), ["manifest.json", "bad entry", "val"]),
    "splits are null": Damage(lambda f: edit_manifest(f, splits=None), ["manifest.json", "bad entry"]),
    "a split is a list": Damage(
        lambda f: edit_manifest(f, splits={"val": []}), ["manifest.json", "bad entry"]
    ),
    "train is a list": Damage(lambda f: edit_manifest(f, splits={"train": [1]}), ["manifest.json", "train"]),
    "shards are a number": Damage(lambda f: edit_split(f, "val", shards=3), ["manifest.json", "bad entry"]),
    "shards are names": Damage(lambda f: edit_split(f, "val", shards=["a"]), ["manifest.json", "bad entry"]),
    "tokens are text": Damage(
        lambda f: edit_split(f, "val", shard={"tokens": "9"}),
        ["manifest.json", "bad entry"],
    ),
    "a file is a list": Damage(
        lambda f: edit_split(f, "val", shard={"file": []}), ["manifest.json", "bad entry"]
    ),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_files_that_disagree_with_the_manifest_are_one_line(copy, name, capsys, tmp_path):
    shutil.copy(copy / "tiny_val_000000.bin", copy / "tiny_val_000001.bin")
    list_shards(copy)
    h = tiny(data_path=copy, vocab_size=english_dataset().vocab_size, report_split="other")
    t.load_dataset(h, trains=True)
    damage = DISAGREEMENTS[name]
    damage.do(copy)
    err = refuse(copy, capsys, tmp_path)
    assert all(word in err for word in damage.words), err


def test_a_report_split_is_compared_with_the_manifest_and_eval_needs_no_train_files(copy):
    list_shards(copy)
    remove(copy, "*_train_*")
    h = tiny(data_path=copy, vocab_size=english_dataset().vocab_size, report_split="other")
    t.load_dataset(h)
    flip_a_bit(copy / "tiny_other_000000.bin")
    with pytest.raises(t.InputError, match=r"tiny_other_000000\.bin: its sha256 disagrees"):
        t.load_dataset(h)
    t.load_dataset(dataclasses.replace(h, report_split=""))


def test_a_manifest_without_a_tokenizer_file_is_one_line(copy, capsys, tmp_path):
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["tokenizer"]["file"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    refuse(copy, capsys, tmp_path)


def test_vocab_size_and_bos_id_must_be_the_tokenizers(copy, capsys, tmp_path):
    err = refuse(copy, capsys, tmp_path, "vocab_size=1024")
    assert f"vocab_size={english_dataset().vocab_size}" in err  # says what to set
    err = refuse(copy, capsys, tmp_path, "bos_id=2")
    assert "bos_id=1" in err


def test_a_vocabulary_may_be_padded_to_a_multiple_of_128(copy, capsys, tmp_path):
    size = english_dataset().vocab_size
    padded = -(-size // 128) * 128
    assert size < padded
    dataset = t.load_dataset(tiny(data_path=copy, vocab_size=padded))
    assert len(dataset.counts.base) == size
    for other in (padded - 1, padded + 128):
        assert f"vocab_size={size}, or {padded}," in refuse(copy, capsys, tmp_path, f"vocab_size={other}")


def test_no_text_has_a_token_of_the_padding(copy, capsys, tmp_path):
    size = english_dataset().vocab_size
    write_shard(copy / "tiny_val_000000.bin", [*english_dataset().val, size])
    err = refuse(copy, capsys, tmp_path, f"vocab_size={-(-size // 128) * 128}")
    assert f"token {size} >= vocab_size {size}" in err


def test_another_tokenizer_is_refused(copy, capsys, tmp_path):
    other = train_tokenizer(tmp_path / "other.model", ["a quite different text of few words " * 3], 300)
    err = refuse(copy, capsys, tmp_path, f"tokenizer_path={other}")
    assert "other.model" in err and "sha256" in err
    refuse(copy, capsys, tmp_path, f"tokenizer_path={tmp_path}/none.model")


def test_a_report_split_is_checked_before_training(copy, capsys, tmp_path):
    assert "_nosuch_" in refuse(copy, capsys, tmp_path, "report_split=nosuch")
    write_shard(copy / "tiny_short_000000.bin", [1, 2, 3])
    assert "short" in refuse(copy, capsys, tmp_path, "report_split=short")


# ---------------------------------------------------------------- the loader


def loader(folder, rank=0, world=1, **knobs):
    """Return a rank's loader of the shards in `folder`."""
    return t.TokenLoader(tiny(data_path=folder, **knobs), machine(rank, world))


def epoch_documents(stream, h):
    """Cut a stream that begins with BOS into its documents."""
    starts = np.flatnonzero(stream == h.bos_id)
    assert starts[0] == 0
    return [tuple(d) for d in np.split(stream, starts[1:])]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Write three shards; return their folder and their documents."""
    folder = tmp_path_factory.mktemp("shards") / "data"
    groups = shard_folder(folder, tiny(), [17, 30, 5], seed=3)
    return folder, [tuple(d) for g in groups for d in g]


def test_an_epoch_is_a_permutation_of_whole_documents(shards):
    folder, documents = shards
    data = loader(folder)
    assert data.total == sum(map(len, documents))
    orders = []
    for epoch in range(3):
        got = epoch_documents(data.read(epoch * data.total, data.total), data.h)
        assert sorted(got) == sorted(documents)
        orders.append(got)
    assert orders[0] != documents and orders[0] != orders[1] != orders[2] != orders[0]


def test_documents_are_shuffled_inside_shards_and_shards_among_each_other(shards):
    folder, documents = shards
    shard_of = dict(zip(documents, np.repeat([0, 1, 2], [17, 30, 5]).tolist()))
    visits = set()
    within = set()
    for seed in range(8):
        data = loader(folder, seed=seed)
        got = epoch_documents(data.read(0, data.total), data.h)
        order = [shard_of[d] for d in got]
        visits.add(tuple(dict.fromkeys(order)))
        assert len([1 for a, b in zip(order, order[1:]) if a != b]) == 2  # one shard at a time
        within.add(tuple(d for d in got if shard_of[d] == 1))
    assert len(visits) > 1 and len(within) == 8


def test_every_use_of_random_numbers_has_its_own_stream():
    """Seeds [seed, epoch] and [seed, epoch, 0] are one stream to NumPy: no two keys may share one."""
    keys = [
        (use, *numbers)
        for use in t.RandomUse
        for n in range(3)
        for numbers in ((n,), (n, 0), (n, 0, 0), (n, 1))
    ]
    first = {tuple(t.random_stream(seed, *key).integers(0, 1 << 63, 4)) for seed in (0, 7) for key in keys}
    assert len(first) == 2 * len(keys)
    again = [t.random_stream(7, t.RandomUse.SHARDS, 2).integers(0, 1 << 63, 4).tolist() for _ in range(2)]
    assert again[0] == again[1]


def test_shards_and_documents_are_shuffled_apart(tmp_path):
    """With as many shards as documents in the first one, the two orders were equal."""
    shard_folder(tmp_path, tiny(), [9] * 9, seed=3)
    data = loader(tmp_path)
    for epoch in range(3):
        starts = data.document_order(epoch, 0).starts
        assert np.argsort(np.argsort(starts)).tolist() != data.shard_order(epoch).shards.tolist()


def test_the_seed_decides_the_order(shards):
    streams = [loader(shards[0], seed=s).read(0, 500) for s in (1, 1, 2)]
    assert np.array_equal(streams[0], streams[1])
    assert not np.array_equal(streams[0], streams[2])


def test_read_is_one_stream_across_shards_and_epochs(shards):
    data = loader(shards[0])
    whole = data.read(0, 3 * data.total + 50)
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 3 * data.total, 200).tolist()
    counts = rng.integers(1, 50, 200).tolist()
    spans = [*zip(positions, counts), (0, data.total)]
    for bound in (data.total, 2 * data.total, 3 * data.total):
        spans += [(bound - 1, 2), (bound, 1), (bound - 20, 40)]
    for position, count in spans:
        got = data.read(position, count)
        assert np.array_equal(got, whole[position : position + count]), (position, count)
    fresh = loader(shards[0])  # nothing depends on what was read before
    assert np.array_equal(fresh.read(2 * data.total + 7, 30), whole[2 * data.total + 7 :][:30])


def test_text_before_the_first_bos_of_a_shard_is_a_fragment_with_its_own_start(tmp_path):
    """A published shard may begin inside a document, or hold only a part of one."""
    h = tiny()
    documents = random_documents(h, 12, 1)
    heads = [[7, 8, 9], [10, 11, 12, 13]]
    part = [20, 21, 22, 23, 24] * 5
    write_shard(tmp_path / "x_train_000000.bin", heads[0] + joined(documents[:6]))
    write_shard(tmp_path / "x_train_000001.bin", part)
    write_shard(tmp_path / "x_train_000002.bin", heads[1] + joined(documents[6:9]))
    write_shard(tmp_path / "x_train_000003.bin", joined(documents[9:]))
    expected = sorted(tuple(d) for d in [*documents, *([h.bos_id, *text] for text in [*heads, part])])
    for world in (1, 2):  # which checks other files on each rank
        for rank in range(world):
            data = loader(tmp_path, rank, world)
            assert data.total == sum(map(len, expected))
            for epoch in range(3):
                stream = data.read(epoch * data.total, data.total)
                assert sorted(epoch_documents(stream, h)) == expected

    whole = data.read(0, 3 * data.total)
    for position in range(2 * data.total):
        for count in (1, 2, 7):
            assert np.array_equal(data.read(position, count), whole[position : position + count])


def test_a_fragment_is_a_document_under_doc_mask(tmp_path):
    """The model's own numbering of documents sees the fragment's start."""
    h = tiny(doc_mask=1, mix_tokens=0)
    write_shard(tmp_path / "x_train_000000.bin", [7] * 40)
    write_shard(tmp_path / "x_train_000001.bin", [h.bos_id] + [9] * 39)
    data = loader(tmp_path, doc_mask=1, mix_tokens=0)
    stream = torch.from_numpy(data.read(0, data.total))
    assert len(stream) == 81
    numbers = t.number_documents(stream[None], h.bos_id)[0]
    assert len({(int(n), int(x)) for n, x in zip(numbers, stream) if x != h.bos_id}) == 2


def global_batch(batches):
    """Join the ranks' batches, [rank][micro-batch], into (sequences, T + 1) in the global batch's order."""
    return torch.cat([micro_batch for of_all_ranks in zip(*batches) for micro_batch in of_all_ranks])


def stream_sequences(data, first, count):
    """Return sequences [first, first + count) of the stream, as tuples."""
    T = data.h.train_seq_len
    stream = data.read(first * T, count * T + 1)
    return [tuple(stream[i * T : i * T + T + 1]) for i in range(count)]


@pytest.mark.parametrize("mix_tokens,span", [(0, 1), (127, 1), (400, 3), (10**9, None)])
def test_batches_share_out_the_sequences_of_a_stretch_of_the_stream(shards, mix_tokens, span):
    """Each sequence comes once, in an order that the seed decides, from at most the whole split.

    span: batches that draw from one stretch; None: as many as the split has.
    """
    data = loader(shards[0], mix_tokens=mix_tokens)
    count = data.h.train_batch_tokens // data.h.train_seq_len
    if span is None:
        assert data.deal_batches == data.total // data.h.train_batch_tokens > 3
    else:
        assert data.deal_batches == span

    orders = []
    for deal in range(5 if span else 2):  # into the next epoch
        wanted = stream_sequences(data, deal * data.deal_batches * count, data.deal_batches * count)
        got = []
        for _ in range(data.deal_batches):
            batch = global_batch([data.next()])
            assert batch.dtype == torch.int64 and batch.shape == (count, data.h.train_seq_len + 1)
            got += [tuple(sequence) for sequence in batch.numpy()]
        assert sorted(got) == sorted(wanted) and (got == wanted) == (span == 1)
        orders.append([wanted.index(sequence) for sequence in got])
    assert (orders[0] != orders[1]) == (span != 1)

    again = loader(shards[0], mix_tokens=mix_tokens)
    other = loader(shards[0], mix_tokens=mix_tokens, seed=99)
    assert not torch.equal(global_batch([other.next()]), global_batch([again.next()]))


def test_a_book_does_not_fill_a_batch(tmp_path):
    """In order, a document of eight batches fills seven; drawn from all text, it is a quarter of each."""
    h = tiny()
    book = [h.bos_id] + [h.bos_id + 1] * (8 * h.train_batch_tokens)
    letters = [[h.bos_id] + [h.bos_id + 2] * 30 for _ in range(24 * h.train_batch_tokens // 31)]
    text = joined(letters[:200]) + book + joined(letters[200:])
    write_shard(tmp_path / "x_train_000000.bin", text)

    def shares_of_the_book(mix_tokens):
        """Return the book's share of each batch of an epoch."""
        data = loader(tmp_path, mix_tokens=mix_tokens)
        batches = [global_batch([data.next()]) for _ in range(data.total // h.train_batch_tokens)]
        return [float((batch == h.bos_id + 1).float().mean()) for batch in batches]

    in_order = shares_of_the_book(0)
    assert max(in_order) == 1.0
    assert sum(share > 0 for share in in_order) <= 9
    drawn = shares_of_the_book(10**9)
    assert max(drawn) <= 0.8  # measured: 0.625
    assert sum(share > 0 for share in drawn) >= 20


@pytest.mark.parametrize("micro", [16, 32, 64, 128])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_world_or_micro_batch(shards, world, micro):
    reference = loader(shards[0])
    loaders = [loader(shards[0], r, world, micro_batch_tokens=micro) for r in range(world)]
    assert all(x.shape.accum * x.shape.sequences * world * 16 == 128 for x in loaders)
    assert loaders[0].shape.sequences * 16 <= micro
    for _ in range(5):
        assert torch.equal(global_batch([x.next() for x in loaders]), global_batch([reference.next()]))


def test_the_batch_must_cut_into_micro_batches(shards):
    h = tiny(data_path=shards[0], train_batch_tokens=16 * 12, micro_batch_tokens=16 * 4)
    t.TokenLoader(h, machine(0, 1))
    t.TokenLoader(h, machine(0, 3))
    h = tiny(data_path=shards[0], train_batch_tokens=16 * 10, micro_batch_tokens=16 * 2)
    with pytest.raises(t.InputError, match="micro_batch_tokens"):
        t.TokenLoader(h, machine(0, 2))  # 5 sequences a rank in micro-batches of 2


def test_seek_is_exact(shards):
    data = loader(shards[0])
    first = [global_batch([data.next()]) for _ in range(12)]
    assert data.index == 12 * data.shape.accum
    for n in (0, 11, 5, 5):
        data.seek(n * data.shape.accum)
        assert torch.equal(global_batch([data.next()]), first[n]) and data.index == (n + 1) * data.shape.accum
    assert torch.equal(global_batch([data.next()]), first[6])


def test_batches_are_not_views_of_one_buffer(shards):
    data = loader(shards[0])
    first = data.next()
    kept = [x.clone() for x in first]
    for x in data.next():
        x.zero_()
    assert all(torch.equal(a, b) for a, b in zip(first, kept))


def test_an_error_of_the_prefetch_thread_reaches_next(tmp_path):
    shard_folder(tmp_path, tiny(), [30], seed=1)
    path = write_shard(tmp_path / "x_train_000001.bin", [1, 5, 50] * 2000)
    data = loader(tmp_path, iterations=1)
    data.read(0, data.total)
    data.pending.result()  # the thread does not read while the file is written
    write_shard(path, [1, 5, 500] * 2000)  # damaged later: 500 >= vocab_size
    with pytest.raises(t.InputError, match=r"x_train_000001\.bin.*500"):
        for _ in range(60):
            data.next()


def test_a_shard_that_is_cut_while_it_is_read_is_named(tmp_path):
    """A mapped file would end the process with SIGBUS."""
    documents = [[1] + [7] * 5000 for _ in range(20)]
    path = Path(write_shard(tmp_path / "x_train_000000.bin", joined(documents)))
    data = loader(tmp_path)
    data.read(0, data.total)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(t.InputError, match=r"x_train_000000\.bin: cut during the run; .*prepare it again$"):
        data.read(0, data.total)
    path.unlink()
    with pytest.raises(t.InputError, match=r"x_train_000000\.bin: cut during the run"):  # the file it opened
        data.read(0, data.total)
    data.open_file.cache_clear()
    with pytest.raises(t.InputError, match=r"x_train_000000\.bin: cannot read the shard \(No such file"):
        data.read(0, data.total)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning", "error::ResourceWarning")
def test_a_loader_leaves_no_shard_open(tmp_path, monkeypatch):
    monkeypatch.setattr(t, "OPEN_SHARDS", 2)
    for shard in range(5):
        write_shard(tmp_path / f"x_train_{shard:06d}.bin", joined([[1] + [7] * 500 for _ in range(20)]))
    data = loader(tmp_path)
    data.read(0, data.total)
    data.pending.result(timeout=10)
    files = [data.open_file(shard) for shard in range(5)]  # three of which the cache has dropped
    opened = weakref.WeakSet(files)
    del files
    assert len(opened) == 2
    del data
    gc.collect()
    assert len(opened) == 0


def test_a_shard_that_another_replaces_during_the_run(tmp_path):
    """The run goes on with the file it opened. One that it has not read yet must have the same length."""
    groups = shard_folder(tmp_path / "data", tiny(), [40, 40], seed=1)
    data = loader(tmp_path / "data")
    data.pending.result()
    before = data.read(0, data.total)
    other = write_shard(tmp_path / "other.bin", [1] + [9] * 99)
    for path in data.files:
        shutil.copyfile(other, tmp_path / "copy")
        os.replace(tmp_path / "copy", path)
    assert np.array_equal(data.read(0, data.total), before)
    with pytest.raises(t.InputError, match=r"x_train_00000\d\.bin: changed during the run"):
        data.read(data.total, data.total)
    assert len(before) == sum(map(len, joined(groups)))


def test_a_damaged_shard_is_found_before_training(tmp_path):
    """One rank finds it at the start, not in the middle of a run, and all ranks say so."""
    shard_folder(tmp_path, tiny(), [300, 300, 300, 300], seed=1)
    write_shard(tmp_path / "x_train_000002.bin", [1, 5, 500] * 100)
    for world in (1, 2, 4):
        said = run_ranks(refused_at_the_start, world, str(tmp_path))
        assert len(set(said)) == 1 and "x_train_000002.bin" in said[0], said


def refused_at_the_start(rank, folder):
    """Return why a rank refuses the train split in `folder`, "" if it does not."""
    h = tiny(data_path=folder)
    try:
        t.check_train_split(h, t.init_machine(h, os.environ))
    except t.InputError as e:
        return str(e)
    return ""


def test_a_split_without_bos_is_refused_at_the_start(tmp_path):
    for i in range(2):
        write_shard(tmp_path / f"x_train_{i:06d}.bin", [5, 6, 7] * 50)
    for world in (1, 2):
        said = run_ranks(refused_at_the_start, world, str(tmp_path))
        assert all("no shard of the train split has a document start (bos_id=1)" in text for text in said)
    write_shard(tmp_path / "x_train_000002.bin", [1, 6, 7] * 50)  # of rank 0
    assert run_ranks(refused_at_the_start, 2, str(tmp_path)) == ["", ""]
    assert loader(tmp_path).next()


READS_300_SHARDS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import train_gpt as t
from tests.helpers import machine, tiny
h = tiny(data_path=sys.argv[1], mix_tokens=10**9, val_tokens=0)
data = t.TokenLoader(h, machine())
before = data.read(0, 2 * data.total)
for _ in range(2 * data.deal_batches):
    data.next()
assert (data.read(0, 2 * data.total) == before).all()
print(len(data.files), len(t.load_split(h, "val")))
"""


def test_300_shards_need_few_file_descriptors(tmp_path):
    """256 is macOS's limit. Every shard is visited, and visited again."""
    shard_folder(tmp_path, tiny(), [3] * 300, seed=1)
    shard_folder(tmp_path, tiny(), [1] * 300, seed=2, split="val")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", READS_300_SHARDS, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files, tokens = map(int, done.stdout.split())
    assert files == 300 and tokens > 300


def test_a_train_split_shorter_than_a_sequence_is_refused(tmp_path):
    write_shard(tmp_path / "x_train_000000.bin", [1] * 16)
    with pytest.raises(t.InputError, match="16 tokens"):
        loader(tmp_path)
    assert "16 tokens" in run_ranks(refused_at_the_start, 1, str(tmp_path))[0]
    write_shard(tmp_path / "x_train_000000.bin", [1] * 17)
    assert len(loader(tmp_path).next()) == 4
