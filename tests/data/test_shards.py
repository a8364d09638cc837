"""The shard format, and `verify`, which names what is damaged."""

import hashlib
import os
import shutil

import numpy as np
import pytest

import prepare
import shards
from tests.data.data_cases import content, prose, write_docs


def test_shard_bytes_are_the_official_layout(files):
    assert prepare.main(files.args) == 0
    raw = (files.out / "toy_train_000000.bin").read_bytes()
    header = np.frombuffer(raw[:1024], dtype="<i4")
    assert header[:2].tolist() == [20240520, 1] and not header[3:].any()
    assert len(raw) == 1024 + 2 * header[2]
    assert np.frombuffer(raw[1024:], dtype="<u2")[0] == 1


# Each damage_... returns the name of the damaged file and words that the problem must hold.


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
    """Replace the first token, which is BOS."""
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
    """Write the first train shard and its checksum, and return its name."""
    path.write_bytes(raw)
    manifest = shards.load_manifest(out)
    manifest["splits"]["train"]["shards"][0]["sha256"] = hashlib.sha256(raw).hexdigest()
    (out / "manifest.json").write_bytes(shards.manifest_bytes(manifest))
    return path.name


DAMAGE = (
    damage_truncate,
    damage_magic,
    damage_header,
    damage_token,
    damage_tokenizer,
    damage_missing,
    damage_stray,
    damage_manifest,
    damage_bos,
    damage_vocab,
)


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_names_the_damage(files, capsys, damage):
    assert prepare.main(files.args) == 0
    assert prepare.main(["verify", str(files.out)]) == 0
    capsys.readouterr()

    name, words = damage(files.out)
    assert prepare.main(["verify", str(files.out)]) == 1
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 1
    assert name in lines[0]
    assert words in lines[0]


# Each edit_... spoils a manifest and returns words that the problem must hold.


def edit_splits(manifest):
    manifest["splits"] = list(manifest["splits"].values())
    return "key splits is [{", "not an object"


def edit_split(manifest):
    manifest["splits"]["val"] = manifest["splits"]["val"]["shards"]
    return "key splits.val is [{", "not an object"


def edit_no_val(manifest):
    del manifest["splits"]["val"]
    return "key splits.val is missing"


def edit_shards(manifest):
    manifest["splits"]["val"]["shards"] = {}
    return "key splits.val.shards is {}, not a list"


def edit_no_shards(manifest):
    manifest["splits"]["val"]["shards"] = []
    return "key splits.val.shards is empty"


def edit_shard(manifest):
    manifest["splits"]["val"]["shards"][0] = "toy_val_000000.bin"
    return 'key splits.val.shards[0] is "toy_val_000000.bin", not an object'


def edit_tokens(manifest):
    manifest["splits"]["val"]["shards"][0]["tokens"] = "767"
    return 'key splits.val.shards[0].tokens is "767", not a whole number from 0'


def edit_negative_tokens(manifest):
    manifest["splits"]["val"]["tokens"] = -1
    return "key splits.val.tokens is -1, not a whole number from 0"


def edit_sum(manifest):
    manifest["splits"]["val"]["tokens"] += 1
    return "split val: tokens is not the sum over its shards"


def edit_documents(manifest):
    manifest["splits"]["val"]["documents"] += 1
    return "split val: 6 documents, but 5 BOS tokens"


def edit_file(manifest):
    manifest["splits"]["val"]["shards"][0]["file"] = "../toy_val_000000.bin"
    return "key splits.val.shards[0].file is '../toy_val_000000.bin'"


def edit_another_split(manifest):
    manifest["splits"]["val"]["shards"] = manifest["splits"]["train"]["shards"]
    return "key splits.val.shards[0].file is 'toy_train_000000.bin', not a shard of its own of split val"


def edit_twice(manifest):
    manifest["splits"]["val"]["shards"] *= 2
    return "key splits.val.shards[1].file is 'toy_val_000000.bin', not a shard of its own"


def edit_tokenizer(manifest):
    manifest["tokenizer"] = ["tokenizer.model"]
    return "key tokenizer is ["


def edit_no_tokenizer(manifest):
    manifest["tokenizer"]["file"] = None
    return "key tokenizer names neither a file nor an encoding"


def edit_tokenizer_file(manifest):
    manifest["tokenizer"]["file"] = "/etc/passwd"
    return "key tokenizer.file is '/etc/passwd', not 'tokenizer.model'"


def edit_vocab_size(manifest):
    manifest["tokenizer"]["vocab_size"] = True
    return "key tokenizer.vocab_size is true"


def edit_source(manifest):
    manifest["source"] = "text"
    return 'key source is "text", not an object'


def edit_options(manifest):
    manifest["source"]["options"] = [500]
    return "key source.options is [500], not an object"


EDITS = (
    edit_splits,
    edit_split,
    edit_no_val,
    edit_shards,
    edit_no_shards,
    edit_shard,
    edit_tokens,
    edit_negative_tokens,
    edit_sum,
    edit_documents,
    edit_file,
    edit_another_split,
    edit_twice,
    edit_tokenizer,
    edit_no_tokenizer,
    edit_tokenizer_file,
    edit_vocab_size,
    edit_source,
    edit_options,
)


@pytest.mark.parametrize("edit", EDITS)
def test_verify_names_the_key_of_a_wrong_manifest(files, capsys, edit):
    assert prepare.main(files.args) == 0
    before = content(files.out)
    manifest = shards.load_manifest(files.out)
    words = edit(manifest)
    (files.out / "manifest.json").write_bytes(shards.manifest_bytes(manifest))
    capsys.readouterr()
    assert prepare.main(["verify", str(files.out)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(str(files.out / "manifest.json"))
    assert "remove it and repeat" in line
    for part in [words] if isinstance(words, str) else words:
        assert part in line

    (files.out / "manifest.json").unlink()
    assert prepare.main(files.args) == 0
    assert content(files.out) == before


@pytest.mark.parametrize("raw", [b"[]", b"null", b"{}", b"\xff", b"[" * 100_000])
def test_verify_of_no_manifest_is_one_line(files, capsys, raw):
    assert prepare.main(files.args) == 0
    (files.out / "manifest.json").write_bytes(raw)
    capsys.readouterr()
    assert prepare.main(["verify", str(files.out)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "manifest.json" in line and "remove it and repeat" in line


def test_a_missing_shard_is_one_line_though_the_next_begins_inside_a_document(files, capsys):
    write_docs(files.train, [prose(999, 900)])
    assert prepare.main([*files.args, "--shard-tokens", "500"]) == 0
    (files.out / "toy_train_000000.bin").unlink()
    capsys.readouterr()
    assert prepare.main(["verify", str(files.out)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "toy_train_000000.bin: no such file; repeat the command that made the dataset" in line


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_remedy_that_verify_names_helps(files, capsys, damage):
    assert prepare.main(files.args) == 0
    before = content(files.out)
    name, _ = damage(files.out)
    capsys.readouterr()
    assert prepare.main(["verify", str(files.out)]) == 1
    line = capsys.readouterr().err
    if "remove it" in line or "move it away" in line:
        (files.out / name).unlink()
    if "move it away" not in line:
        assert "repeat the command that made the dataset" in line
        assert prepare.main(files.args) == 0
    assert content(files.out) == before


def test_a_shard_that_is_cut_while_it_is_read_is_named(files, capsys, monkeypatch):
    """A mapped file would end the process with SIGBUS."""
    assert prepare.main(files.args) == 0
    path = files.out / "toy_train_000000.bin"
    read_header = shards.read_header

    def read_and_cut(file):
        tokens = read_header(file)
        if file == path:
            os.truncate(file, shards.HEADER_BYTES + tokens)
        return tokens

    monkeypatch.setattr(shards, "read_header", read_and_cut)
    with pytest.raises(shards.BadInput, match=r"toy_train_000000\.bin: cut while it was read; "):
        shards.load_tokens(path)
