"""Reading a training log, and the message for one that is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from ledger.read import runlog
from tests.ledger import fixtures_records as fx
from tests.ledger.record_helpers import NAME, TRACK, edit_log, run, write_logs


def test_parse_is_not_fooled_by_the_source(tmp_path):
    parsed = runlog.parse_log(Path(write_logs(tmp_path, (42,))[0]))
    assert parsed.source == fx.SCRIPT
    assert parsed.seed == 42
    assert parsed.final_scores == 1
    assert not parsed.over_cap
    assert parsed.steps[0].total == 20000 and parsed.steps[-1].step == 1500
    assert parsed.config["data_path"] == "somewhere/corpus"
    assert parsed.versions["torch"] == "2.13.0+cu130"
    assert parsed.hardware == "1 x NVIDIA H100 80GB HBM3"
    assert parsed.weights_format == "int6"
    assert parsed.sizes["peak"] == 21471
    assert parsed.text("phase_times", "compile") == "45678ms"


@pytest.mark.parametrize(
    "label",
    ["torch(triton:error_0.031,fp8:missing_cutlass)", "torch (error 0.031)", "triton,fp8:torch(error0.300)"],
)
def test_a_function_that_was_not_bound_is_one_value(label, tmp_path):
    """Read the reasons that the trainer writes, and the forms that older records have."""
    path = Path(write_logs(tmp_path, (42,))[0])
    edit_log(path, r" attention:\S+ compile:", f" mlp:{label} attention:flash(flash4:slower) compile:")
    machine = runlog.parse_log(path).facts["machine"]
    assert (machine["mlp"], machine["attention"]) == (label, "flash(flash4:slower)")
    assert "triton" not in machine and machine["compile"] == "inductor"


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "not a training log"),
        ("hello\n" * 50, "not a training log"),
        (fx.SCRIPT + fx.SEPARATOR + "\nother\n" + fx.SEPARATOR + "\n", "Running Python"),
    ],
)
def test_no_log(tmp_path, text, says):
    path = tmp_path / "x.txt"
    path.write_text(text)
    with pytest.raises(runlog.BadInput, match=says):
        runlog.parse_log(path)


@pytest.mark.parametrize(
    "pattern, new, says",
    [
        (r"^final_score .*\n", "", "the run did not finish"),
        (r"^(final_score .*)steps:1500", r"\1steps:many", "steps:many is not a number"),
        (r"^(final_score .*val_bpb:)\S+", r"\1nan", "diverged"),
        (r"^Serialized.*\n", "", "artifact size"),
    ],
)
def test_new_names_the_broken_log(repo, capsys, pattern, new, says):
    logs = write_logs(repo / "more")
    edit_log(Path(logs[1]), pattern, new)
    assert run(repo, "new", "Other", "--logs", *logs, "--track", TRACK) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "run1337.txt" in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in (repo / "records" / TRACK).iterdir()) == [NAME]
    assert not list((repo / "records").glob(".new*"))


def test_a_resumed_run_forgets_the_compute_of_its_earlier_end(tmp_path):
    """Its own line may lack what the earlier one said."""
    path = Path(write_logs(tmp_path, (42,))[0])
    earlier = "compute scaling_params:9 tokens:18 flops:1.5e+03\n"
    path.write_text(path.read_text() + earlier)
    assert runlog.parse_log(path).number("compute", "flops") == 1500
    path.write_text(path.read_text() + "resumed step:1 from x\ncompute scaling_params:9 tokens:27\n")
    assert runlog.parse_log(path).facts["compute"] == {"scaling_params": "9", "tokens": "27"}
