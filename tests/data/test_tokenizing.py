"""The byte count of tokens: the UTF-8 length of the text that the tokenizer decodes, document by document."""

import io
import re

import numpy as np
import pytest
import sentencepiece

import build
import prepare
import shards
import tokenizing
import train_gpt
from tests.data.data_cases import make_documents

SPACE = "\u2581"
DOCUMENTS = [
    " a",
    "  two spaces first\n    and an indented line",
    "plain words of the text",
    "word",
    "caf\u00e9 \u65e5\u672c \U0001f642  x",
    *make_documents(0, 3),
]


def test_count_agrees_with_decoding(files, model):
    assert prepare.main(files.args) == 0
    tokenizer = tokenizing.open_tokenizer(model)
    about = shards.load_manifest(files.out)["splits"]["train"]
    path = files.out / about["shards"][0]["file"]
    starts = np.flatnonzero(shards.load_tokens(path) == 1)
    limit = int(starts[3]) - 1  # three whole documents
    total, scored = tokenizing.count_bytes([path], tokenizer, limit)
    assert total == about["decoded_bytes"]

    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = np.array(shards.load_tokens(path))[: limit + 1]
    parts = np.split(tokens, np.flatnonzero(tokens == 1)[1:])
    assert len(parts) == 3
    assert scored == sum(len(sp.decode(p[1:].tolist()).encode()) for p in parts)


def test_a_leading_space_counts_unless_a_boundary_precedes_it(tmp_path, model):
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    the = sp.piece_to_id("\u2581the")
    assert not sp.is_unknown(the)
    ids = np.array([1, the, the, 1, the, sp.piece_to_id("<0x41>"), the], dtype="<u2")
    path = tmp_path / "x_val_000000.bin"
    path.write_bytes(shards.shard_header(len(ids)) + ids.tobytes())
    count = tokenizing.count_bytes([path, path], tokenizing.open_tokenizer(model), 3)
    assert count == (2 * (3 + 4 + 3 + 1 + 4), 3 + 4)

    first_piece = sp.id_to_piece(sp.encode("the end")[0])
    assert not first_piece.startswith("\u2581")  # no dummy prefix, as in the official models


def train_model(folder, dummy_prefix, strips, space_piece):
    """Train a SentencePiece model and return its path.

    dummy_prefix: add_dummy_prefix. strips: remove_extra_whitespaces. space_piece: whether U+2581 is a piece
    of its own; if not, byte pieces spell a space.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_documents(0, 80)),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=strips,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    blob = model.getvalue()
    if not space_piece:
        entry = b"\n\x03" + SPACE.encode() + b"\x15"  # of the piece, up to the tag of its score
        assert blob.count(entry) == 1
        blob = blob.replace(entry, b"\n\x03\xc2\xa4q\x15")  # a piece that no text holds
    path = folder / "flags.model"
    path.write_bytes(blob)
    return path


def write_stream(folder, documents, cuts):
    """Write documents of ids, each after BOS, as shards cut at the positions `cuts`; return their paths."""
    stream = np.concatenate([[1, *ids] for ids in documents]).astype("<u2")
    paths = []
    for number, tokens in enumerate(np.split(stream, cuts)):
        paths.append(folder / f"x_val_{number:06d}.bin")
        paths[-1].write_bytes(shards.shard_header(len(tokens)) + tokens.tobytes())
    return paths


@pytest.mark.parametrize("dummy_prefix", [False, True])
@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("space_piece", [False, True])
def test_every_model_counts_the_text_itself(tmp_path, dummy_prefix, strips, space_piece):
    path = train_model(tmp_path, dummy_prefix, strips, space_piece)
    tokenizer = tokenizing.open_tokenizer(path)
    build.start_coder(tokenizer)
    encoded = build.encode(DOCUMENTS)
    texts = [re.sub(" +", " ", text).strip(" ") for text in DOCUMENTS] if strips else DOCUMENTS
    assert [document.decoded_bytes for document in encoded] == [len(text.encode()) for text in texts]

    # The same in shards, wherever they are cut.
    documents = [document.ids[1:] for document in encoded]
    for cuts in ([], [7], [9, 10, 200]):
        paths = write_stream(tmp_path, documents, cuts)
        total, scored = tokenizing.count_bytes(paths, tokenizer, 10**9)
        assert total == scored == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize(
    ("dummy_prefix", "strips"), [(False, False), (False, True), (True, False), (True, True)]
)
@pytest.mark.parametrize("space_piece", [False, True])
def test_the_trainer_counts_the_same_up_to_any_target(tmp_path, dummy_prefix, strips, space_piece):
    path = train_model(tmp_path, dummy_prefix, strips, space_piece)
    tokenizer = tokenizing.open_tokenizer(path)
    documents = tokenizer.load().encode(DOCUMENTS[:5])
    paths = write_stream(tmp_path, documents, [])
    tokens = np.array(shards.load_tokens(paths[0]))
    trainer = train_gpt.sentencepiece_counts(str(path))
    for limit in range(1, len(tokens)):
        scored = tokenizing.count_bytes(paths, tokenizer, limit).scored
        assert scored == trainer.of(tokens[: limit + 1]).sum(), limit


def test_a_space_inside_a_piece_is_one_byte(tmp_path):
    """Without split_by_whitespace, pieces such as `of\u2581the` join words."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["state of the art and end of the day"] * 50),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        split_by_whitespace=False,
        add_dummy_prefix=False,
        bos_id=1,
        eos_id=2,
        pad_id=0,
        unk_id=3,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    path = tmp_path / "inner.model"
    path.write_bytes(model.getvalue())
    tokenizer = tokenizing.open_tokenizer(path)
    text = "state of the art and end of the day"
    [ids] = tokenizer.load().encode([text])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert any(SPACE in processor.id_to_piece(token)[1:] for token in ids)
    paths = write_stream(tmp_path, [ids, ids], [])
    assert tokenizing.count_bytes(paths, tokenizer, 2 * len(ids) + 1) == (2 * len(text), 2 * len(text))


def test_tiktoken_counts_bytes_up_to_any_target(tmp_path, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b" t": 256}
    specials = {"<|endoftext|>": 257}
    encoding = tiktoken.Encoding("toy", pat_str=r"\s?\w+|\s+", mergeable_ranks=ranks, special_tokens=specials)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    tokenizer = tokenizing.open_tokenizer("toy")

    ids = [257, *encoding.encode("a \u65e5 t"), 257, *encoding.encode(" text")]
    lengths = [0, 1, 1, 1, 1, 1, 2, 0, 2, 1, 1, 1]
    tokens = np.array(ids, dtype="<u2")
    path = tmp_path / "x_val_000000.bin"
    path.write_bytes(shards.shard_header(len(tokens)) + tokens.tobytes())
    assert len(ids) == len(lengths)
    for limit in range(1, len(ids)):
        count = tokenizing.count_bytes([path], tokenizer, limit)
        assert count == (sum(lengths), sum(lengths[1 : limit + 1]))
