"""Bytes: the denominator of bits per byte is the UTF-8 length of the decoded text, token by token."""

import itertools
import json
import math
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece

import train_gpt as t
from auditor import sums
from tests.helpers import BOS, english, english_dataset, joined, tiny, train_tokenizer, write_shard

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

# ---------------------------------------------------------------- vocabularies made for the tests

# Wire types of protobuf.
VARINT = 0
EIGHT_BYTES = 1
LENGTH_DELIMITED = 2
FOUR_BYTES = 5

UNUSED = 5  # SentencePiece.Type.UNUSED
NORMAL = 1  # SentencePiece.Type.NORMAL, the default


def varint(value):
    """Encode a whole number as a protobuf varint."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def read_varint(blob, at):
    """Read the varint at a position. Returns it and the position after it."""
    value = 0
    for shift in itertools.count(step=7):
        byte = blob[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at


def fields(blob):
    """Yield the fields of a protobuf message as (field number, wire type, raw value)."""
    at = 0
    while at < len(blob):
        tag, at = read_varint(blob, at)
        wire = tag & 7
        if wire == VARINT:
            value, at = read_varint(blob, at)
        else:
            if wire == LENGTH_DELIMITED:
                size, at = read_varint(blob, at)
            else:
                size = {EIGHT_BYTES: 8, FOUR_BYTES: 4}[wire]
            value = blob[at : at + size]
            at += size
        yield tag >> 3, wire, value


def message(parts):
    """Write fields, as `fields` yields them, as a protobuf message."""
    out = []
    for number, wire, value in parts:
        out.append(varint(number << 3 | wire))
        if wire == VARINT:
            out.append(varint(value))
        elif wire == LENGTH_DELIMITED:
            out += [varint(len(value)), value]
        else:
            out.append(value)
    return b"".join(out)


def edit_pieces(source, target, change):
    """Copy a SentencePiece model, passing every piece through change(text, type). Returns the target's path.

    Field 1 of a ModelProto is a repeated SentencePiece {1: text, 2: score, 3: type}.
    """
    with open(source, "rb") as f:
        parts = list(fields(f.read()))
    edited = []
    for number, wire, value in parts:
        edited.append((number, wire, edited_piece(value, change) if number == 1 else value))
    with open(target, "wb") as f:
        f.write(message(edited))
    return str(target)


def edited_piece(blob, change):
    """Return a serialized SentencePiece with text and type passed through `change`."""
    piece = {number: value for number, _, value in fields(blob)}
    text, kind = change(piece[1].decode(), piece.get(3, NORMAL))
    score = struct.unpack("<f", piece[2])[0]
    return message(
        [
            (1, LENGTH_DELIMITED, text.encode()),
            (2, FOUR_BYTES, struct.pack("<f", score)),
            (3, VARINT, kind),
        ]
    )


def without_space_piece(text, kind):
    """Rename the piece of a single space to one that no text holds, so that a space is spelled in bytes."""
    return ("\u00a4\u00a4", kind) if text == SPACE else (text, kind)


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """Return {name: (path, processor)} of vocabularies with byte fallback.

    Three shapes of vocabulary, one with a dummy prefix, and three of these without a piece for a space.
    """
    folder = tmp_path_factory.mktemp("vocabularies")
    paths = {
        "ordinary": train_tokenizer(folder / "ordinary.model", ENGLISH, 420),
        "dummy prefix": train_tokenizer(folder / "prefix.model", ENGLISH, 420, add_dummy_prefix=True),
        "unigram": train_tokenizer(folder / "unigram.model", ENGLISH, 420, model_type="unigram"),
        "foreign": train_tokenizer(folder / "foreign.model", ENGLISH + FOREIGN * 3, 560),
    }
    for name, source in (
        ("no space piece", "ordinary"),
        ("no space piece, dummy prefix", "dummy prefix"),
        ("no space piece, unigram", "unigram"),
    ):
        paths[name] = edit_pieces(paths[source], folder / f"{source}_no.model", without_space_piece)
    return {
        name: (path, sentencepiece.SentencePieceProcessor(model_file=path)) for name, path in paths.items()
    }


NAMES = [
    "ordinary",
    "dummy prefix",
    "unigram",
    "foreign",
    "no space piece",
    "no space piece, dummy prefix",
    "no space piece, unigram",
]


def decoded(sp, ids):
    """Return the text of a document's tokens by sp.decode, in which U+2581 is a space in any spelling.

    sp.decode drops a space piece at the start. A vocabulary without one spells that space in bytes, which are
    dropped here.
    """
    text = sp.decode(ids).replace(SPACE, " ")
    has_no_space_piece = sp.is_unknown(sp.piece_to_id(SPACE))
    return text.removeprefix(" ") if has_no_space_piece else text


def space_bytes(sp):
    """Return the ids of the three byte pieces that spell U+2581."""
    return [sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]


def count(counts, *ids):
    """Return the bytes of every token but the first, as a list."""
    return counts.of(np.array(ids)).tolist()


# ---------------------------------------------------------------- SentencePiece


def test_the_vocabularies_are_what_they_are_called(vocabularies):
    _, ordinary = vocabularies["ordinary"]
    _, no_space = vocabularies["no space piece"]
    assert not ordinary.is_unknown(ordinary.piece_to_id(SPACE))
    assert no_space.is_unknown(no_space.piece_to_id(SPACE))

    ids = no_space.encode("x 9 😀")
    triples = [ids[i : i + 3] for i in range(len(ids))]
    assert space_bytes(no_space) in triples, no_space.encode("x 9 😀", out_type=str)
    byte_share = np.mean([ordinary.is_byte(i) for text in FOREIGN for i in ordinary.encode(text)])
    assert byte_share > 0.4

    _, prefix = vocabularies["dummy prefix"]
    assert prefix.encode("the", out_type=str)[0].startswith(SPACE)


@pytest.mark.parametrize("name", NAMES)
def test_sum_is_the_utf8_length_of_every_document(vocabularies, name):
    path, sp = vocabularies[name]
    counts = t.sentencepiece_counts(path)
    documents = [sp.encode(text) for text in ENGLISH[:20] + FOREIGN + ENGLISH[20:30]]
    stream = np.array([*joined([BOS, *document] for document in documents), BOS], dtype=np.uint16)
    target_bytes = counts.of(stream)
    assert target_bytes.shape == (len(stream) - 1,)
    assert target_bytes.dtype == np.int64 and target_bytes.min() >= 0

    lengths = [len(decoded(sp, document).encode()) for document in documents]
    ends = np.cumsum([len(document) + 1 for document in documents])  # the BOS after each included
    found = np.diff(np.concatenate([[0], np.cumsum(target_bytes)])[ends], prepend=0)
    wrong = [
        (sp.id_to_piece(document), got, length)
        for document, got, length in zip(documents, found, lengths)
        if got != length
    ]
    assert not wrong, wrong[:2]
    assert target_bytes.sum() == sum(lengths) > 1000

    # The auditor's texts are as long.
    run = SimpleNamespace(dataset=SimpleNamespace(manifest={}), h=SimpleNamespace(tokenizer_path=path))
    assert [len(text.encode()) for text in sums.tokenizer_of(run).decode(documents)] == lengths


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_counts_as_many_bytes_as_its_text_has(vocabularies, name):
    """Not only whole documents add up, but every cut before a piece that begins a character."""
    path, sp = vocabularies[name]
    counts = t.sentencepiece_counts(path)
    spells_spaces = "no space" in name
    for text in ENGLISH[:3] + FOREIGN:
        ids = sp.encode(text)
        bytes_before = np.concatenate([[0], np.cumsum(counts.of(np.array([BOS, *ids])))])
        for cut in range(1, len(ids) + 1):
            if cut < len(ids) and (sp.is_byte(ids[cut]) or spells_spaces):
                continue
            expected = len(decoded(sp, ids[:cut]).encode())
            alone = int(counts.of(np.array([BOS, *ids[:cut]])).sum())
            assert bytes_before[cut] == alone == expected, (text, cut)


def test_the_space_after_a_document_start_is_not_in_the_text(vocabularies):
    path, sp = vocabularies["dummy prefix"]
    counts = t.sentencepiece_counts(path)
    ids = sp.encode("the river")
    first = sp.id_to_piece(ids[0])
    assert first.startswith(SPACE)
    assert count(counts, BOS, ids[0]) == [len(first) - 1]
    assert count(counts, ids[-1], ids[0]) == [len(first)]
    assert [count(counts, ids[0], special) for special in (0, 1, 2)] == [[0], [0], [0]]  # pad, bos, eos


def test_unused_pieces_and_inner_spaces(vocabularies, tmp_path):
    """A piece marked unused counts no byte; a space inside a piece counts one."""
    source, sp = vocabularies["ordinary"]
    plain, unused, spaces, unused_space = [i for i in range(4, sp.vocab_size()) if not sp.is_byte(i)][9:13]
    edits = {
        sp.id_to_piece(unused): (sp.id_to_piece(unused), UNUSED),
        sp.id_to_piece(spaces): (f"{SPACE}q{SPACE}é", NORMAL),
        sp.id_to_piece(unused_space): (f"{SPACE}zz", UNUSED),
    }

    def change(text, kind):
        return edits.get(text, (text, kind))

    counts = t.sentencepiece_counts(edit_pieces(source, tmp_path / "edited.model", change))
    assert count(counts, plain, unused) == [0] and counts.boundary[unused]
    assert count(counts, plain, unused_space) == [0] and not counts.space[unused_space]
    assert count(counts, plain, spaces) == [1 + 1 + 1 + 2]
    assert count(counts, BOS, spaces) == [1 + 1 + 2]


def test_three_space_bytes_count_once_only_when_in_a_row(vocabularies):
    path, sp = vocabularies["no space piece"]
    counts = t.sentencepiece_counts(path)
    e2, b96, b81 = space_bytes(sp)
    x = sp.piece_to_id("e")
    assert count(counts, x, e2, b96, b81, x) == [1, 0, 0, 1]
    assert count(counts, BOS, e2, b96, b81, x) == [0, 0, 0, 1]
    assert count(counts, x, e2, b96, b81, e2, b96, b81) == [1, 0, 0, 1, 0, 0]
    assert count(counts, x, e2, b96, x) == [1, 1, 1]  # bytes of another character
    assert count(counts, x, e2, b81, b96) == [1, 1, 1]
    assert count(counts, e2, b96) == [1]

    path, sp = vocabularies["ordinary"]
    assert count(t.sentencepiece_counts(path), 5, *space_bytes(sp)) == [1, 1, 1]


def test_a_vocabulary_without_bytes_or_space_piece(tmp_path):
    """Without byte pieces, three unknown tokens in a row are not a spelled space."""
    plain = train_tokenizer(tmp_path / "plain.model", ENGLISH, 200, byte_fallback=False)
    path = edit_pieces(plain, tmp_path / "none.model", without_space_piece)
    assert count(t.sentencepiece_counts(path), 9, 3, 3, 3, 3) == [0, 0, 0, 0]


def test_text_that_the_tokenizer_cannot_spell_has_no_score(tmp_path):
    """An unknown piece decodes to 5 bytes, whatever it stands for: no denominator is right.

    Training text may have some, and so may what val_tokens leaves out.
    """
    model = train_tokenizer(tmp_path / "plain.model", ENGLISH, 200, byte_fallback=False)
    sp = sentencepiece.SentencePieceProcessor(model_file=model)
    odd = "the \u2603\u2603 river"
    unknown = sp.encode(odd).count(sp.unk_id())
    assert unknown > 0 and len(sp.decode(sp.encode(odd)).encode()) != len(odd.encode())
    assert t.sentencepiece_counts(model).unknown == sp.unk_id()

    sound = joined([BOS, *sp.encode(text)] for text in ENGLISH)
    lossy = [*sound, BOS, *sp.encode(odd)]
    knobs = dict(data_path=tmp_path, tokenizer_path=model, vocab_size=sp.vocab_size(), report_split="more")
    for split in ("train", "val", "more"):
        write_shard(tmp_path / f"x_{split}_000000.bin", lossy if split == "train" else sound)
    t.load_dataset(tiny(**knobs), trains=True)
    for split in ("more", "val"):
        write_shard(tmp_path / f"x_{split}_000000.bin", lossy)
        with pytest.raises(
            t.InputError, match=f"{unknown} tokens of {split} are the unknown piece.*byte_fall"
        ):
            t.load_dataset(tiny(**knobs))
        t.load_dataset(tiny(**knobs, val_tokens=len(sound) - 1))


FLAG_PAIRS = list(itertools.product([False, True], repeat=2))
SPACED = [
    " a",
    "a",
    "  two",
    "    indented = 1\n        more(indented)\n",
    " ",
    "word",
    *("x y", " Größe  naïve", f"{SPACE}mark", "😀 end "),
]


@pytest.fixture(scope="module")
def flagged(tmp_path_factory):
    """Return {(add_dummy_prefix, remove_extra_whitespaces, has a piece U+2581): path}."""
    folder = tmp_path_factory.mktemp("flagged")
    paths = {}
    for dummy, remove in FLAG_PAIRS:
        path = folder / f"{dummy}_{remove}.model"
        options = dict(add_dummy_prefix=dummy, remove_extra_whitespaces=remove)
        paths[dummy, remove, True] = train_tokenizer(path, ENGLISH + SPACED * 3, 420, **options)
        bare = folder / f"{dummy}_{remove}_bare.model"
        paths[dummy, remove, False] = edit_pieces(path, bare, without_space_piece)
    return paths


@pytest.mark.parametrize("has_piece", [True, False], ids=["piece", "no_piece"])
@pytest.mark.parametrize("dummy,remove", FLAG_PAIRS)
def test_a_first_space_counts_if_decode_keeps_it(flagged, dummy, remove, has_piece):
    """Compare with the length of the decoded text, document by document, over all pairs of the two flags."""
    path = flagged[dummy, remove, has_piece]
    sp = sentencepiece.SentencePieceProcessor(model_file=path)
    assert sp.is_unknown(sp.piece_to_id(SPACE)) == (not has_piece)
    counts = t.sentencepiece_counts(path)
    drops = dummy or remove
    assert counts.keeps_first == (not drops)

    run = SimpleNamespace(dataset=SimpleNamespace(manifest={}), h=SimpleNamespace(tokenizer_path=path))
    texts = SPACED + FOREIGN + ENGLISH[:10]
    documents = [sp.encode(text) for text in texts]
    audited = sums.tokenizer_of(run).decode(documents)
    for text, document, of_auditor in zip(texts, documents, audited):
        expected = sp.decode(document).replace(SPACE, " ")
        if drops and not has_piece:  # the first space is spelled in bytes, which decode keeps
            expected = expected.removeprefix(" ")
        assert counts.of(np.array([BOS, *document])).sum() == len(expected.encode()), text
        assert of_auditor == expected
        if not drops and text in SPACED[:6]:  # which normalization leaves alone
            assert expected == text.replace("\n", " ")
    stream = np.array(joined([BOS, *document] for document in documents))
    assert counts.of(stream).sum() == sum(len(text.encode()) for text in audited)


# ---------------------------------------------------------------- bits per byte


def test_bpb_is_bits_over_bytes():
    assert t.bpb(math.log(2) * 24, 8) == pytest.approx(3.0, abs=1e-15)  # measured: 0
    # Measured: 7.9e-14.
    assert t.bpb(2.0726 * 1000, 2436) == pytest.approx(2.0726 / 0.69314718056 / 2.436, rel=1e-11)


def test_bpb_of_a_uniform_model_by_hand():
    """A uniform model of 256 ids spends 8 bits a token: bpb is 8 * tokens / bytes."""
    data = english_dataset()
    counts = t.sentencepiece_counts(data.tokenizer)
    tokens = np.array(data.val)
    num_bytes = int(counts.of(tokens).sum())
    assert num_bytes == data.val_bytes
    nats = (len(tokens) - 1) * math.log(256)
    # Measured: 0.
    assert t.bpb(nats, num_bytes) == pytest.approx(8 * (len(tokens) - 1) / data.val_bytes, rel=1e-12)


# ---------------------------------------------------------------- tiktoken

END_OF_TEXT = 265


@pytest.fixture
def byte_encoding(monkeypatch):
    """Return a tiny encoding that tiktoken knows as tiny_test, without the network.

    It has all bytes, a few merges, a gap in the ids and a special token.
    """
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"th": 256, b"the": 257, b" t": 258, "é".encode(): 259, b"  ": 260}
    encoding = tiktoken.Encoding(
        "tiny_test",
        pat_str=r"\s?\w+|\s+|.",
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": END_OF_TEXT},
    )
    get_encoding = tiktoken.get_encoding

    def get(name):
        return encoding if name == "tiny_test" else get_encoding(name)

    monkeypatch.setattr(tiktoken, "get_encoding", get)
    return encoding


def test_tiktoken_counts_are_the_bytes_of_the_text(byte_encoding):
    counts = t.tiktoken_counts("tiny_test")
    assert len(counts.base) == byte_encoding.n_vocab == 266
    assert counts.boundary[[261, 264, 265]].all() and not counts.boundary[:261].any()

    texts = [*ENGLISH[:5], *FOREIGN]
    documents = [byte_encoding.encode(text) for text in texts]
    assert any(257 in document for document in documents)
    stream = np.array(joined([END_OF_TEXT, *document] for document in documents))
    lengths = [len(byte_encoding.decode(document).encode()) for document in documents]
    target_bytes = counts.of(stream)
    assert target_bytes.sum() == sum(lengths) == sum(len(text.encode()) for text in texts)

    starts = np.flatnonzero(stream == END_OF_TEXT)
    per_document = [
        int(target_bytes[start : start + len(document)].sum()) for start, document in zip(starts, documents)
    ]
    assert per_document == lengths  # a space at the start is in the text here

    manifest = {"tokenizer": {"encoding": "tiny_test"}}
    run = SimpleNamespace(dataset=SimpleNamespace(manifest=manifest), h=SimpleNamespace(tokenizer_path=""))
    assert sums.tokenizer_of(run).decode(documents) == [
        byte_encoding.decode(document) for document in documents
    ]


def test_tiktoken_comes_from_the_manifest(byte_encoding, tmp_path):
    write_shard(tmp_path / "x_val_000000.bin", [END_OF_TEXT, 256, 257] * 99)
    entry = {"kind": "tiktoken", "encoding": "tiny_test", "sha256": "abc", "file": None, "vocab_size": 266}
    (tmp_path / "manifest.json").write_text(json.dumps({"bos_id": END_OF_TEXT, "tokenizer": entry}))
    dataset = t.load_dataset(tiny(data_path=tmp_path, vocab_size=266, bos_id=END_OF_TEXT))
    assert count(dataset.counts, END_OF_TEXT, 256, 257) == [2, 3]
    with pytest.raises(t.InputError, match="vocab_size=266"):
        t.load_dataset(tiny(data_path=tmp_path, vocab_size=50_257, bos_id=END_OF_TEXT))
