"""The verb `text`: documents come back out of shards, and the same input gives the same bytes."""

import fnmatch
import json
import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

import build
import prepare
import shards
import tokenizing
import train_gpt
from messages import BadInput
from tests.data.data_cases import (
    content,
    documents_in,
    make_documents,
    one_line,
    prose,
    read_split,
    replaced,
    text_args,
    write_docs,
)
from tests.helpers import machine, tiny


@pytest.mark.parametrize("suffix", [".txt", ".txt.zst", ".jsonl", ".jsonl.zst"])
def test_round_trip(tmp_path, model, suffix):
    train = make_documents(0, 30)
    val = make_documents(500, 4)
    a = write_docs(tmp_path / f"t{suffix}", train)
    b = write_docs(tmp_path / f"v{suffix}", val)
    args = text_args(a, b, model, tmp_path / "toy", "--split", f"val_two={b}")
    assert prepare.main(args) == 0

    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for split, docs in (("train", train), ("val", val), ("val_two", val)):
        ids = documents_in(tmp_path / "toy", split)
        assert ids == sp.encode(docs)
        assert sp.decode(ids) == sp.decode(sp.encode(docs))
        about = shards.load_manifest(tmp_path / "toy")["splits"][split]
        assert about["documents"] == len(docs)
        assert about["tokens"] == sum(map(len, ids)) + len(docs)
        assert about["text_bytes"] == sum(len(d.encode()) for d in docs)
        assert about["decoded_bytes"] == sum(len(d.encode()) for d in sp.decode(ids))
        assert about["shards"][0]["file"] == f"toy_{split}_000000.bin"
    assert (tmp_path / "toy" / "tokenizer.model").read_bytes() == model.read_bytes()


def test_workers_do_not_change_a_byte(tmp_path, files, monkeypatch):
    monkeypatch.setattr(build, "BATCH_CHARS", 1500)  # several batches, so that order could go wrong
    assert prepare.main(files.args) == 0
    assert prepare.main(replaced(files.args, workers=2, out=tmp_path / "two")) == 0
    assert content(files.out) == content(tmp_path / "two")
    assert str(tmp_path) not in (files.out / "manifest.json").read_text()


def test_shards_are_cut_between_documents(tmp_path, files, model):
    docs = make_documents(300, 12, 20) + [prose(999, 900)] + make_documents(400, 6, 20)
    write_docs(files.train, docs)
    limit = 500
    assert prepare.main([*files.args, "--shard-tokens", str(limit)]) == 0

    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert documents_in(files.out, "train") == sp.encode(docs)
    parts = [
        np.array(shards.load_tokens(files.out / s["file"]))
        for s in shards.load_manifest(files.out)["splits"]["train"]["shards"]
    ]

    assert max(map(len, parts)) == limit and len(parts) > 4
    inside = [i for i, p in enumerate(parts) if p[0] != 1]
    assert inside and all(len(parts[i - 1]) == limit for i in inside)  # only the long document is cut
    assert 1 not in parts[inside[0] - 1][1:]  # and it began a shard of its own
    assert prepare.main(["verify", str(files.out)]) == 0


def test_a_document_longer_than_two_shards_gives_shards_without_bos(files, model, capsys):
    """Such a shard is one fragment, of the document before it; only after a full shard is it accepted."""
    docs = [prose(999, 900), *make_documents(400, 3, 20)]
    write_docs(files.train, docs)
    assert prepare.main([*files.args, "--shard-tokens", "500"]) == 0
    manifest = shards.load_manifest(files.out)
    parts = [
        np.array(shards.load_tokens(files.out / entry["file"]))
        for entry in manifest["splits"]["train"]["shards"]
    ]
    bos = [int(np.count_nonzero(part == 1)) for part in parts]
    assert bos[:3] == [1, 0, 0]
    assert manifest["splits"]["train"]["documents"] == sum(bos) == len(docs)
    assert [len(part) for part in parts[:2]] == [500, 500]
    assert documents_in(files.out, "train") == sentencepiece.SentencePieceProcessor(
        model_file=str(model)
    ).encode(docs)
    assert prepare.main(["verify", str(files.out)]) == 0

    # The trainer reads all of it in an epoch, each fragment as a document of its own.
    vocab_size = manifest["tokenizer"]["vocab_size"]
    loader = train_gpt.TokenLoader(tiny(data_path=files.out, vocab_size=vocab_size), machine())
    stream = loader.read(0, loader.total)
    expected = []
    for part in parts:
        fragment, *others = np.split(part, np.flatnonzero(part == 1))
        expected += [[1, *fragment]] if len(fragment) else []
        expected += others
    found = np.split(stream, np.flatnonzero(stream == 1)[1:])
    assert sorted(map(tuple, found)) == sorted(map(tuple, expected)) and len(expected) >= len(docs) + 2

    manifest["source"]["options"]["shard_tokens"] = 501
    (files.out / "manifest.json").write_bytes(shards.manifest_bytes(manifest))
    assert prepare.main(["verify", str(files.out)]) == 1
    assert "toy_train_000001.bin: begins with token" in capsys.readouterr().err


def test_field_and_blank_documents(tmp_path, files):
    rows = [{"body": "One document of text."}, {"body": "  \n "}, {"body": "Another document."}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    assert prepare.main([*replaced(files.args, val=path), "--field", "body", "--split", f"more={path}"]) == 0
    assert shards.load_manifest(files.out)["splits"]["val"]["documents"] == 2


def test_every_file_of_a_split_is_read_by_the_same_field(tmp_path, files):
    first = write_docs(tmp_path / "t1.jsonl", make_documents(700, 2), field="body")
    second = write_docs(tmp_path / "t2.jsonl", make_documents(710, 3), field="body")
    args = [*replaced(files.args, train=first), "--field", "body"]
    args.insert(args.index("--train") + 1, str(second))
    assert prepare.main(args) == 0
    assert shards.load_manifest(files.out)["splits"]["train"]["documents"] == 5


@pytest.fixture
def plain(tmp_path):
    """Train a tokenizer that has no piece for what its text lacks; its path."""
    path = tmp_path / "plain.model"
    ascii_text = [text.encode("ascii", "ignore").decode() for text in make_documents(0, 80)]
    options = dict(vocab_size=200, model_type="bpe", byte_fallback=False, hard_vocab_limit=False)
    ids = dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2)
    with open(path, "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(ascii_text), model_writer=model, **options, **ids
        )
    return path


def test_held_out_text_that_the_tokenizer_cannot_spell_is_refused(tmp_path, files, plain, capsys):
    """Its bits per byte would be wrong; training text may have some, and a line says so."""
    sound = [f"{i} the of and to a model" for i in range(9)]
    lossy = [*sound, "the \u2603 of \u2603"]
    train = write_docs(tmp_path / "train.txt", [f"train {text}" for text in lossy])
    val = write_docs(tmp_path / "val.txt", lossy)
    args = replaced(files.args, train=train, val=val, tokenizer=plain)
    assert prepare.main(args) == 2
    error = one_line(capsys)
    assert f"{val}: val document 9 ('the \u2603 of \u2603'): 2 tokens are the unknown piece" in error
    assert "byte_fallback" in error and not files.out.exists()

    write_docs(val, sound)
    assert prepare.main(args) == 0
    assert "train: 2 tokens are the unknown piece" in capsys.readouterr().err
    assert prepare.main(["verify", str(files.out)]) == 0

    # Shards that another tool made are found by verify, and by the count of a download.
    path = files.out / "toy_val_000000.bin"
    tokens = np.array(shards.load_tokens(path))
    tokens[5] = 3
    path.write_bytes(path.read_bytes()[:1024] + tokens.tobytes())
    manifest = shards.load_manifest(files.out)
    manifest["splits"]["val"]["shards"][0]["sha256"] = shards.sha256_file(path)
    (files.out / "manifest.json").write_bytes(shards.manifest_bytes(manifest))
    capsys.readouterr()
    assert prepare.main(["verify", str(files.out)]) == 1
    assert capsys.readouterr().err.count(f"{path}: 1 tokens are the unknown piece") == 1
    with pytest.raises(BadInput, match="1 tokens are the unknown piece"):
        tokenizing.count_bytes([path], tokenizing.open_tokenizer(str(plain)), 10)


def test_leak_is_refused_and_named(tmp_path, files, capsys):
    leaked = make_documents(200, 5)[3]
    other = write_docs(tmp_path / "t2.jsonl", [*make_documents(700, 2), leaked.upper().replace(" ", "  ")])
    args = list(files.args)
    args.insert(args.index("--train") + 1, str(other))
    assert prepare.main(args) == 2
    line = one_line(capsys)
    assert repr(leaked[:60]) in line
    assert "val document 3" in line
    assert "document 2" in line
    assert str(files.val) in line and str(other) in line
    assert not files.out.exists()


def test_resume(tmp_path, files, capsys, monkeypatch):
    assert prepare.main(files.args) == 0
    before = content(files.out)

    with monkeypatch.context() as patch:
        patch.setattr(build, "Workers", None)  # a second run must not get as far as tokenizing
        assert prepare.main(replaced(files.args, workers=2)) == 0
    assert "already there" in capsys.readouterr().err
    assert content(files.out) == before

    (files.out / "toy_val_000000.bin").write_bytes(b"short")
    assert prepare.main(files.args) == 0  # damaged: built again
    assert content(files.out) == before

    write_docs(files.val, make_documents(250, 6))
    assert prepare.main(files.args) == 2  # other input: refused, kept
    assert "holds another dataset (different source)" in one_line(capsys)
    assert content(files.out) == before

    assert prepare.main([*replaced(files.args, name="new"), "--replace"]) == 0
    assert not list(files.out.glob("toy_*"))
    assert prepare.main(["verify", str(files.out)]) == 0


def test_tiktoken(tmp_path, files, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
    encoding = tiktoken.Encoding(
        "toy", pat_str=r"\s?\w+|\s+|[^\s\w]+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)

    docs = ["the <|endoftext|> of the text", *make_documents(800, 3)]
    write_docs(files.train, docs)
    assert prepare.main(replaced(files.args, tokenizer="toy")) == 0
    manifest = shards.load_manifest(files.out)
    assert manifest["tokenizer"]["kind"] == "tiktoken"
    assert manifest["tokenizer"]["file"] is None
    assert manifest["tokenizer"]["vocab_size"] == 259 and manifest["bos_id"] == 258

    tokens = read_split(files.out, "train")
    parts = np.split(tokens, np.flatnonzero(tokens == 258))[1:]
    assert [encoding.decode(p[1:].tolist()) for p in parts] == docs

    about = manifest["splits"]["train"]
    assert about["decoded_bytes"] == about["text_bytes"] == sum(len(d.encode()) for d in docs)
    tokenizer = tokenizing.open_tokenizer("toy")
    count = tokenizing.count_bytes([files.out / "toy_train_000000.bin"], tokenizer, 10)
    assert count.total == about["text_bytes"]
    assert prepare.main(["verify", str(files.out)]) == 0


def has_gpt2_cache():
    """Return whether TIKTOKEN_CACHE_DIR names a folder with the two files of GPT-2's vocabulary."""
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR", "/nowhere"))
    files = ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    return all((folder / file).is_file() for file in files)


@pytest.mark.skipif(not has_gpt2_cache(), reason="TIKTOKEN_CACHE_DIR has no vocabulary of GPT-2")
def test_gpt2_tokens_train_a_padded_vocabulary(files):
    write_docs(files.train, ["hello world", *make_documents(800, 3)])
    assert prepare.main(replaced(files.args, tokenizer="gpt2")) == 0
    manifest = shards.load_manifest(files.out)
    assert manifest["tokenizer"]["vocab_size"] == 50_257 and manifest["bos_id"] == 50_256
    assert read_split(files.out, "train")[:4].tolist() == [50_256, 31_373, 995, 50_256]

    preset = train_gpt.PRESETS["optimizer_race"]
    sizes = {key: preset[key] for key in ("vocab_size", "bos_id")}
    dataset = train_gpt.load_dataset(tiny(data_path=files.out, **sizes), trains=True)
    tokens = read_split(files.out, "val")
    assert dataset.counts.of(tokens).sum() == manifest["splits"]["val"]["decoded_bytes"]


def test_a_vocabulary_that_cannot_be_fetched_is_one_line(files, monkeypatch, capsys):
    tiktoken = pytest.importorskip("tiktoken")

    def refuse(name):
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    assert prepare.main(replaced(files.args, tokenizer="gpt2")) == 2
    line = one_line(capsys)
    assert "--tokenizer gpt2: " in line and "no route" in line and "TIKTOKEN_CACHE_DIR" in line
    assert not files.out.exists()
    with pytest.raises(train_gpt.InputError, match="tokenizer 'gpt2': .* or set TIKTOKEN_CACHE_DIR"):
        train_gpt.tiktoken_counts("gpt2")


def test_patterns_do_not_overlap():
    build.check_names("toy", ["train", "val", "val_fineweb"])
    assert fnmatch.fnmatch("toy_val_000000.bin", shards.shard_pattern("val"))
    assert not fnmatch.fnmatch("toy_val_fineweb_000000.bin", shards.shard_pattern("val"))
    for name, splits in (("toy", ["val_2", "train"]), ("a/b", ["val"]), ("toy_val_1", ["val", "train"])):
        with pytest.raises(BadInput):
            build.check_names(name, splits)
