"""Tokens: what a damaged dataset says, and what the loader's stream holds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt as t
from helpers import (
    english_args,
    english_dataset,
    machine,
    random_documents,
    shard_folder,
    stop_one_line,
    tiny,
    train_tokenizer,
    write_shard,
)

# ---------------------------------------------------------------- shards


def test_load_shard_gives_the_tokens(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 65_536, 1000)
    got = t.load_shard(write_shard(tmp_path / "a.bin", tokens))
    assert got.dtype == np.uint16 and np.array_equal(got, tokens)
    with pytest.raises(ValueError):
        got[0] = 1  # read-only
    assert t.shard_tokens(str(tmp_path / "a.bin")) == 1000


def damaged(path, how):
    tokens = [1, 2, 3, 4, 5, 6]
    if how == "missing":
        return
    write_shard(
        path,
        tokens,
        magic=20240521 if how == "magic" else 20240520,
        version=2 if how == "version" else 1,
        count={"negative count": -1, "huge count": 2**31 - 1}.get(how),
    )
    raw = path.read_bytes()
    cut = {"truncated": raw[:-2], "half a token": raw[:-1], "longer": raw + b"\0\0", "header cut": raw[:1000]}
    path.write_bytes(cut.get(how, b"" if how == "empty" else raw))


HOWS = ["missing", "magic", "version", "truncated", "half a token", "longer", "header cut", "empty"]


@pytest.mark.parametrize("how", [*HOWS, "negative count", "huge count"])
def test_a_damaged_shard_is_named(tmp_path, how):
    path = tmp_path / "x_train_000000.bin"
    damaged(path, how)
    with pytest.raises(t.InputError) as e:
        t.load_shard(str(path))
    assert str(path) in str(e.value) and "\n" not in str(e.value)


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
    for name in (
        "b_val_000001.bin",
        "b_val_000000.bin",
        "b_train_000000.bin",
        "b_val_x.bin",
        "b_val_000002.txt",
    ):
        (odd / name).write_bytes(b"")
    names = [Path(f).name for f in t.split_files(str(odd), "val")]
    assert names == ["b_val_000000.bin", "b_val_000001.bin"]


def test_load_split_concatenates_and_cuts(tmp_path):
    write_shard(tmp_path / "x_val_000001.bin", [4, 5, 6])
    write_shard(tmp_path / "x_val_000000.bin", [1, 2, 3])
    assert t.load_split(tiny(data_path=tmp_path), "val").tolist() == [1, 2, 3, 4, 5, 6]
    assert t.load_split(tiny(data_path=tmp_path, val_tokens=3), "val").tolist() == [1, 2, 3, 4]  # 3 targets
    assert t.load_split(tiny(data_path=tmp_path, val_tokens=99), "val").tolist() == [1, 2, 3, 4, 5, 6]


# ---------------------------------------------------------------- a dataset that does not fit together


@pytest.fixture
def copy(tmp_path):
    """A copy of the English dataset to damage."""
    folder = tmp_path / "data"
    folder.mkdir()
    for file in Path(english_dataset().path).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tokenizer"] |= changes.pop("tokenizer", {})
    path.write_text(json.dumps(manifest | changes))


def refuse(folder, capsys, tmp_path, *args):
    """The one line of a training on `folder`; no log may have been begun."""
    err = stop_one_line([*english_args(data_path=folder, out_dir=tmp_path / "logs"), *args], capsys)
    assert not (tmp_path / "logs").exists(), "a log was begun before the data was checked"
    return err


def test_the_copy_is_accepted_as_it_is(copy):
    data = english_dataset()
    dataset = t.load_dataset(tiny(data_path=copy, vocab_size=data.vocab_size))
    assert len(dataset.counts.base) == data.vocab_size


@pytest.mark.parametrize(
    "damage,words",
    [
        (lambda f: [p.unlink() for p in f.iterdir()], ["_val_"]),
        (lambda f: [p.unlink() for p in f.glob("*_val_*")], ["_val_"]),
        (lambda f: [p.unlink() for p in f.glob("*_train_*")], ["_train_"]),
        (lambda f: (f / "tokenizer.model").unlink(), ["tokenizer.model"]),
        (lambda f: (f / "tokenizer.model").write_bytes(b"junk"), ["tokenizer.model"]),
        (lambda f: (f / "manifest.json").unlink(), ["manifest.json", "tokenizer_path"]),
        (lambda f: (f / "manifest.json").write_text("{"), ["manifest.json"]),
        (lambda f: (f / "manifest.json").write_text("[]"), ["manifest.json"]),
        (lambda f: (f / "manifest.json").write_text("{}"), ["manifest.json"]),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), ["manifest.json"]),
        (lambda f: edit_manifest(f, tokenizer={"sha256": "0" * 64}), ["tokenizer.model", "manifest.json", "sha256"]),
        (lambda f: edit_manifest(f, bos_id=2), ["bos_id"]),
        (lambda f: write_shard(f / "tiny_val_000000.bin", [1] * 20), ["val", "eval_seq_len"]),
        (lambda f: [write_shard(f / f"tiny_train_00000{i}.bin", [1] * 9) for i in (0, 1)], ["train", "sequence"]),
        (lambda f: [write_shard(p, [1, 2, 60_000] * 99) for p in f.glob("*_train_*")], ["_train_", "60000"]),
        (lambda f: [write_shard(p, [5] * 999) for p in f.glob("*_train_*")], ["_train_", "bos_id"]),
    ],
    ids=[
        "empty folder", "no val", "no train", "no tokenizer", "tokenizer junk", "no manifest", "manifest cut",
        "manifest list", "manifest empty", "manifest binary", "tokenizer sha", "manifest bos", "short val",
        "short train", "token too large", "no bos",
    ],
)  # fmt: skip
def test_a_dataset_that_does_not_fit_is_one_line(copy, damage, words, capsys, tmp_path, request):
    damage(copy)
    late = request.node.callspec.id in ("no train", "short train", "token too large", "no bos")
    argv = [*english_args(data_path=copy, out_dir=tmp_path / "logs")]
    err = stop_one_line(argv, capsys) if late else refuse(copy, capsys, tmp_path)
    assert all(w in err for w in words), err


@pytest.mark.parametrize(
    "tokenizer",
    [{"file": None}, {"encoding": "no_such_encoding", "kind": "tiktoken"}],
    ids=["no file", "unknown encoding"],
)
def test_a_manifest_whose_tokenizer_cannot_be_had_is_one_line(copy, tokenizer, capsys, tmp_path):
    edit_manifest(copy, tokenizer=tokenizer)
    refuse(copy, capsys, tmp_path)


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
    return t.TokenLoader(tiny(data_path=folder, **knobs), machine(rank, world))


def epoch_documents(stream, h):
    """The stream's documents, cut at BOS."""
    starts = np.flatnonzero(stream == h.bos_id)
    assert starts[0] == 0
    return [tuple(d) for d in np.split(stream, starts[1:])]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
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
    home = {d: 0 if i < 17 else 1 if i < 47 else 2 for i, d in enumerate(documents)}
    visits, within = set(), set()
    for seed in range(8):
        data = loader(folder, seed=seed)
        got = epoch_documents(data.read(0, data.total), data.h)
        order = [home[d] for d in got]
        visits.add(tuple(dict.fromkeys(order)))
        assert len([1 for a, b in zip(order, order[1:]) if a != b]) == 2  # one shard at a time
        within.add(tuple(d for d in got if home[d] == 1))
    assert len(visits) > 1 and len(within) == 8


def test_the_seed_decides_the_order(shards):
    streams = [loader(shards[0], seed=s).read(0, 500) for s in (1, 1, 2)]
    assert np.array_equal(streams[0], streams[1]) and not np.array_equal(streams[0], streams[2])


def test_read_is_one_stream_across_shards_and_epochs(shards):
    data = loader(shards[0])
    whole = data.read(0, 3 * data.total + 50)
    rng = np.random.default_rng(0)
    spans = [(int(a), int(b)) for a, b in zip(rng.integers(0, 3 * data.total, 200), rng.integers(1, 50, 200))]
    bounds = [k * data.total for k in (1, 2, 3)]
    spans += (
        [(b - 1, 2) for b in bounds]
        + [(b, 1) for b in bounds]
        + [(b - 20, 40) for b in bounds]
        + [(0, data.total)]
    )
    for position, count in spans:
        assert np.array_equal(data.read(position, count), whole[position : position + count]), (
            position,
            count,
        )
    fresh = loader(shards[0])  # nothing depends on what was read before
    assert np.array_equal(fresh.read(2 * data.total + 7, 30), whole[2 * data.total + 7 :][:30])


def test_text_before_the_first_bos_of_a_shard_is_kept(tmp_path):
    """The published shards are cut anywhere: a shard may begin inside a document."""
    h = tiny()
    documents = random_documents(h, 6, 1)
    head = [7, 8, 9]
    write_shard(tmp_path / "x_train_000000.bin", head + sum(documents, []))
    data = loader(tmp_path)
    stream = data.read(0, data.total).tolist()
    assert sorted(stream) == sorted(head + sum(documents, []))
    text = ",".join(map(str, stream)) + ","
    assert all(",".join(map(str, d)) + "," in text for d in [head, *documents])


def global_batch(batches):
    """Rank batches [rank][micro] -> the rows in order of their index: micro-batch, then rank."""
    rows = [micro for a in range(len(batches[0])) for micro in (b[a] for b in batches)]
    return torch.cat(rows)


def stream_rows(data, first, count):
    """Rows [first, first + count) of the stream, as tuples."""
    T = data.h.train_seq_len
    stream = data.read(first * T, count * T + 1)
    return [tuple(stream[i * T : i * T + T + 1]) for i in range(count)]


@pytest.mark.parametrize("mix_tokens,span", [(0, 1), (127, 1), (400, 3), (10**9, None)])
def test_batches_share_out_the_rows_of_a_stretch_of_the_stream(shards, mix_tokens, span):
    """Each row once, in an order of the seed's; never from more than the whole split."""
    data = loader(shards[0], mix_tokens=mix_tokens)
    count = data.h.train_batch_tokens // data.h.train_seq_len
    assert (
        data.draw_batches == span
        or span is None
        and data.draw_batches == data.total // data.h.train_batch_tokens > 3
    )
    orders = []
    for draw in range(5 if span else 2):  # into the next epoch
        wanted, got = stream_rows(data, draw * data.draw_batches * count, data.draw_batches * count), []
        for _ in range(data.draw_batches):
            rows = global_batch([data.next()])
            assert rows.dtype == torch.int64 and rows.shape == (count, data.h.train_seq_len + 1)
            got += [tuple(row) for row in rows.numpy()]
        assert sorted(got) == sorted(wanted) and (got == wanted) == (span == 1)
        orders.append([wanted.index(row) for row in got])
    assert (orders[0] != orders[1]) == (span != 1)
    other = loader(shards[0], mix_tokens=mix_tokens, seed=99)
    assert not torch.equal(
        global_batch([other.next()]), global_batch([loader(shards[0], mix_tokens=mix_tokens).next()])
    )


def test_a_book_does_not_fill_a_batch(tmp_path):
    """A document of eight batches: in order it fills seven of them, drawn from all text it is a quarter of each."""
    h = tiny()
    book = [h.bos_id] + [h.bos_id + 1] * (8 * h.train_batch_tokens)
    letters = [[h.bos_id] + [h.bos_id + 2] * 30 for _ in range(24 * h.train_batch_tokens // 31)]
    write_shard(tmp_path / "x_train_000000.bin", sum(letters[:200], []) + book + sum(letters[200:], []))
    share = lambda rows: float((rows == h.bos_id + 1).float().mean())
    for mix_tokens, most in ((0, 1.0), (10**9, 0.8)):
        data = loader(tmp_path, mix_tokens=mix_tokens)
        shares = [share(global_batch([data.next()])) for _ in range(data.total // h.train_batch_tokens)]
        assert (max(shares) == 1.0) == (most == 1.0) and max(shares) <= most
        assert sum(x > 0 for x in shares) <= 9 if most == 1.0 else sum(x > 0 for x in shares) >= 20


@pytest.mark.parametrize("micro", [16, 32, 64, 128])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_world_or_micro_batch(shards, world, micro):
    reference = loader(shards[0])
    loaders = [loader(shards[0], r, world, micro_batch_tokens=micro) for r in range(world)]
    assert all(x.accum * x.sequences * world * 16 == 128 for x in loaders)
    assert loaders[0].sequences * 16 <= micro
    for _ in range(5):
        assert torch.equal(global_batch([x.next() for x in loaders]), global_batch([reference.next()]))


def test_the_batch_must_cut_into_micro_batches(shards):
    h = tiny(data_path=shards[0], train_batch_tokens=16 * 12, micro_batch_tokens=16 * 4)
    t.TokenLoader(h, machine(0, 1))
    t.TokenLoader(h, machine(0, 3))
    h = tiny(data_path=shards[0], train_batch_tokens=16 * 10, micro_batch_tokens=16 * 2)
    with pytest.raises(t.InputError, match="micro_batch_tokens"):
        t.TokenLoader(h, machine(0, 2))  # 5 rows a rank in micro-batches of 2


def test_seek_is_exact(shards):
    data = loader(shards[0])
    first = [global_batch([data.next()]) for _ in range(12)]
    assert data.index == 12
    for n in (0, 11, 5, 5):
        data.seek(n)
        assert torch.equal(global_batch([data.next()]), first[n]) and data.index == n + 1
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
    data.pending.result()  # the thread reads the file's own pages
    write_shard(path, [1, 5, 500] * 2000)  # damaged later: 500 >= vocab_size
    data.document_order.cache_clear()
    with pytest.raises(t.InputError, match=r"x_train_000001\.bin.*500"):
        for _ in range(60):
            data.next()


def test_a_damaged_shard_is_found_before_training(tmp_path):
    """Not in the middle of a run, when its turn comes: at the start, on one rank or another."""
    shard_folder(tmp_path, tiny(), [300, 300, 300, 300], seed=1)
    write_shard(tmp_path / "x_train_000002.bin", [1, 5, 500] * 100)
    for world in (1, 2, 4):
        refused = 0
        for rank in range(world):
            try:
                loader(tmp_path, rank, world)
            except t.InputError as e:
                assert "x_train_000002.bin" in str(e)
                refused += 1
        assert refused >= 1


def test_a_shard_without_bos_is_named(tmp_path):
    write_shard(tmp_path / "x_train_000000.bin", [5, 6, 7] * 50)
    with pytest.raises(t.InputError, match=r"x_train_000000\.bin.*bos_id=1"):
        loader(tmp_path).next()


def test_a_train_split_shorter_than_a_row_is_refused(tmp_path):
    write_shard(tmp_path / "x_train_000000.bin", [1] * 16)
    with pytest.raises(t.InputError, match="16 tokens"):
        loader(tmp_path)
    write_shard(tmp_path / "x_train_000000.bin", [1] * 17)
    assert len(loader(tmp_path).next()) == 4
