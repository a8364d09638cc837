"""The attempt's eight ranks, whole runs over gloo: what they train, pack and score is what one rank does.

Two layers have at most four matrices in a bank: two ranks own none at all. 100 targets are four windows.
"""

import dataclasses
import hashlib
import os
import re

import pytest

import train_gpt as t
from helpers import english_args, english_dataset, run_ranks, temporary_folder

STEPS = 10
KNOBS = dict(iterations=STEPS, warmup_steps=1, train_batch_tokens=1024, micro_batch_tokens=128, val_tokens=100, report_split="other",
             max_wallclock_seconds=600, checkpoint_every=1e-6)  # fmt: skip
LOSSES = re.compile(r"^step:\d+/\d+ train_loss:(\S+) ", re.M)
SCORES = re.compile(
    r"^(?:final_int6_\w+_exact|report split:other metric:\w+) val_loss:(\S+) val_bpb:(\S+)$", re.M
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for f in dataclasses.fields(t.Config):
        monkeypatch.delenv(f.name.upper(), raising=False)


def digest(tensors):
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in tensors)).hexdigest()


def main_rank(rank, argv, compiles_late=-1):
    """The status of a command, and of its training the weights and the average. One rank may compile on the clock."""
    train, seen = t.train, []

    def watched(run):
        trained = train(run)
        seen.extend(map(digest, (trained.ema.params, trained.ema.average)))
        if rank == compiles_late:
            trained = trained._replace(late_graphs=trained.late_graphs + 2)
        return trained

    t.train = watched
    return t.main(argv), seen


def argv(folder, **knobs):
    return english_args(**(KNOBS | dict(out_dir=folder) | knobs))


def text(folder, name="run.txt"):
    return (folder / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def eight():
    """The folder of a run on eight ranks, and what its ranks gave."""
    folder = temporary_folder() / "eight"
    return folder, run_ranks(main_rank, 8, argv(folder))


def differing(one, other):
    """The tensors that two artifacts do not share; of an int6 tensor a hundredth may differ: the order in which ranks
    add up the inputs of its matrices may round a code the other way."""
    one, other = map(t.unpack_artifact, (one, other))
    assert list(one) == list(other)
    return [k for k in one if (one[k] != other[k]).float().mean() > 0.01 * (t.KINDS[k] == "int6")]


def test_eight_ranks_train_pack_and_score_like_one(eight, tmp_path):
    folder, ranks = eight
    assert [status for status, _ in ranks] == [0] * 8
    (live, average), *others = [seen for _, seen in ranks]
    assert all(other == [live, average] for other in others) and live != average  # bit-equal
    log, blob = text(folder), (folder / "run.int6.xz").read_bytes()
    assert "machine world_size:8 " in log and not re.search(r"^rank \d", log, re.M)
    assert [len(re.findall(rf"^{x}", log, re.M)) for x in ("step:", "final_score ")] == [
        STEPS + 1,
        1,
    ]  # rank 0 alone writes
    assert t.main(argv(tmp_path, checkpoint_every=0)) == 0
    one = text(tmp_path)
    losses = [[float(x) for x in LOSSES.findall(each)] for each in (log, one)]
    assert len(losses[0]) == STEPS and losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert losses[0][-1] < losses[0][0] - 0.5
    mine, theirs = ([float(x) for pair in SCORES.findall(each) for x in pair] for each in (log, one))
    assert len(mine) == 6 and mine == pytest.approx(
        theirs, abs=2e-3
    )  # of two trainings, a code may round the other way

    scoring = ["eval", str(folder / "run.int6.xz"), f"data_path={english_dataset().path}", f"out_dir={tmp_path}",
               "eval_batch_tokens=512", "val_tokens=100", "report_split=other"]  # fmt: skip
    assert t.main([*scoring, "run_id=by1"]) == 0
    assert (
        run_ranks(main_rank, 3, [*scoring, "run_id=by3"]) == [(0, [])] * 3
    )  # three could not share a step's batch
    for name in ("by1.txt", "by3.txt"):
        again = [float(x) for pair in SCORES.findall(text(tmp_path, name)) for x in pair]
        assert again == pytest.approx(mine, abs=2e-8)  # of one file

    shares = sorted(x for x in os.listdir(folder) if f"step{STEPS}." in x)
    assert shares == [f"run.step{STEPS}.{r}of8.ckpt" for r in range(8)]
    (again,) = run_ranks(main_rank, 1, argv(tmp_path, run_id="on_one", resume=folder / shares[3]))
    assert again == (0, [live, average])  # no step was left to take
    assert not differing(blob, (tmp_path / "on_one.int6.xz").read_bytes())


def test_a_log_that_exists_is_refused_by_all_and_stays_as_it_is(eight):
    """The other ranks, left alone, would write how they end into the record of another run."""
    folder, _ = eight
    before = text(folder)
    assert run_ranks(main_rank, 8, argv(folder)) == [(2, [])] * 8
    assert text(folder) == before


def test_a_late_compilation_of_any_rank_is_told(tmp_path):
    ranks = run_ranks(main_rank, 8, argv(tmp_path, iterations=1, checkpoint_every=0), 5)
    assert [status for status, _ in ranks] == [1] * 8
    assert "\nlate compilation: 2 graphs were compiled on the clock; " in text(tmp_path)
