"""Bytes: the denominator of bits per byte is the UTF-8 length of the decoded text, token by token."""

import math
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece

import audit  # noqa: E402
import train_gpt as t
from helpers import BOS, english, english_dataset, tiny, train_tokenizer  # noqa: E402

SPACE = "\u2581"
ENGLISH = english(60, 7)
FOREIGN = [
    "Größe naïve café — “quoted” … 3½ µm",
    "日本語の文章です。 漢字 と かな",
    "emoji 😀 family 👩‍👩‍👧 flag 🇨🇭 end",
    "tabs\tand\nnew lines and   runs  of spaces ",
    "a_b __init__(self, x=1): return {'k': [1, 2]}",
    f"the mark {SPACE} itself, and twice {SPACE}{SPACE}",
    "العربية עברית ไทย",
    " leading and trailing ",
    "x",
    "😀",
    "\u0301combining first",
]


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def read_varint(blob, at):
    value = shift = 0
    while True:
        value |= (blob[at] & 127) << shift
        at, shift, more = at + 1, shift + 7, blob[at] & 128
        if not more:
            return value, at


def fields(blob):
    """(field number, wire type, raw value) of a protobuf message."""
    at = 0
    while at < len(blob):
        tag, at = read_varint(blob, at)
        if tag & 7 == 0:
            value, at = read_varint(blob, at)
        else:
            size, at = (8, at) if tag & 7 == 1 else (4, at) if tag & 7 == 5 else read_varint(blob, at)
            value, at = blob[at : at + size], at + size
        yield tag >> 3, tag & 7, value


def message(parts):
    out = b""
    for number, wire, value in parts:
        head = varint(number << 3 | wire)
        out += head + (varint(value) if wire == 0 else varint(len(value)) + value if wire == 2 else value)
    return out


def edit_pieces(source, target, change):
    """Rewrite a serialized ModelProto: field 1 is a repeated SentencePiece {1: text, 2: score, 3: type}."""
    with open(source, "rb") as f:
        parts = list(fields(f.read()))
    out = []
    for number, wire, value in parts:
        if number == 1:
            piece = {n: (w, v) for n, w, v in fields(value)}
            text, kind = piece[1][1].decode(), piece.get(3, (0, 1))[1]
            text, kind = change(text, kind)
            score = struct.unpack("<f", piece[2][1])[0]
            value = message([(1, 2, text.encode()), (2, 5, struct.pack("<f", score)), (3, 0, kind)])
        out.append((number, wire, value))
    with open(target, "wb") as f:
        f.write(message(out))
    return str(target)


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """name -> (path, processor). Three shapes of vocabulary, each with byte fallback, and two more settings."""
    folder = tmp_path_factory.mktemp("vocabularies")
    made = {
        "ordinary": train_tokenizer(folder / "ordinary.model", ENGLISH, 420),
        "dummy prefix": train_tokenizer(folder / "prefix.model", ENGLISH, 420, add_dummy_prefix=True),
        "unigram": train_tokenizer(folder / "unigram.model", ENGLISH, 420, model_type="unigram"),
        "foreign": train_tokenizer(folder / "foreign.model", ENGLISH + FOREIGN * 3, 560),
    }
    rename = lambda text, kind: ("\u00a4\u00a4", kind) if text == SPACE else (text, kind)
    for name in ("ordinary", "dummy prefix", "unigram"):
        key = "no space piece" if name == "ordinary" else f"no space piece, {name}"
        made[key] = edit_pieces(made[name], folder / f"{name}_no.model", rename)
    return {k: (v, sentencepiece.SentencePieceProcessor(model_file=v)) for k, v in made.items()}


NAMES = ["ordinary", "dummy prefix", "unigram", "foreign", "no space piece", "no space piece, dummy prefix",
         "no space piece, unigram"]  # fmt: skip


def decoded(sp, ids):
    """The text of a document's tokens by sp.decode; U+2581 is a space however it is spelled, and the space that
    a vocabulary without a space piece spells at the start is dropped as sp.decode drops the other kind."""
    text = sp.decode(ids).replace(SPACE, " ")
    no_piece = sp.is_unknown(sp.piece_to_id(SPACE))
    return text[1:] if no_piece and text.startswith(" ") else text


def test_the_vocabularies_are_what_they_are_called(vocabularies):
    plain, other = vocabularies["ordinary"][1], vocabularies["no space piece"][1]
    assert not plain.is_unknown(plain.piece_to_id(SPACE)) and other.is_unknown(other.piece_to_id(SPACE))
    spelled = [other.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode()]
    ids = other.encode("x 9 😀")
    assert any(ids[i : i + 3] == spelled for i in range(len(ids))), other.encode("x 9 😀", out_type=str)
    byte_share = np.mean([plain.is_byte(i) for x in FOREIGN for i in plain.encode(x)])
    assert byte_share > 0.4
    prefix = vocabularies["dummy prefix"][1]
    assert prefix.encode("the", out_type=str)[0].startswith(SPACE)


@pytest.mark.parametrize("name", NAMES)
def test_sum_is_the_utf8_length_of_every_document(vocabularies, name):
    path, sp = vocabularies[name]
    counts = t.sentencepiece_counts(path)
    documents = [sp.encode(x) for x in ENGLISH[:20] + FOREIGN + ENGLISH[20:30]]
    stream = np.array(sum(([BOS, *d] for d in documents), []) + [BOS], dtype=np.uint16)
    weights = counts.of(stream)
    assert weights.shape == (len(stream) - 1,) and weights.dtype == np.int64 and weights.min() >= 0
    lengths = [len(decoded(sp, d).encode()) for d in documents]
    ends = np.cumsum([len(d) + 1 for d in documents])
    got = np.diff(np.concatenate([[0], np.cumsum(weights)])[ends], prepend=0)  # the BOS behind each included
    wrong = [(documents[i], got[i], lengths[i]) for i in range(len(lengths)) if got[i] != lengths[i]]
    assert not wrong, [(sp.id_to_piece(d), g, n) for d, g, n in wrong[:2]]
    assert weights.sum() == sum(lengths) > 1000
    run = SimpleNamespace(dataset=SimpleNamespace(manifest={}), h=SimpleNamespace(tokenizer_path=path))
    assert [len(x.encode()) for x in audit.decoder(run)(documents)] == lengths  # which the auditor asks


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_weighs_what_its_text_weighs(vocabularies, name):
    """Not only whole documents: cutting before any piece that begins a character adds up, too."""
    path, sp = vocabularies[name]
    counts = t.sentencepiece_counts(path)
    no_piece = "no space" in name
    for text in ENGLISH[:3] + FOREIGN:
        ids = sp.encode(text)
        weights = np.concatenate([[0], np.cumsum(counts.of(np.array([BOS, *ids])))])
        for cut in range(1, len(ids) + 1):
            if cut < len(ids) and (sp.is_byte(ids[cut]) or no_piece):
                continue
            expected = len(decoded(sp, ids[:cut]).encode())
            alone = int(counts.of(np.array([BOS, *ids[:cut]])).sum())
            assert weights[cut] == alone == expected, (text, cut)


def test_the_space_behind_a_document_start_is_no_text(vocabularies):
    path, sp = vocabularies["dummy prefix"]
    counts = t.sentencepiece_counts(path)
    ids = sp.encode("the river")
    first = sp.id_to_piece(ids[0])
    assert first.startswith(SPACE)
    behind_bos = counts.of(np.array([BOS, ids[0]]))[0]
    behind_text = counts.of(np.array([ids[-1], ids[0]]))[0]
    assert (behind_bos, behind_text) == (len(first) - 1, len(first))
    assert [counts.of(np.array([ids[0], special]))[0] for special in (0, 1, 2)] == [0, 0, 0]  # pad, bos, eos


def test_unused_pieces_and_inner_marks(vocabularies, tmp_path):
    """A piece marked unused weighs nothing; a space inside a piece weighs one byte."""
    unused = 5  # SentencePiece.Type.UNUSED
    source, sp = vocabularies["ordinary"]
    ids = [i for i in range(sp.vocab_size()) if not sp.is_byte(i) and i > 3]
    a, b, c = (sp.id_to_piece(i) for i in ids[10:13])
    edits = {
        a: lambda kind: (a, unused),
        b: lambda kind: (f"{SPACE}q{SPACE}é", kind),
        c: lambda kind: (f"{SPACE}zz", unused),
    }
    change = lambda text, kind: edits[text](kind) if text in edits else (text, kind)
    counts = t.sentencepiece_counts(edit_pieces(source, tmp_path / "edited.model", change))
    assert counts.of(np.array([ids[0], ids[10]]))[0] == 0 and counts.boundary[ids[10]]
    assert counts.of(np.array([ids[0], ids[12]]))[0] == 0 and not counts.space[ids[12]]  # nor does its mark
    assert counts.of(np.array([ids[0], ids[11]]))[0] == 1 + 1 + 1 + 2
    assert counts.of(np.array([BOS, ids[11]]))[0] == 1 + 1 + 2


def test_three_space_bytes_count_once_only_when_in_a_row(vocabularies):
    path, sp = vocabularies["no space piece"]
    counts = t.sentencepiece_counts(path)
    e2, b96, b81 = (sp.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode())
    x = sp.piece_to_id("e")
    assert counts.of(np.array([x, e2, b96, b81, x])).tolist() == [1, 0, 0, 1]
    assert counts.of(np.array([BOS, e2, b96, b81, x])).tolist() == [0, 0, 0, 1]
    assert counts.of(np.array([x, e2, b96, b81, e2, b96, b81])).tolist() == [1, 0, 0, 1, 0, 0]
    assert counts.of(np.array([x, e2, b96, x])).tolist() == [1, 1, 1]  # another character's bytes
    assert counts.of(np.array([x, e2, b81, b96])).tolist() == [1, 1, 1]
    assert counts.of(np.array([e2, b96])).tolist() == [1]
    ordinary, sp = t.sentencepiece_counts(vocabularies["ordinary"][0]), vocabularies["ordinary"][1]
    e2, b96, b81 = (sp.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode())
    assert ordinary.of(np.array([5, e2, b96, b81])).tolist() == [1, 1, 1]


def test_a_vocabulary_without_bytes_or_space_piece(tmp_path):
    """No byte pieces at all: three unknown tokens in a row are not a spelled space."""
    import io

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(ENGLISH), model_writer=model, vocab_size=200, model_type="bpe", byte_fallback=False,
        bos_id=1, eos_id=2, unk_id=3, pad_id=0, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "plain.model").write_bytes(model.getvalue())
    rename = lambda text, kind: ("\u00a4\u00a4", kind) if text == SPACE else (text, kind)
    path = edit_pieces(tmp_path / "plain.model", tmp_path / "none.model", rename)
    counts = t.sentencepiece_counts(path)
    assert counts.of(np.array([9, 3, 3, 3, 3])).tolist() == [0, 0, 0, 0]


def test_bpb_is_bits_over_bytes():
    assert t.bpb(math.log(2) * 24, 8) == pytest.approx(3.0, abs=1e-15)
    assert t.bpb(2.0726 * 1000, 2436) == pytest.approx(2.0726 / 0.69314718056 / 2.436, rel=1e-9)


def test_bpb_of_a_uniform_model_by_hand():
    """8 bits a token under a uniform model of 256 ids: bpb is 8 * tokens / bytes."""
    data = english_dataset()
    counts = t.sentencepiece_counts(data.tokenizer)
    tokens = np.array(data.val)
    weight = int(counts.of(tokens).sum())
    assert weight == data.val_bytes
    nats = (len(tokens) - 1) * math.log(256)
    assert t.bpb(nats, weight) == pytest.approx(8 * (len(tokens) - 1) / data.val_bytes, rel=1e-12)


# ---------------------------------------------------------------- tiktoken


@pytest.fixture
def byte_encoding(monkeypatch):
    """A tiny encoding: all bytes, a few merges, a gap in the ids and a special token. No network."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {b"th": 256, b"the": 257, b" t": 258, "é".encode(): 259, b"  ": 260}
    enc = tiktoken.Encoding(
        "tiny_test", pat_str=r"\s?\w+|\s+|.", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 265}
    )
    real = tiktoken.get_encoding
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: enc if name == "tiny_test" else real(name))
    return enc


def test_tiktoken_weights_are_the_bytes_of_the_text(byte_encoding):
    enc = byte_encoding
    counts = t.tiktoken_counts("tiny_test")
    assert len(counts.base) == enc.n_vocab == 266
    documents = [enc.encode(x) for x in [*ENGLISH[:5], *FOREIGN]]
    assert any(257 in d for d in documents)
    stream = np.array(sum(([265, *d] for d in documents), []))
    lengths = [len(enc.decode(d).encode()) for d in documents]
    weights = counts.of(stream)
    assert weights.sum() == sum(lengths) == sum(len(x.encode()) for x in [*ENGLISH[:5], *FOREIGN])
    starts = np.flatnonzero(stream == 265)
    per_document = [int(weights[a : a + len(d)].sum()) for a, d in zip(starts, documents)]
    assert per_document == lengths  # the leading space is text here
    manifest = {"tokenizer": {"encoding": "tiny_test"}}
    run = SimpleNamespace(dataset=SimpleNamespace(manifest=manifest), h=SimpleNamespace(tokenizer_path=""))
    assert audit.decoder(run)(documents) == [enc.decode(d) for d in documents]
    assert counts.boundary[[261, 264, 265]].all() and not counts.boundary[:261].any()


def test_tiktoken_comes_from_the_manifest(byte_encoding, tmp_path):
    import json

    from helpers import write_shard

    write_shard(tmp_path / "x_val_000000.bin", [265, 256, 257] * 99)
    entry = {"kind": "tiktoken", "encoding": "tiny_test", "sha256": "abc", "file": None, "vocab_size": 266}
    (tmp_path / "manifest.json").write_text(json.dumps({"bos_id": 265, "tokenizer": entry}))
    dataset = t.load_dataset(tiny(data_path=tmp_path, vocab_size=266, bos_id=265))
    assert dataset.counts.of(np.array([265, 256, 257])).tolist() == [2, 3]
    with pytest.raises(t.InputError, match="vocab_size=266"):
        t.load_dataset(tiny(data_path=tmp_path, vocab_size=50_257, bos_id=265))
