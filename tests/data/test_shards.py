"""The shard format, and `verify`, which names what is damaged."""

import hashlib
import shutil

import numpy as np
import pytest

import prepare
import shards
from data_cases import content


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
    assert len(lines) == 1 and name in lines[0] and words in lines[0]


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
