"""Values that are not finite end a run with a diagnosis."""

import re

import pytest
import torch

import train_gpt as t
from tests.trainer.fault_cases import STEPS, after_step, args, checkpoint, lines, sets

pytestmark = pytest.mark.usefixtures("clean_environment")


def parameter(optimizer, name):
    """Return the storage of a parameter in the optimizer's buffers."""
    if name in ("qo_bank", "kv_bank"):  # alone in their buffers
        return optimizer.bank[name.removesuffix("_bank")]
    shapes = t.parameter_table(optimizer.h)
    at = 0
    for spec in (spec for spec in t.SMALL if spec.name in shapes):
        shape, _ = shapes[spec.name]
        size = torch.Size(shape).numel()
        if spec.name == name:
            return optimizer.flat[at : at + size]
        at += -(-size // 64) * 64  # each begins at a multiple of 64
    raise KeyError(name)


def corrupt(name):
    """Return an action for after_step: make the first value of a parameter nan."""

    def action(optimizer):
        parameter(optimizer, name).view(-1)[:1].fill_(float("nan"))

    return action


@pytest.mark.parametrize("name", ["resid_mix", "kv_bank"])
def test_values_that_are_not_finite_end_the_run_with_a_diagnosis(tmp_path, monkeypatch, capsys, name):
    after_step(monkeypatch, 5, corrupt(name))
    capsys.readouterr()
    assert t.main(args(tmp_path)) == 1
    err = capsys.readouterr().err
    found = re.search(
        r"step (\d+): diverged, loss nan, gradient norm nan, first bad tensor (\w+), "
        r"last good checkpoint (\d+)",
        err,
    )
    assert found and 5 <= int(found[1]) <= 7 and int(found[3]) <= 5, err
    assert found[0] in "\n".join(lines(tmp_path))
    assert not (tmp_path / "run.int6.xz").exists()

    for step in sets(tmp_path):
        blob = checkpoint(tmp_path, step).read_bytes()
        header_end = 4 + int.from_bytes(blob[:4], "little")
        values = torch.frombuffer(bytearray(blob[header_end:-32]), dtype=torch.float32)
        assert values.isfinite().all()
    monkeypatch.undo()
    assert t.main(args(tmp_path, resume="auto")) == 0  # from the last good checkpoint


def test_a_last_step_that_diverges_is_found_too(tmp_path, monkeypatch, capsys):
    after_step(monkeypatch, STEPS - 1, corrupt("kv_bank"))
    assert t.main(args(tmp_path)) == 1
    assert f"step {STEPS}: diverged, loss nan" in capsys.readouterr().err
    assert not (tmp_path / "run.int6.xz").exists()


def test_a_gradient_beyond_the_bound_ends_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(t, "DIVERGED", 1e-3)
    assert t.main(args(tmp_path, checkpoint_every=0)) == 1
    err = capsys.readouterr().err
    assert re.search(r"step 2: diverged, .* first bad tensor none, last good checkpoint none", err)
