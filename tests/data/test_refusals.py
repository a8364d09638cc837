"""Bad input, a full disk and an interrupt: one line of error each, and nothing half-written is left."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import prepare
import shards
from tests.data.data_cases import content, make_documents, one_line, replaced, write_docs

# Each bad_... spoils the arguments of a build and returns them with words that the error must hold.


def bad_missing(folder, args):
    return replaced(args, train=folder / "none.txt"), "none.txt: no such file"


def bad_empty(folder, args):
    (folder / "e.txt").write_bytes(b"")
    return replaced(args, val=folder / "e.txt"), "e.txt: empty file"


def bad_only_blanks(folder, args):
    (folder / "e.txt").write_bytes(b" \n\0\n")
    return replaced(args, val=folder / "e.txt"), "e.txt: no documents"


def bad_suffix(folder, args):
    (folder / "e.csv").write_bytes(b"x")
    return replaced(args, val=folder / "e.csv"), "e.csv: unknown input format"


def bad_utf8(folder, args):
    (folder / "u.txt").write_bytes(b"fine\0\xff\xfe")
    return replaced(args, val=folder / "u.txt"), "u.txt: document 2: not valid UTF-8"


def bad_field(folder, args):
    path = write_docs(folder / "f.jsonl", ["a"], field="body")
    return replaced(args, val=path), "f.jsonl: line 1: no text field 'text' (found: body, id)"


def bad_json(folder, args):
    (folder / "j.jsonl").write_text('{"text": "a"}\n{"text": \n')
    return replaced(args, val=folder / "j.jsonl"), "j.jsonl: line 2: not JSON"


def bad_utf8_json(folder, args):
    (folder / "j.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    return replaced(args, val=folder / "j.jsonl"), "j.jsonl: line 1: not valid UTF-8; convert"


def bad_deep_json(folder, args):
    (folder / "j.jsonl").write_text('{"text": ' + "[" * 100_000)
    return replaced(args, val=folder / "j.jsonl"), "j.jsonl: line 1: not JSON (maximum recursion"


def bad_key(folder, args):
    (folder / "k.jsonl").write_text('{"a\\nb": 1}\n')
    return replaced(args, val=folder / "k.jsonl"), "k.jsonl: line 1: no text field 'text' (found: a\\nb)"


def bad_file_name(folder, args):
    return replaced(args, val=folder / "a\nb.txt"), "a\\nb.txt: no such file"


def bad_pipe(folder, args):
    os.mkfifo(folder / "p.txt")
    return replaced(args, val=folder / "p.txt"), "p.txt: not a file; give a file"


def bad_tokenizer_pipe(folder, args):
    os.mkfifo(folder / "p.model")
    return replaced(args, tokenizer=folder / "p.model"), "p.model: not a file; give a file"


def bad_zst(folder, args):
    path = write_docs(folder / "z.txt.zst", make_documents(0, 20))
    path.write_bytes(path.read_bytes()[:-10])
    return replaced(args, train=path), "z.txt.zst: zstd file cut short"


def bad_tokenizer(folder, args):
    (folder / "x.model").write_bytes(b"nonsense")
    return replaced(args, tokenizer=folder / "x.model"), "x.model: not a SentencePiece model"


def bad_tokenizer_name(folder, args):
    return replaced(args, tokenizer="no_such"), "no_such: no such file and no such tiktoken encoding"


def bad_out(folder, args):
    (folder / "file").write_text("x")
    return replaced(args, out=folder / "file" / "out"), "not a directory"


def bad_split_name(folder, args):
    return [*args, "--split", f"two_val={folder / 'v.txt'}"], "would also match *_val_[0-9]*.bin"


def bad_empty_name(folder, args):
    return replaced(args, name=""), "--name '': use letters"


def bad_long_name(folder, args):
    return replaced(args, name="n" * 300), "100 at most"


def bad_long_split(folder, args):
    return [*args, "--split", f"{'s' * 300}={folder / 'v.txt'}"], "100 characters at most"


def bad_shard_tokens(folder, args):
    return [*args, "--shard-tokens", "0"], "--shard-tokens 0: choose"


BAD_INPUT = (
    bad_missing,
    bad_empty,
    bad_only_blanks,
    bad_suffix,
    bad_utf8,
    bad_field,
    bad_json,
    bad_utf8_json,
    bad_deep_json,
    bad_key,
    bad_file_name,
    bad_pipe,
    bad_tokenizer_pipe,
    bad_zst,
    bad_tokenizer,
    bad_tokenizer_name,
    bad_out,
    bad_split_name,
    bad_empty_name,
    bad_long_name,
    bad_long_split,
    bad_shard_tokens,
)
REMEDIES = (
    "choose",
    "give",
    "use letters",
    "use lower-case",
    "check",
    "fill",
    "name it",
    "convert",
    "copy it",
    "one object per line",
)


@pytest.mark.parametrize("bad", BAD_INPUT)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, files, capsys, bad):
    args, words = bad(tmp_path, files.args)
    before = sorted(tmp_path.rglob("*"))
    assert prepare.main(args) == 2
    line = one_line(capsys)
    assert words in line
    assert any(remedy in line for remedy in REMEDIES)
    assert sorted(tmp_path.rglob("*")) == before


def test_command_line_errors_are_one_line(capsys):
    for argv in (
        ["text"],
        ["nonsense"],
        ["download", "--train-shards", "many"],
        ["download", "--out", ""],
        ["offline", "--out", ""],
        ["verify", ""],
    ):
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
    assert prepare.main(files.args) == 2
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
    assert prepare.main(replaced(files.args, name="other")) == 2  # not known to be ours


def test_interrupt_leaves_nothing(files, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards.ShardWriter, "close", stop)
    assert prepare.main(files.args) == 130
    assert not files.out.exists()


@pytest.mark.parametrize("count", ["0", "-1"])
@pytest.mark.parametrize("verb", ["download", "auto"])
def test_a_number_of_shards_below_one_is_refused_before_the_hub_is_asked(verb, count, capsys, monkeypatch):
    monkeypatch.setattr(prepare.download, "probe_hub", lambda: pytest.fail("the hub was asked"))
    assert prepare.main([verb, "--train-shards", count]) == 2
    assert one_line(capsys) == f"error: --train-shards {count}: choose 1 or more"


def test_a_pipe_among_the_shards_is_named(files, capsys):
    assert prepare.main(files.args) == 0
    path = files.out / "toy_val_000000.bin"
    path.unlink()
    os.mkfifo(path)
    capsys.readouterr()
    assert prepare.main(["verify", str(files.out)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"{path}: not a file; give a file, not a folder or a pipe"
    ]


def run_prepare(*argv, **options):
    """Start data/prepare.py in a process."""
    command = [sys.executable, prepare.__file__, *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_an_ascii_console_shows_another_name_escaped(files, tmp_path):
    assert prepare.main(files.args) == 0
    folder = tmp_path / "d\u00e4ta"
    files.out.rename(folder)
    process = run_prepare("verify", folder, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "d\\xe4ta: ok, 2 shards" in out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_console_on_a_full_disk_is_one_line(files):
    assert prepare.main(files.args) == 0
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, prepare.__file__, "verify", files.out],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr == "error: standard output: no space left on device; send it elsewhere\n"
