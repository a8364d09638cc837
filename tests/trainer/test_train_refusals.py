"""Files in the way of a run or of eval: each is one line, and nothing is half-written."""

import json
import os
import re

import pytest
import torch

import train_gpt as t
from tests.audit.audit_helpers import main_here
from tests.helpers import (
    english_args,
    english_dataset,
    stop_one_line,
)
from tests.trainer.train_cases import finished_with

pytestmark = pytest.mark.usefixtures("clean_environment")


def test_a_log_that_exists_is_refused(capsys):
    run = finished_with()
    err = stop_one_line(english_args(iterations=1, out_dir=run.folder), capsys)
    assert "run.txt" in err and "run_id" in err
    assert (run.folder / "run.txt").read_text(encoding="utf-8") == run.log
    assert (run.folder / "run.int6.xz").read_bytes() == run.blob


@pytest.mark.parametrize("name", ["../../x", "..", ".", "a/b", "/tmp/x", " ", "a\nb", "x" * 201, "-x"])
def test_a_run_id_that_cannot_name_a_file_is_one_line(name, tmp_path, capsys):
    out_dir = tmp_path / "below" / "out"
    err = stop_one_line(english_args(iterations=1, run_id=name, out_dir=out_dir), capsys)
    assert "config key run_id" in err
    assert ("has control characters" if "\n" in name else "cannot name a file") in err
    assert repr(name)[:40] in err
    assert os.listdir(tmp_path) == []

    blob = finished_with().folder / "run.int6.xz"
    argv = [f"data_path={english_dataset().path}", f"out_dir={out_dir}", f"run_id={name}"]
    assert "config key run_id" in stop_one_line(["eval", str(blob), *argv], capsys)
    assert os.listdir(tmp_path) == []


def test_an_out_dir_below_a_file_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    err = stop_one_line(english_args(iterations=1, out_dir=tmp_path / "file" / "below"), capsys)
    assert str(tmp_path / "file" / "below") in err and "out_dir" in err


def test_a_disk_that_fills_up_at_export_is_one_line(tmp_path, capsys, monkeypatch):
    def full(path, blob):
        raise t.InputError(f"{path}: cannot write the artifact (No space left on device); free space")

    monkeypatch.setattr(t, "write_atomic", full)
    err = stop_one_line(english_args(iterations=1, warmup_steps=0, out_dir=tmp_path), capsys)
    assert "run.int6.xz" in err and "No space" in err


@pytest.mark.parametrize("version", ["2.10.0", "2.9.1+cu130", "1.13.1"])
def test_an_older_pytorch_is_one_line(version, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    err = stop_one_line(english_args(iterations=1, out_dir=tmp_path / "logs"), capsys)
    assert f"PyTorch {version} is too old: 2.11 or later is required" in err
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "3.0.0a0+git1234"])
def test_pytorch_of_today_and_tomorrow_is_taken(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    t.check_torch()


@pytest.mark.parametrize("apple", [True, False])
def test_a_run_says_that_apples_gpu_is_not_used(apple, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
    assert t.main(english_args(iterations=1, warmup_steps=0, out_dir=tmp_path)) == 0
    assert ("\nApple's GPU is not used: " in (tmp_path / "run.txt").read_text().split("=" * 100)[-1]) == apple


def test_without_a_run_id_the_name_tells_what_it_was(tmp_path):
    assert t.main(english_args(iterations=1, warmup_steps=0, run_id="", out_dir=tmp_path, seed=4)) == 0
    names = sorted(os.listdir(tmp_path))
    assert len(names) == 2
    assert all(re.match(r"^\d{8}_\d{6}_record_sp1024_seed4\.(txt|int6\.xz)$", n) for n in names)


# How the tensors of another script's artifact differ, and the one that the error names.
OTHER_TENSORS = [
    (lambda tensors: tensors.pop("smear_gate"), "smear_gate"),  # it had none
    (lambda tensors: tensors.update(attn_gain=tensors["attn_scale"]), "attn_gain"),  # it had one more
    (lambda tensors: tensors.update(q_gain=tensors["q_gain"][:1]), "q_gain"),  # of another shape
]


@pytest.mark.parametrize("command", ["eval", "audit"])
@pytest.mark.parametrize("change,name", OTHER_TENSORS)
def test_an_artifact_of_another_script_is_one_line(command, change, name, tmp_path, capfd, monkeypatch):
    """The header has this script's config, but the tensors differ: the line names file, tensor and remedy."""
    h = t.load_config(english_args(), {})
    tensors = {k: p.detach() for k, p in t.GPT(h).named_parameters()}
    change(tensors)
    path = tmp_path / "old.int6.xz"
    with monkeypatch.context() as patch:
        patch.setitem(t.STORED_AS, name, t.STORED_AS.get(name, "f16"))
        path.write_bytes(t.pack_artifact(tensors, h))
    err = stop_one_line([command, str(path), f"data_path={english_dataset().path}"], capfd, main=main_here)
    assert str(path) in err
    assert f"{name!r} does not fit" in err
    assert "the script that wrote it" in err


@pytest.mark.parametrize("command", ["eval", "audit"])
@pytest.mark.parametrize(
    "changes,words",
    [
        (dict(num_layers=0), "config key num_layers: 0 must be at least 1"),
        (dict(num_heads=3), "config: num_heads=3 must divide model_dim="),
        (dict(logit_softcap=0.0), "config: logit_softcap=0 must be above 0"),
        (dict(model_dim=1 << 40), "parameters"),
    ],
    ids=str,
)
def test_a_header_that_makes_no_config_names_the_file(command, changes, words, tmp_path, capfd):
    header, payload = t.open_artifact(finished_with().blob)
    header["config"] |= changes
    text = json.dumps(header).encode()
    path = tmp_path / "odd.int6.xz"
    path.write_bytes(t.pack_xz(b"".join([t.MAGIC, len(text).to_bytes(4, "little"), text, payload])))
    knobs = [f"data_path={english_dataset().path}", f"out_dir={tmp_path}/out"]
    err = stop_one_line([command, str(path), *knobs], capfd, main=main_here)
    assert f"{path} with the knobs given: config" in err and words in err
    assert not (tmp_path / "out").exists()


def test_a_knob_that_eval_refuses_is_not_blamed_on_the_artifact(capsys):
    artifact = str(finished_with().folder / "run.int6.xz")
    for knob in ("ttt_passes=many", "warp=9", "seed"):
        assert artifact not in stop_one_line(["eval", artifact, knob], capsys)
