"""What only GPUs can show: NCCL, recorded collectives, atomics. Two GPUs of one host; for one rank one is enough."""

import re

import pytest
import torch

from kill_runs import ended, final_state, log_lines, start

pytestmark = pytest.mark.gpu
two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="not two GPUs here")
SECONDS = 300  # for a cold compilation


def trained(folder, world=1, **knobs):
    """(final state, {step: val_loss}, log lines) of a run that ended well. At each validation ranks are compared."""
    knobs = dict(checkpoint_every=10**6, max_wallclock_seconds=0, resume="") | knobs
    assert ended(start(folder, world, **knobs), SECONDS) == [0] * world, (folder / "console.0").read_text()[-2000:]
    lines = log_lines(folder)
    losses = {int(m[1]): float(m[2]) for x in lines if (m := re.match(r"step:(\d+)/\d+ val_loss:([\d.]+)", x))}
    return final_state(folder, world, knobs["iterations"]), losses, lines


def distance(a, b):
    """Largest relative distance of two states' parameters."""
    names = [k for k in a if "." not in k and not k.startswith("flat_")]
    return max(((a[k] - b[k]).norm() / b[k].norm().clamp_min(1e-6)).item() for k in names)


@two
@pytest.mark.parametrize("knobs", [{}, dict(wire_dtype="bfloat16"), dict(step_rule="normuon_hyperball", ortho="mud")], ids=str)
def test_ranks_over_nccl_stay_bit_equal_for_200_steps_and_train_what_one_gpu_does(tmp_path, knobs):
    runs = [trained(tmp_path / str(world), world, iterations=200, val_loss_every=50, **knobs) for world in (1, 2)]
    print("\n".join(f"step {step}: val_loss one GPU {loss}, two {runs[1][1].get(step)}" for step, loss in runs[0][1].items()))
    print("largest relative distance of parameters after 200 steps:", distance(runs[1][0], runs[0][0]))
    assert list(runs[0][1]) == list(runs[1][1]) == [0, 50, 100, 150, 200]
    for step, loss in runs[0][1].items():
        assert runs[1][1][step] == pytest.approx(loss, abs=0.03), (step, runs[0][1], runs[1][1])
    assert not any("no graph" in x for _, _, lines in runs for x in lines)  # collectives were recorded


@two
def test_a_few_steps_on_two_gpus_are_those_on_one(tmp_path):
    """bf16 products are the same on both; sums of gradients over ranks are in another order."""
    one, two_ranks = (trained(tmp_path / str(world), world, iterations=4)[0] for world in (1, 2))
    print("largest relative distance of parameters after 4 steps:", distance(two_ranks, one))
    assert distance(two_ranks, one) < 1e-2


def test_deterministic_runs_on_a_gpu_are_bit_equal(tmp_path):
    a, b = (trained(tmp_path / name, iterations=100, deterministic=True)[0] for name in "ab")
    assert a and a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())
