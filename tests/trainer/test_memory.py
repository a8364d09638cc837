"""A micro-batch that does not fit in memory is halved, on all ranks alike, before training begins."""

import re

import pytest
import torch

import train_gpt as t
from tests.helpers import english_args, stop_one_line
from tests.rank_cases import run_ranks
from tests.trainer.fault_cases import STEPS, args, has_line, stop_after

WHOLE = 256  # tokens of a micro-batch of english_args: 8 sequences of 32


def with_memory_for(tokens, monkeypatch):
    """Let a pass forwards and backwards fail, as on a GPU, if it has more than so many tokens."""
    loss = t.GPT.loss

    def limited(self, x, y):
        if torch.is_grad_enabled() and x.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return loss(self, x, y)

    monkeypatch.setattr(t.GPT, "loss", limited)


def lines_of(folder):
    """Return the lines of a run that speak of micro-batches."""
    return re.findall(r"^no memory for .*$", (folder / "run.txt").read_text(), re.M)


def scores_of(folder):
    """Return the bpb of the artifact's scores."""
    found = re.findall(r"^final_int6_\w+_exact .*val_bpb:([\d.]+)", (folder / "run.txt").read_text(), re.M)
    return [float(bpb) for bpb in found]


def losses_of(folder):
    """Return the training losses of a run's steps."""
    found = re.findall(r"^step:\d+/\d+ train_loss:([\d.]+)", (folder / "run.txt").read_text(), re.M)
    return [float(loss) for loss in found]


def test_it_is_halved_until_it_fits_and_trains_the_same(tmp_path, monkeypatch):
    assert t.main(args(tmp_path / "whole")) == 0
    with_memory_for(WHOLE // 4, monkeypatch)
    assert t.main(args(tmp_path / "quarter")) == 0

    assert lines_of(tmp_path / "whole") == []
    assert lines_of(tmp_path / "quarter") == [
        f"no memory for micro_batch_tokens:{WHOLE}; going on with {WHOLE // 2}",
        f"no memory for micro_batch_tokens:{WHOLE // 2}; going on with {WHOLE // 4}",
    ]
    # Measured: 0.
    assert losses_of(tmp_path / "quarter") == pytest.approx(losses_of(tmp_path / "whole"), abs=2e-4)


def test_a_run_that_was_halved_resumes_bit_equal(tmp_path, monkeypatch):
    with_memory_for(WHOLE // 2, monkeypatch)
    assert t.main(args(tmp_path / "whole")) == 0
    stop_after(tmp_path / "cut", monkeypatch, 5)
    assert t.main(args(tmp_path / "cut", resume="auto")) == 0
    assert has_line(tmp_path / "cut", "resumed step:5 from ")
    state = t.read_checkpoint(str(tmp_path / "whole" / f"run.step{STEPS}.0of1.ckpt"))[1]
    again = t.read_checkpoint(str(tmp_path / "cut" / f"run.step{STEPS}.0of1.ckpt"))[1]
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_a_run_keeps_its_config(tmp_path, monkeypatch):
    """Neither smaller micro-batches nor the time held back for calibration is a change of a knob."""
    configs = []
    log_step = t.log_step

    def noted(run, *rest):
        configs.append(run.h)
        return log_step(run, *rest)

    monkeypatch.setattr(t, "log_step", noted)
    with_memory_for(WHOLE // 2, monkeypatch)
    argv = args(tmp_path, max_wallclock_seconds=60)
    assert t.main(argv) == 0
    assert lines_of(tmp_path) and has_line(tmp_path, "held_back:")
    assert configs and all(h == t.load_config(argv, {}) for h in configs)


def rank_with_little_memory(rank, argv):
    """Train on this rank; the second one has memory for half a micro-batch."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            with_memory_for(WHOLE // 2, patch)
        return t.main(argv)


def test_all_ranks_halve_if_one_must(tmp_path):
    argv = english_args(out_dir=tmp_path, iterations=3, max_wallclock_seconds=0)
    assert run_ranks(rank_with_little_memory, 2, argv) == [0, 0]
    assert lines_of(tmp_path) == [f"no memory for micro_batch_tokens:{WHOLE}; going on with {WHOLE // 2}"]


def test_a_sequence_that_does_not_fit_is_one_line(tmp_path, monkeypatch, capsys):
    with_memory_for(16, monkeypatch)
    err = stop_one_line(args(tmp_path), capsys, wanted=1)
    assert "no memory to train on one sequence of train_seq_len=32 tokens; lower train_seq_len" in err


def test_calibration_must_fit_beside_a_pass(tmp_path, monkeypatch):
    measure = t.measure_for_rounding
    tried = []

    def limited(run, loader):
        tried.append(loader.shape.sequences)
        if loader.shape.sequences > 2:
            raise torch.OutOfMemoryError(OF_THE_LIMIT)
        return measure(run, loader)

    monkeypatch.setattr(t, "measure_for_rounding", limited)
    assert t.main(args(tmp_path, gptq_batches=1)) == 0
    assert len(lines_of(tmp_path)) == 2
    assert tried == [8, 4, 2, 2, 2]  # the last two: the rehearsal of calibration, and calibration


def test_a_score_that_does_not_fit_is_computed_in_parts(tmp_path, monkeypatch):
    nats = t.GPT.nats
    batches = []

    def limited(self, x, y, last, **changes):
        if not torch.is_grad_enabled():
            batches.append(len(x))
            if len(x) > 4:
                raise torch.OutOfMemoryError(OF_THE_LIMIT)
        return nats(self, x, y, last, **changes)

    assert t.main(args(tmp_path / "whole", eval_stride=8)) == 0
    monkeypatch.setattr(t.GPT, "nats", limited)
    assert t.main(args(tmp_path / "parts", eval_stride=8)) == 0
    assert batches[:3] == [16, 8, 4] and set(batches[3:]) == {4}
    assert lines_of(tmp_path / "parts") == ["no memory for eval_batch_tokens:512; scoring 128 at once"]
    # Measured: 0.
    assert scores_of(tmp_path / "parts") == pytest.approx(scores_of(tmp_path / "whole"), abs=2e-6)


def test_a_sequence_that_cannot_be_scored_is_one_line(tmp_path, monkeypatch, capsys):
    nats = t.GPT.nats

    def limited(self, x, y, last):
        if not torch.is_grad_enabled():
            raise torch.OutOfMemoryError(OF_THE_LIMIT)
        return nats(self, x, y, last)

    monkeypatch.setattr(t.GPT, "nats", limited)
    err = stop_one_line(args(tmp_path), capsys, wanted=1)
    assert "out of memory" in err and "eval_batch_tokens" in err


def test_parts_keep_the_order_and_the_changes_of_each_sequence():
    """A pass for gradients stays whole."""
    seen = []

    def nats(x, y, last, factors):
        seen.append(len(x))
        return (x + y)[:, -last:] * factors

    scoring = t.ScoringPass(nats)
    scoring.most = 2
    x = torch.arange(20).view(5, 4)
    factors = torch.arange(5)[:, None]
    wanted = (2 * x)[:, -3:] * factors
    with torch.no_grad():
        assert scoring(x, x, 3, factors=factors).equal(wanted)
    assert scoring(x, x, 3, factors=factors).equal(wanted)
    assert seen == [2, 2, 1, 5]


def test_another_error_is_not_taken_for_a_lack_of_memory(tmp_path, monkeypatch):
    def failing(self, x, y):
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr(t.GPT, "loss", failing)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        t.main(args(tmp_path))


# ---------------------------------------------------------------- a limit on the memory


GIB = 1 << 30
OF_THE_LIMIT = (  # as PyTorch says it
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB of which 66.04 "
    "GiB is free. 13.13 GiB allowed; Of the allocated memory 12.40 GiB is allocated by PyTorch."
)


def card_of(gib, monkeypatch):
    """Let torch.cuda speak of a GPU with so much memory. Returns the list of the fractions that are set."""
    fractions = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gib * GIB // 2, gib * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T")
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda part, device: fractions.append(part)
    )
    return fractions


def test_a_limit_is_a_share_of_the_card(monkeypatch):
    fractions = card_of(80, monkeypatch)
    t.limit_memory(t.load_config([], {}), "cuda:0")
    assert fractions == []
    for gib in ("20", "80", "0.5"):
        t.limit_memory(t.load_config([f"memory_limit_gib={gib}"], {}), "cuda:0")
    assert fractions == [0.25, 1.0, 0.5 / 80]


def test_a_limit_above_the_card_is_refused(monkeypatch):
    fractions = card_of(80, monkeypatch)
    said = "memory_limit_gib: 81 is more than the 80.0 GiB of NVIDIA T; lower it, or leave it out"
    with pytest.raises(t.InputError, match=said):
        t.limit_memory(t.load_config(["memory_limit_gib=81"], {}), "cuda:0")
    assert fractions == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_limit_needs_a_gpu(tmp_path, capsys):
    """Whoever sets one counts on it: a CPU's memory is not limited, so the run ends before it begins."""
    err = stop_one_line(args(tmp_path, memory_limit_gib=4), capsys)
    assert "memory_limit_gib: it limits a GPU's memory, and there is none; leave it out" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gib,halvings", [(0, 0), (64, 0), (20, 2)])
def test_a_limit_makes_micro_batches_smaller(gib, halvings, tmp_path, monkeypatch):
    """Let an allocator need the whole card for a pass: under the limit, half a pass does not fit either."""
    fractions = card_of(80, monkeypatch)
    loss = t.GPT.loss
    init_machine = t.init_machine

    def allocating(self, x, y):
        allowed = fractions[-1] if fractions else 1.0
        if torch.is_grad_enabled() and x.numel() / WHOLE > 1.25 * allowed:
            raise torch.OutOfMemoryError(OF_THE_LIMIT)
        return loss(self, x, y)

    def on_a_gpu(h, env, **options):
        t.limit_memory(h, "cuda:0")
        return init_machine(t.replace(h, memory_limit_gib=0.0), env, **options)

    monkeypatch.setattr(t.GPT, "loss", allocating)
    monkeypatch.setattr(t, "init_machine", on_a_gpu)
    assert t.main(args(tmp_path, iterations=1, memory_limit_gib=gib)) == 0
    assert len(lines_of(tmp_path)) == halvings
    assert has_line(tmp_path, f"  memory_limit_gib: {float(gib)}")
    assert has_line(tmp_path, "memory limit: ") == (gib > 0)
