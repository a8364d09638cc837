"""The byte count of tokens."""

import numpy as np
import sentencepiece

import prepare
import shards
import tokenizing


def test_byte_table_agrees_with_decoding(files, model):
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
