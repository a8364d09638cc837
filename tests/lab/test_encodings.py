"""`record encodings`: artifacts of one checkpoint with several settings of the codes."""

import json

import pytest

import train_gpt as t
from lab import encodings
from tests.helpers import english_args, temporary_folder
from tests.rank_cases import run_ranks


def train_on_rank(rank, folder):
    """Train three steps and leave a checkpoint set and an artifact."""
    knobs = english_args(
        out_dir=folder,
        iterations=3,
        checkpoint_every=1000,
        max_wallclock_seconds=0,
        gptq_batches=1,
        resume="",
    )
    return t.main(["train", *knobs])


@pytest.fixture(scope="module")
def trained():
    """Return the folder of a run on two ranks."""
    folder = temporary_folder()
    assert run_ranks(train_on_rank, 2, folder) == [0, 0]
    return folder


def table(trained, capsys, *words, rows=()):
    """Run the verb in this process and return the lines of its table."""
    file = trained / "table.json"
    flags = [flag for row in rows for flag in ("--row", row)]
    checkpoint = trained / "run.step3.0of2.ckpt"
    data = [word for word in english_args() if word.startswith("data_path=")]
    assert encodings.main([str(checkpoint), *data, *words, *flags, "--json", str(file)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert len(printed.out.splitlines()) == 2 + len(rows)
    return json.loads(file.read_text())


def score_of(log, label):
    """Return the bits per byte that a run's log gives for a score."""
    line = next(line for line in log.splitlines() if line.startswith(f"{label} val_loss:"))
    return float(line.split("val_bpb:")[1].split()[0])


def test_the_first_line_is_the_artifact_of_the_run(trained, capsys):
    """From the checkpoint alone: the same bytes, the same scores."""
    (line,) = table(trained, capsys)
    log = (trained / "run.txt").read_text()
    assert line["row"] == "as trained"
    assert line["num_bytes"] == (trained / "run.int6.xz").stat().st_size
    assert line["weights_bpb"] == pytest.approx(score_of(log, "final_ema"), abs=2e-8)  # measured: 4.9e-9
    # Measured: 1.8e-9.
    assert line["artifact_bpb"] == pytest.approx(score_of(log, "final_int6_roundtrip_exact"), abs=2e-8)


def test_each_row_changes_what_it_names(trained, capsys):
    rows = ["codec=rans", "int6_step=1 fit_cap=0", "artifact_weights=live", "gptq_embed=1 embed_bits=6"]
    first, rans, coarse, live, embedding = table(trained, capsys, rows=rows)
    assert rans["num_bytes"] != first["num_bytes"] and rans["artifact_bpb"] == first["artifact_bpb"]
    assert coarse["int6_step"] == 1 and coarse["num_bytes"] < first["num_bytes"]
    assert coarse["artifact_bpb"] != first["artifact_bpb"]
    assert live["weights_bpb"] != first["weights_bpb"]
    assert embedding["num_bytes"] < first["num_bytes"]
    assert all(line["weights_bpb"] == first["weights_bpb"] for line in (rans, coarse, embedding))


@pytest.mark.parametrize(
    "words,message",
    [
        (["gone.ckpt"], "gone.ckpt: cannot read the checkpoint"),
        (["CHECKPOINT", "matrix_lr=1"], "matrix_lr=1: cannot change after training"),
        (["CHECKPOINT", "--row", "val_tokens=9"], "val_tokens=9: cannot change after training"),
        (["CHECKPOINT", "val_token=9"], "'val_token' is no knob; did you mean val_tokens, "),
        (["CHECKPOINT", "seed=9"], "all rows together also data_path, tokenizer_path, val_tokens"),
        (["CHECKPOINT", "--json", "gone/x.json"], "--json gone/x.json: no such folder; make it first"),
        (["CHECKPOINT", "--row", "codec=zip"], "config key codec: 'zip' is not one of"),
        (["LOG"], "run.txt: checksum mismatch"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(words, message, trained, capsys):
    names = {"CHECKPOINT": str(trained / "run.step3.0of2.ckpt"), "LOG": str(trained / "run.txt")}
    assert encodings.main([names.get(word, word) for word in words]) == 2
    printed = capsys.readouterr().err
    assert message in printed and len(printed.splitlines()) == 1
