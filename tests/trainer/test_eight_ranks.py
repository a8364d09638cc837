"""Whole runs on the attempt's eight ranks, over gloo: they train, pack and score as one rank does.

Two layers have at most four matrices in a bank, so that two ranks own none at all. 100 targets are four
windows.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import train_gpt as t
from tests.helpers import english_args, english_dataset, temporary_folder
from tests.rank_cases import run_ranks

STEPS = 10
KNOBS = dict(
    iterations=STEPS,
    warmup_steps=1,
    train_batch_tokens=1024,
    micro_batch_tokens=128,
    val_tokens=100,
    report_split="other",
    max_wallclock_seconds=600,
    checkpoint_every=1e-6,
)
LOSS = re.compile(r"^step:\d+/\d+ train_loss:(\S+) ", re.M)
SCORE = re.compile(
    r"^(?:final_int6_\w+_exact|report split:other metric:\w+) val_loss:(\S+) val_bpb:(\S+)$", re.M
)


pytestmark = pytest.mark.usefixtures("clean_environment")


class Ended(NamedTuple):
    """How a rank's command ended: its status and, if it trained, digests of live and averaged weights."""

    status: int
    digests: list[str]


def digest(tensors):
    """Hash the values of tensors."""
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def main_rank(rank, argv, compiles_late=None):
    """Run a command on this rank and return how it Ended.

    compiles_late: the rank that is to report two graphs as compiled on the clock.
    """
    train = t.train
    digests = []

    def watched(run):
        trained = train(run)
        digests.append(digest(trained.ema.params))
        digests.append(digest(trained.ema.average))
        if rank == compiles_late:
            trained = trained._replace(late_graphs=trained.late_graphs + 2)
        return trained

    t.train = watched
    return Ended(t.main(argv), digests)


def argv(folder, **knobs):
    """Return the arguments of a run in a folder."""
    return english_args(**(KNOBS | dict(out_dir=folder) | knobs))


def text(folder, name="run.txt"):
    """Return a log."""
    return (folder / name).read_text(encoding="utf-8")


def losses_of(log):
    """Return the training losses of a log."""
    return [float(loss) for loss in LOSS.findall(log)]


def scores_of(log):
    """Return the scores of an artifact in a log: val_loss and val_bpb in turn."""
    return [float(number) for pair in SCORE.findall(log) for number in pair]


class EightRanks(NamedTuple):
    """A run on eight ranks."""

    folder: Path
    ranks: list[Ended]


@pytest.fixture(scope="module")
def eight():
    folder = temporary_folder() / "eight"
    return EightRanks(folder, run_ranks(main_rank, 8, argv(folder)))


def differing(one, other):
    """Return the names of the tensors in which two artifacts differ.

    A hundredth of an int6 tensor may differ: ranks add up the inputs of its matrices in another order, which
    may round a code the other way.
    """
    one = t.unpack_artifact(one)
    other = t.unpack_artifact(other)
    assert list(one) == list(other)
    allowed = {name: 0.01 if t.STORED_AS[name] == "int6" else 0.0 for name in one}
    return [name for name in one if (one[name] != other[name]).float().mean() > allowed[name]]


def test_eight_ranks_train_pack_and_score_like_one(eight, tmp_path):
    folder, ranks = eight
    assert [rank.status for rank in ranks] == [0] * 8
    live, average = ranks[0].digests
    assert all(rank.digests == [live, average] for rank in ranks) and live != average  # bit-equal

    log = text(folder)
    assert "machine world_size:8 " in log and not re.search(r"^rank \d", log, re.M)
    for label, count in (("step:", STEPS + 1), ("final_score ", 1)):
        assert len(re.findall(rf"^{label}", log, re.M)) == count  # rank 0 alone writes

    assert t.main(argv(tmp_path, checkpoint_every=0)) == 0
    log_of_one = text(tmp_path)
    losses = losses_of(log)
    assert len(losses) == STEPS and losses == pytest.approx(losses_of(log_of_one), abs=2e-4)  # measured: 0
    assert losses[-1] < losses[0] - 0.5
    scores = scores_of(log)
    assert len(scores) == 6
    # A code may round the other way; measured: 1.9e-5.
    assert scores == pytest.approx(scores_of(log_of_one), abs=2e-4)

    artifact = folder / "run.int6.xz"
    eval_argv = [
        "eval",
        str(artifact),
        f"data_path={english_dataset().path}",
        f"out_dir={tmp_path}",
        "eval_batch_tokens=512",
        "val_tokens=100",
        "report_split=other",
    ]
    assert t.main([*eval_argv, "run_id=by1"]) == 0
    # Three ranks could not share the batch of a training step.
    assert run_ranks(main_rank, 3, [*eval_argv, "run_id=by3"]) == [Ended(0, [])] * 3
    for name in ("by1.txt", "by3.txt"):
        # Of the same file; measured: 0.
        assert scores_of(text(tmp_path, name)) == pytest.approx(scores, abs=2e-8)

    files = sorted(name for name in os.listdir(folder) if f"step{STEPS}." in name)
    assert files == [f"run.step{STEPS}.{rank}of8.ckpt" for rank in range(8)]
    (resumed,) = run_ranks(main_rank, 1, argv(tmp_path, run_id="on_one", resume=folder / files[3]))
    assert resumed == Ended(0, [live, average])  # no step was left to take
    assert not differing(artifact.read_bytes(), (tmp_path / "on_one.int6.xz").read_bytes())


def test_a_log_that_exists_is_refused_by_all_ranks_and_not_changed(eight):
    """If only rank 0 refused it, the others would append their ends to the log of another run."""
    before = text(eight.folder)
    assert run_ranks(main_rank, 8, argv(eight.folder)) == [Ended(2, [])] * 8
    assert text(eight.folder) == before


def test_a_late_compilation_of_any_rank_is_reported(tmp_path):
    ranks = run_ranks(main_rank, 8, argv(tmp_path, iterations=1, checkpoint_every=0), 5)
    assert [rank.status for rank in ranks] == [1] * 8
    assert "\nlate compilation: 2 graphs were compiled on the clock; " in text(tmp_path)
