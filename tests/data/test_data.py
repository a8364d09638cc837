"""data/: documents come back out of shards, bad input is one line and leaves nothing, twice gives the same.

No network and no GPU; the tokenizer is trained here on generated text.
"""

import ast
import errno
import fnmatch
import hashlib
import importlib
import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

DATA = Path(__file__).resolve().parents[2] / "data"
sys.path.insert(0, str(DATA))                   # also where tokenizing processes look

shards = importlib.import_module("shards")
prepare = importlib.import_module("prepare")
offline = importlib.import_module("offline")
spm = pytest.importorskip("sentencepiece")

ENGLISH = ("the of and to a in is that for it as be on by with this are not or an if from at can which model "
           "token train loss value returns when given function weight learns slowly quickly because every "
           "layer adds its own small correction to the stream").split()
ODD = ["caf\u00e9", "3.14", "1984", "\u201cquoted\u201d", "\u65e5\u672c", "\U0001f642"]


def prose(seed, words):
    """One document of made-up English: capitals, digits, line breaks, a few non-ASCII characters."""
    rng = random.Random(seed)
    text = []
    while len(text) < words:
        sentence = [rng.choice(ENGLISH) for _ in range(rng.randint(5, 14))]
        sentence[0] = sentence[0].capitalize()
        if rng.random() < 0.3:
            sentence[2] = rng.choice(ODD)
        text += sentence
        text[-1] += rng.choice([".", ".", ".\n", ".\n\n", "?  "])
    return f"{seed}. " + " ".join(text).strip()


def some(start, count, words=60):
    return [prose(start + i, words) for i in range(count)]


def write_docs(path, docs, field="text"):
    """Write documents in the format that the file name says."""
    name = str(path)
    if ".jsonl" in name:
        raw = "".join(json.dumps({"id": i, field: d}) + "\n" for i, d in enumerate(docs)).encode()
    else:
        raw = "\0".join(docs).encode()
    if name.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        raw = zstandard.ZstdCompressor().compress(raw[:100]) + zstandard.ZstdCompressor().compress(raw[100:])
    path.write_bytes(raw)
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Path of a 400-piece SentencePiece model with the challenge's settings."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(offline.train_tokenizer(some(0, 80), 400))
    return path


@pytest.fixture
def files(tmp_path, model):
    """(train, val, out, arguments of the verb text that turn the one into the other)."""
    train = write_docs(tmp_path / "t.txt", some(100, 40))
    val = write_docs(tmp_path / "v.txt", some(200, 5))
    out = tmp_path / "out"
    args = ["text", "--train", str(train), "--val", str(val), "--tokenizer", str(model), "--out", str(out),
            "--name", "toy", "--workers", "1"]
    return SimpleNamespace(train=train, val=val, out=out, args=args)


def replaced(args, **changes):
    """Arguments with the values of some options changed."""
    args = list(args)
    for key, value in changes.items():
        args[args.index("--" + key) + 1] = str(value)
    return args


def read_split(out, split):
    """All ids of a split, shard after shard."""
    names = [s["file"] for s in shards.load_manifest(out)["splits"][split]["shards"]]
    return np.concatenate([np.array(shards.load_tokens(Path(out) / n)) for n in names])


def documents_in(out, split):
    """The documents of a split as lists of ids without BOS."""
    tokens = read_split(out, split)
    starts = np.flatnonzero(tokens == 1)
    assert starts[0] == 0
    return [part[1:].tolist() for part in np.split(tokens, starts[1:])]


def one_line(capsys):
    """The only line on stderr that is an error."""
    lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def content(folder):
    """{file: bytes} of a folder."""
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


# ---------------------------------------------------------------- text

@pytest.mark.parametrize("suffix", [".txt", ".txt.zst", ".jsonl", ".jsonl.zst"])
def test_round_trip(tmp_path, model, suffix):
    train, val = some(0, 30), some(500, 4)
    a = write_docs(tmp_path / f"t{suffix}", train)
    b = write_docs(tmp_path / f"v{suffix}", val)
    args = ["text", "--train", str(a), "--val", str(b), "--split", f"val_two={b}", "--tokenizer", str(model),
            "--out", str(tmp_path / "toy"), "--workers", "1"]
    assert prepare.main(args) == 0
    sp = spm.SentencePieceProcessor(model_file=str(model))
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


def test_shard_bytes_are_the_official_layout(files):
    assert prepare.main(files.args) == 0
    raw = (files.out / "toy_train_000000.bin").read_bytes()
    header = np.frombuffer(raw[:1024], dtype="<i4")
    assert header[:2].tolist() == [20240520, 1] and not header[3:].any()
    assert len(raw) == 1024 + 2 * header[2]
    assert np.frombuffer(raw[1024:], dtype="<u2")[0] == 1


def test_byte_table_agrees_with_decoding(files, model):
    assert prepare.main(files.args) == 0
    tokenizer = shards.open_tokenizer(model)
    about = shards.load_manifest(files.out)["splits"]["train"]
    path = files.out / about["shards"][0]["file"]
    starts = np.flatnonzero(shards.load_tokens(path) == 1)
    len_scored = int(starts[3]) - 1             # three whole documents
    total, scored = prepare.count_bytes([path], tokenizer, len_scored)
    assert total == about["decoded_bytes"]
    sp = spm.SentencePieceProcessor(model_file=str(model))
    tokens = np.array(shards.load_tokens(path))[:len_scored + 1]
    parts = np.split(tokens, np.flatnonzero(tokens == 1)[1:])
    assert len(parts) == 3
    assert scored == sum(len(sp.decode(p[1:].tolist()).encode()) for p in parts)


def test_a_leading_space_counts_unless_a_boundary_precedes_it(tmp_path, model):
    sp = spm.SentencePieceProcessor(model_file=str(model))
    the = sp.piece_to_id("\u2581the")
    assert not sp.is_unknown(the)
    ids = np.array([1, the, the, 1, the, sp.piece_to_id("<0x41>"), the], dtype="<u2")
    path = tmp_path / "x_val_000000.bin"
    path.write_bytes(shards.shard_header(len(ids)) + ids.tobytes())
    assert prepare.count_bytes([path, path], shards.open_tokenizer(model), 3) == (2 * (3 + 4 + 3 + 1 + 4), 3 + 4)
    assert not sp.id_to_piece(sp.encode("the end")[0]).startswith("\u2581")     # no dummy prefix, as the official


def test_workers_do_not_change_a_byte(tmp_path, files, monkeypatch):
    monkeypatch.setattr(shards, "BATCH_CHARS", 1500)    # several batches, so that order could go wrong
    assert prepare.main(files.args) == 0
    assert prepare.main(replaced(files.args, workers=2, out=tmp_path / "two")) == 0
    assert content(files.out) == content(tmp_path / "two")
    assert str(tmp_path) not in (files.out / "manifest.json").read_text()


def test_shards_are_cut_between_documents(tmp_path, files, model):
    docs = some(300, 12, 20) + [prose(999, 900)] + some(400, 6, 20)
    write_docs(files.train, docs)
    limit = 500
    assert prepare.main([*files.args, "--shard-tokens", str(limit)]) == 0
    sp = spm.SentencePieceProcessor(model_file=str(model))
    assert documents_in(files.out, "train") == sp.encode(docs)
    parts = [np.array(shards.load_tokens(files.out / s["file"]))
             for s in shards.load_manifest(files.out)["splits"]["train"]["shards"]]
    assert max(map(len, parts)) == limit and len(parts) > 4
    inside = [i for i, p in enumerate(parts) if p[0] != 1]
    assert inside and all(len(parts[i - 1]) == limit for i in inside)    # only the long document is cut
    assert 1 not in parts[inside[0] - 1][1:]                             # and it began a shard of its own
    assert prepare.main(["verify", str(files.out)]) == 0


def test_field_and_blank_documents(tmp_path, files):
    rows = [{"body": "One document of text."}, {"body": "  \n "}, {"body": "Another document."}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    assert prepare.main([*replaced(files.args, val=path), "--field", "body", "--split", f"more={path}"]) == 0
    assert shards.load_manifest(files.out)["splits"]["val"]["documents"] == 2


def test_leak_is_refused_and_named(tmp_path, files, capsys):
    leaked = some(200, 5)[3]
    other = write_docs(tmp_path / "t2.jsonl", [*some(700, 2), leaked.upper().replace(" ", "  ")])
    args = list(files.args)
    args.insert(args.index("--train") + 1, str(other))
    assert prepare.main(args) == 1
    line = one_line(capsys)
    assert repr(leaked[:60]) in line and "val document 3" in line and "document 2" in line
    assert str(files.val) in line and str(other) in line
    assert not files.out.exists()


def test_resume(tmp_path, files, capsys, monkeypatch):
    assert prepare.main(files.args) == 0
    before = content(files.out)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "Encoders", None)     # a second run must not get as far as tokenizing
        assert prepare.main(replaced(files.args, workers=2)) == 0
    assert "already there" in capsys.readouterr().err
    assert content(files.out) == before
    (files.out / "toy_val_000000.bin").write_bytes(b"short")
    assert prepare.main(files.args) == 0            # damaged: built again
    assert content(files.out) == before
    write_docs(files.val, some(250, 6))
    assert prepare.main(files.args) == 1            # other input: refused, kept
    assert "holds another dataset (different source)" in one_line(capsys)
    assert content(files.out) == before
    assert prepare.main([*replaced(files.args, name="new"), "--replace"]) == 0
    assert not list(files.out.glob("toy_*")) and prepare.main(["verify", str(files.out)]) == 0


def test_tiktoken(tmp_path, files, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
    encoding = tiktoken.Encoding("toy", pat_str=r"\s?\w+|\s+|[^\s\w]+", mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 258})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    docs = ["the <|endoftext|> of the text", *some(800, 3)]
    write_docs(files.train, docs)
    assert prepare.main(replaced(files.args, tokenizer="toy")) == 0
    manifest = shards.load_manifest(files.out)
    assert manifest["tokenizer"]["kind"] == "tiktoken" and manifest["tokenizer"]["file"] is None
    assert manifest["tokenizer"]["vocab_size"] == 259 and manifest["bos_id"] == 258
    tokens = read_split(files.out, "train")
    parts = np.split(tokens, np.flatnonzero(tokens == 258))[1:]
    assert [encoding.decode(p[1:].tolist()) for p in parts] == docs
    about = manifest["splits"]["train"]
    assert about["decoded_bytes"] == about["text_bytes"] == sum(len(d.encode()) for d in docs)
    tokenizer = shards.open_tokenizer("toy")
    assert prepare.count_bytes([files.out / "toy_train_000000.bin"], tokenizer, 10)[0] == about["text_bytes"]
    assert prepare.main(["verify", str(files.out)]) == 0


# ---------------------------------------------------------------- refusals

def bad_missing(tmp, args):
    return replaced(args, train=tmp / "none.txt"), "none.txt: no such file"


def bad_empty(tmp, args):
    (tmp / "e.txt").write_bytes(b"")
    return replaced(args, val=tmp / "e.txt"), "e.txt: empty file"


def bad_only_blanks(tmp, args):
    (tmp / "e.txt").write_bytes(b" \n\0\n")
    return replaced(args, val=tmp / "e.txt"), "e.txt: no documents"


def bad_suffix(tmp, args):
    (tmp / "e.csv").write_bytes(b"x")
    return replaced(args, val=tmp / "e.csv"), "e.csv: unknown input format"


def bad_utf8(tmp, args):
    (tmp / "u.txt").write_bytes(b"fine\0\xff\xfe")
    return replaced(args, val=tmp / "u.txt"), "u.txt: document 2: not valid UTF-8"


def bad_field(tmp, args):
    path = write_docs(tmp / "f.jsonl", ["a"], field="body")
    return replaced(args, val=path), "f.jsonl: line 1: no text field 'text' (found: body, id)"


def bad_json(tmp, args):
    (tmp / "j.jsonl").write_text('{"text": "a"}\n{"text": \n')
    return replaced(args, val=tmp / "j.jsonl"), "j.jsonl: line 2: not JSON"


def bad_zst(tmp, args):
    path = write_docs(tmp / "z.txt.zst", some(0, 20))
    path.write_bytes(path.read_bytes()[:-10])
    return replaced(args, train=path), "z.txt.zst: zstd file cut short"


def bad_tokenizer(tmp, args):
    (tmp / "x.model").write_bytes(b"nonsense")
    return replaced(args, tokenizer=tmp / "x.model"), "x.model: not a SentencePiece model"


def bad_tokenizer_name(tmp, args):
    return replaced(args, tokenizer="no_such"), "no_such: no such file and no such tiktoken encoding"


def bad_out(tmp, args):
    (tmp / "file").write_text("x")
    return replaced(args, out=tmp / "file" / "out"), "not a directory"


def bad_split_name(tmp, args):
    return [*args, "--split", f"two_val={tmp / 'v.txt'}"], "would also match *_val_[0-9]*.bin"


def bad_shard_tokens(tmp, args):
    return [*args, "--shard-tokens", "0"], "--shard-tokens 0: choose"


BAD = [value for name, value in sorted(globals().items()) if name.startswith("bad_")]


@pytest.mark.parametrize("bad", BAD, ids=lambda f: f.__name__)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, files, capsys, bad):
    args, words = bad(tmp_path, files.args)
    before = sorted(p for p in tmp_path.rglob("*"))
    assert prepare.main(args) == 1
    line = one_line(capsys)
    assert words in line
    assert any(remedy in line for remedy in ("choose", "give", "check", "fill", "name it", "convert",
                                             "copy it", "one object per line"))
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_command_line_errors_are_one_line(capsys):
    for argv in (["text"], ["nonsense"], ["download", "--train-shards", "many"]):
        with pytest.raises(SystemExit) as stop:
            prepare.main(argv)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("at", ["train", "val", "manifest"])
def test_full_disk(files, capsys, monkeypatch, at):
    """A write that fails, early or at the very end, leaves no folder and one line."""
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def open_full(path, mode="r", *args, **kwargs):
        file = open(path, mode, *args, **kwargs)
        if "w" not in mode or f"_{at}_" not in str(path):
            return file
        return SimpleNamespace(write=full, close=file.close, seek=file.seek)

    monkeypatch.setattr(shards, "open", open_full, raising=False)
    if at == "manifest":
        monkeypatch.setattr(shards, "manifest_bytes", full)
    assert prepare.main(files.args) == 1
    line = one_line(capsys)
    assert "no space left on device; free some space" in line and str(files.out) in line
    assert not files.out.exists()


def test_a_killed_build_is_repaired(files):
    """Killed between the renames: shards without a manifest, and a stale temporary file."""
    assert prepare.main(files.args) == 0
    before = content(files.out)
    (files.out / "manifest.json").unlink()
    (files.out / ".tmp.toy_val_000000.bin").write_bytes(b"half")
    assert prepare.main(["verify", str(files.out)]) == 1
    assert prepare.main(files.args) == 0
    assert content(files.out) == before
    (files.out / "manifest.json").unlink()
    assert prepare.main(replaced(files.args, name="other")) == 1    # not known to be ours


def test_interrupt_leaves_nothing(files, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(shards.ShardWriter, "close", stop)
    assert prepare.main(files.args) == 130
    assert not files.out.exists()


# ---------------------------------------------------------------- verify

def damage_truncate(out):
    path = out / "toy_train_000000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    return "toy_train_000000.bin", "its header promises"


def damage_magic(out):
    path = out / "toy_val_000000.bin"
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    return "toy_val_000000.bin", "not a token shard"


def damage_header(out):
    (out / "toy_val_000000.bin").write_bytes(b"12")
    return "toy_val_000000.bin", "shorter than a shard header"


def damage_token(out):
    path = out / "toy_train_000000.bin"
    raw = bytearray(path.read_bytes())
    raw[1030] ^= 1
    path.write_bytes(raw)
    return "toy_train_000000.bin", "sha256 differs"


def damage_tokenizer(out):
    (out / "tokenizer.model").write_bytes(b"another")
    return "tokenizer.model", "not the tokenizer of this dataset"


def damage_missing(out):
    (out / "toy_train_000000.bin").unlink()
    return "toy_train_000000.bin", "no such file"


def damage_stray(out):
    shutil.copy(out / "toy_train_000000.bin", out / "toy_train_000001.bin")
    return "toy_train_000001.bin", "not in the manifest"


def damage_manifest(out):
    (out / "manifest.json").write_text("{")
    return "manifest.json", "not JSON"


def damage_bos(out):
    """A shard that does not begin with BOS, its checksum made to agree."""
    path = out / "toy_train_000000.bin"
    raw = bytearray(path.read_bytes())
    raw[1024] = 7
    return rewrite(out, path, raw), "begins with token 7, not BOS (1)"


def damage_vocab(out):
    path = out / "toy_train_000000.bin"
    raw = bytearray(path.read_bytes())
    raw[1027] = 255
    return rewrite(out, path, raw), "vocab_size is 400"


def rewrite(out, path, raw):
    path.write_bytes(raw)
    manifest = shards.load_manifest(out)
    manifest["splits"]["train"]["shards"][0]["sha256"] = hashlib.sha256(raw).hexdigest()
    (out / "manifest.json").write_bytes(shards.manifest_bytes(manifest))
    return path.name


DAMAGE = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_verify_names_the_damage(files, capsys, damage):
    assert prepare.main(files.args) == 0
    assert prepare.main(["verify", str(files.out)]) == 0
    capsys.readouterr()
    name, words = damage(files.out)
    assert prepare.main(["verify", str(files.out)]) == 1
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 1 and name in lines[0] and words in lines[0]


# ---------------------------------------------------------------- offline

@pytest.fixture
def sources(tmp_path):
    """({package: version}, files): 120 modules of docstrings, two of them copies, one not prose."""
    folder = tmp_path / "lib"
    folder.mkdir()
    for i in range(120):
        doctest = f"    >>> secret_doctest({i})\n    42\n"
        body = f'"""{prose(i, 80)}\n\n{doctest}"""\n\ndef f():\n    """{prose(5000 + i, 90)}"""\n'
        (folder / f"m{i:03d}.py").write_text(body)
    shutil.copy(folder / "m001.py", folder / "n1.py")
    shutil.copy(folder / "m002.py", folder / "n2.py")
    (folder / "n3.py").write_text('"""' + "xyzzy plugh quux " * 60 + '"""')
    (folder / "n4.py").write_text("def broken(:\n")
    return {"python": "3", "toy": "1"}, sorted(folder.iterdir())


def test_offline_is_deterministic_and_cached(tmp_path, sources, monkeypatch):
    a, fresh = offline.build(tmp_path / "a", 1, sources, 400)
    assert fresh
    b, _ = offline.build(tmp_path / "b", 2, sources, 400)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert prepare.main(["verify", str(tmp_path / "a")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(offline, "extract", None)     # cached: reads nothing
        assert offline.build(tmp_path / "a", 1, sources, 400) == (a, False)
    c, fresh = offline.build(tmp_path / "a", 1, ({**sources[0], "toy": "2"}, sources[1]), 400)
    assert fresh and c["source"]["fingerprint"] != a["source"]["fingerprint"]
    assert c["splits"] == a["splits"]
    sp = spm.SentencePieceProcessor(model_file=str(tmp_path / "a" / "tokenizer.model"))
    assert not sp.is_unknown(sp.piece_to_id("\u2581"))
    assert (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()) == (0, 1, 2, 3)


def test_offline_cleans_and_separates(tmp_path, sources, monkeypatch):
    monkeypatch.setattr(offline, "VAL_ONE_IN", 8)
    documents = offline.extract(sources[1], 1)
    kept = offline.deduplicate(documents)
    assert len(documents) == 122 and len(kept) == 120      # two copies dropped; n3 is no prose, n4 no Python
    assert not any("secret_doctest" in d or "xyzzy" in d for d in kept)
    train, val = offline.split_documents(kept)
    assert 2 <= len(val) <= 30 and len(train) + len(val) == 120 and not set(train) & set(val)
    # A train document that contains a val document is no repetition, but the val document must go.
    longer = next(text for text in (val[0] + "\n" + prose(i, 300) for i in range(8000, 8100))
                  if int.from_bytes(shards.fingerprint(text)[:4], "little") % offline.VAL_ONE_IN)
    assert longer in offline.deduplicate([*kept, longer])
    train, rest = offline.split_documents([*kept, longer])
    assert longer in train and rest == val[1:]


def test_offline_leaves_other_datasets_alone(tmp_path, files, sources, capsys):
    assert prepare.main(files.args) == 0
    before = content(files.out)
    with pytest.raises(shards.DataError, match="holds another dataset"):
        offline.build(files.out, 1, sources, 400)
    assert content(files.out) == before


def test_installed_is_sorted_and_readable():
    versions, found = offline.installed()
    assert versions["sentencepiece"] and len(found) > 500 and len(found) == len(set(found))
    assert (versions, found) == offline.installed()
    assert offline.documents_of(argparse_path())


def argparse_path():
    return importlib.import_module("argparse").__file__


def test_clean():
    text = ("Summary of the :func:`~a.b` call::\n\n    code()\n\nAfter it.\n\n>>> x\n1\n\n"
            ".. note::\n    Kept.\n\n"
            ".. math::\n    dropped words\n======\n``end`` of *it*.")
    assert offline.clean(text) == "Summary of the a.b call:\n\nAfter it.\n\n    Kept.\n\nend of *it*."


# ---------------------------------------------------------------- download

@pytest.fixture
def hub(tmp_path, files, model, monkeypatch):
    """A hub of one repository with four train shards of 600 tokens (the last of 350) and one of val."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    remote, calls = tmp_path / "remote", []
    folder = remote / "datasets" / "datasets" / "toy"
    folder.mkdir(parents=True)
    (remote / "datasets" / "tokenizers").mkdir()
    shutil.copy(model, remote / "datasets" / "tokenizers" / "toy.model")
    sp = spm.SentencePieceProcessor(model_file=str(model))
    stream = np.concatenate([[1, *ids] for ids in sp.encode(some(0, 60, 120))]).astype("<u2")
    for i in range(4):
        part = stream[600 * i:600 * i + (350 if i == 3 else 600)]
        (folder / f"fineweb_train_{i:06d}.bin").write_bytes(shards.shard_header(len(part)) + part.tobytes())
    val = np.concatenate([[1, *ids] for ids in sp.encode(some(900, 6))]).astype("<u2")
    (folder / "fineweb_val_000000.bin").write_bytes(shards.shard_header(len(val)) + val.tobytes())

    class Api:
        def list_repo_tree(self, repo, path, repo_type):
            assert (repo, repo_type) == ("owner/toy", "dataset")
            yield SimpleNamespace(path=f"{path}/sub")       # a folder has no size
            for p in sorted((remote / path).iterdir()):
                raw = p.read_bytes()
                yield SimpleNamespace(path=f"{path}/{p.name}", size=len(raw),
                                      lfs=SimpleNamespace(sha256=hashlib.sha256(raw).hexdigest()))

    def hf_hub_download(repo, path, repo_type, local_dir):
        calls.append(path.rsplit("/", 1)[-1])
        target = Path(local_dir) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(remote / path, target)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(prepare, "probe_hub", lambda timeout=4.0: None)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 600)
    monkeypatch.setattr(prepare, "SEQUENCE", 16)
    scored = (len(val) - 1) // 16 * 16
    size = prepare.count_bytes([folder / "fineweb_val_000000.bin"], shards.open_tokenizer(model), scored)[1]
    monkeypatch.setattr(prepare, "VAL_BYTES", (size, size))
    monkeypatch.setitem(prepare.VARIANTS, "sp1024", prepare.Variant(
        "owner/toy", "datasets/datasets/toy", "datasets/tokenizers/toy.model", 0, scored))
    return SimpleNamespace(remote=remote, folder=folder, calls=calls, val=val, api=huggingface_hub)


def test_download_and_extend(tmp_path, hub, model):
    out = tmp_path / "got"
    assert prepare.main(["download", "--train-shards", "2", "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin", "manifest.json",
        "tokenizer.model"]
    manifest = shards.load_manifest(out)
    sp = spm.SentencePieceProcessor(model_file=str(model))
    val = manifest["splits"]["val"]
    assert val["documents"] == 6 and val["tokens"] == len(hub.val)
    assert val["decoded_bytes"] == sum(len(sp.decode(s).encode()) for s in sp.encode(some(900, 6)))
    assert manifest["splits"]["train"]["tokens"] == 1200
    assert prepare.main(["verify", str(out)]) == 0      # shard 1 begins inside a document, after a full one
    hub.calls.clear()
    assert prepare.main(["download", "--train-shards", "4", "--out", str(out)]) == 0
    assert hub.calls == ["fineweb_train_000002.bin", "fineweb_train_000003.bin"]
    hub.calls.clear()
    assert prepare.main(["download", "--train-shards", "1", "--out", str(out)]) == 0
    assert hub.calls == [] and len(shards.load_manifest(out)["splits"]["train"]["shards"]) == 4
    assert prepare.main(["verify", str(out)]) == 0


def test_download_resumes_and_keeps_the_old_dataset(tmp_path, hub, monkeypatch, capsys):
    out = tmp_path / "got"
    assert prepare.main(["download", "--out", str(out)]) == 0
    good = hub.api.hf_hub_download

    def breaks(repo, path, **kwargs):
        if path.endswith("train_000002.bin"):
            raise ConnectionError("cable pulled")
        return good(repo, path, **kwargs)

    monkeypatch.setattr(hub.api, "hf_hub_download", breaks)
    assert prepare.main(["download", "--train-shards", "3", "--out", str(out)]) == 3
    assert "not reachable" in one_line(capsys)
    assert shards.check_dataset(out, deep=True) == []       # the one-shard dataset is untouched
    monkeypatch.setattr(hub.api, "hf_hub_download", good)
    hub.calls.clear()
    assert prepare.main(["download", "--train-shards", "3", "--out", str(out)]) == 0
    assert hub.calls == ["fineweb_train_000002.bin"]
    assert not (out / ".download").exists()


def test_download_repairs_a_damaged_file(tmp_path, hub):
    out = tmp_path / "got"
    assert prepare.main(["download", "--out", str(out)]) == 0
    path = out / "fineweb_train_000000.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[:-4] + b"\0\0\0\0")                # same size, other bytes
    hub.calls.clear()
    assert prepare.main(["download", "--out", str(out)]) == 0
    assert hub.calls == ["fineweb_train_000000.bin"] and path.read_bytes() == raw


def test_download_refusals(tmp_path, hub, monkeypatch, capsys):
    out = tmp_path / "got"
    for count in ("0", "5"):
        assert prepare.main(["download", "--train-shards", count, "--out", str(out)]) == 1
        assert "has 4 train shards; choose 1 to 4" in one_line(capsys)
    good = hub.api.hf_hub_download

    def cut(repo, path, **kwargs):
        got = good(repo, path, **kwargs)
        Path(got).write_bytes(Path(got).read_bytes()[:-2])
        return got

    monkeypatch.setattr(hub.api, "hf_hub_download", cut)
    shutil.copytree(hub.remote / "datasets" / "tokenizers", out)
    (out / "toy.model").rename(out / "tokenizer.model")
    assert prepare.main(["download", "--out", str(out)]) == 1
    assert "fineweb_val_000000.bin" in (line := one_line(capsys)) and "bytes arrived" in line
    assert not (out / "manifest.json").exists() and not shards.shard_files(out)
    monkeypatch.setattr(hub.api, "hf_hub_download", good)
    short = hub.folder / "fineweb_train_000000.bin"
    short.write_bytes(shards.shard_header(599) + short.read_bytes()[1024:-2])
    assert prepare.main(["download", "--out", str(out)]) == 1
    assert "599 tokens, a full shard has 600" in one_line(capsys)


def test_download_refuses_another_validation_split(tmp_path, hub, capsys):
    val = np.concatenate([hub.val, hub.val])
    (hub.folder / "fineweb_val_000000.bin").write_bytes(shards.shard_header(len(val)) + val.tobytes())
    assert prepare.main(["download", "--out", str(tmp_path / "got")]) == 1
    assert "scores on it would not compare" in one_line(capsys)
    assert not (tmp_path / "got" / "manifest.json").exists()


def test_official_constants():
    assert prepare.VARIANTS["sp1024"].val_scored == 62_021_632 and prepare.SEQUENCE == 2048
    for scored in (62_021_632, 40_540_160):
        assert scored % prepare.SEQUENCE == 0
    low, high = prepare.VAL_BYTES
    assert low < 151_073_878 and 151_080_169 < high < 151_100_000


def test_unreachable_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")    # nothing listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert prepare.main(["download", "--out", str(tmp_path / "got")]) == 3
    assert "./run.sh data offline" in one_line(capsys) and not (tmp_path / "got").exists()


# ---------------------------------------------------------------- auto

def test_auto(tmp_path, hub, sources, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "DATASETS", tmp_path / "datasets")
    monkeypatch.setattr(offline, "installed", lambda: sources)
    monkeypatch.setattr(offline.build, "__defaults__", (None, 400))

    def gone(timeout=4.0):
        raise prepare.HubUnreachable("unplugged")

    def run(*extra):
        assert prepare.main(["auto", "--workers", "1", *extra]) == 0
        return capsys.readouterr().out

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "probe_hub", gone)
        assert run() == f"data_path={tmp_path / 'datasets' / 'offline_sp1024'}\n"
        assert run() == f"data_path={tmp_path / 'datasets' / 'offline_sp1024'}\n"
    fineweb = tmp_path / "datasets" / "fineweb10B_sp1024"
    assert run("--train-shards", "2") == f"data_path={fineweb}\n"
    monkeypatch.setattr(prepare, "probe_hub", gone)
    assert run() == run("--train-shards", "3") == f"data_path={fineweb}\n"      # what is there is used
    (fineweb / "fineweb_val_000000.bin").unlink()
    assert "offline_sp1024" in run()
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    assert run() == "data_path=datasets/offline_sp1024\n"


# ---------------------------------------------------------------- taste

def test_source_style():
    for path in sorted(DATA.glob("*.py")):
        text = path.read_text()
        assert max(map(len, text.split("\n"))) <= 110, path
        for node in ast.walk(ast.parse(text, feature_version=(3, 10))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, (path, node.name)


def test_patterns_do_not_overlap():
    shards.check_names("toy", ["train", "val", "val_fineweb"])
    assert fnmatch.fnmatch("toy_val_000000.bin", shards.shard_pattern("val"))
    assert not fnmatch.fnmatch("toy_val_fineweb_000000.bin", shards.shard_pattern("val"))
    for name, splits in (("toy", ["val_2", "train"]), ("a/b", ["val"]), ("toy_val_1", ["val", "train"])):
        with pytest.raises(shards.DataError):
            shards.check_names(name, splits)
