"""Copies of the trainer with another layout of the optimizer: each does what it says, and trains the same."""

import os
from typing import NamedTuple

import pytest
import torch

import train_gpt as t
from helpers import as_arguments, noisy_model, shard_folder, tiny
from lab import layouts
from rank_cases import run_ranks
from schedule_cases import watch_collectives
from script import TRAINER, BadInput, load_script

STEPS = 4
CLOSE = 3e-5  # of a parameter's norm, as in test_schedule.py


class Result(NamedTuple):
    """What a script trained on one rank, and what its last step did."""

    params: dict[str, torch.Tensor]
    collectives: list[str]  # in the order of their launches
    batches: list[int]  # matrices that were orthogonalized at once
    weights_in_bank: bool


def train_script(trainer, m, arguments):
    """Train STEPS steps of a noisy model on this rank."""
    h = trainer.load_config(arguments, {})
    model = noisy_model(h, seed=3)
    optimizer = trainer.Optimizer(model, h, m)
    loader = trainer.TokenLoader(h, m)
    backward, _ = trainer.capture_pass(model.loss, optimizer)
    for _ in range(STEPS - 1):
        trainer.train_step(backward, optimizer, loader.next(), trainer.hyper_at(h, 0, 0.0))
    batches = []
    real = trainer.orthogonalize

    def orthogonalize(G, method):
        batches.append(len(G))
        return real(G, method)

    with pytest.MonkeyPatch.context() as patch, watch_collectives(trainer) as calls:
        patch.setattr(trainer, "orthogonalize", orthogonalize)
        trainer.train_step(backward, optimizer, loader.next(), trainer.hyper_at(h, 0, 0.0))
    collectives = [call.name for call in calls]
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    bank = optimizer.bank["qo"].untyped_storage()
    return Result(params, collectives, batches, model.qo_bank.untyped_storage().data_ptr() == bank.data_ptr())


def train_all(rank, scripts, argument_lists):
    """Train every script with every list of arguments; {name: [Result]}."""
    m = t.init_machine(t.load_config(argument_lists[0], {}), os.environ)
    trainers = {name: load_script(path, f"layout_{name}", (), "train") for name, path in scripts.items()}
    return {
        name: [train_script(trainer, m, arguments) for arguments in argument_lists]
        for name, trainer in trainers.items()
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return, for rank 0 of two, {name: (Result without clipping, Result with clipping)}."""
    folder = tmp_path_factory.mktemp("layouts")
    assert layouts.main(["--out", str(folder)]) == 0
    shard_folder(folder / "data", tiny(), [60, 40], seed=5)
    scripts = {"script": TRAINER} | {layout.name: folder / f"{layout.name}.py" for layout in layouts.LAYOUTS}
    knobs = dict(data_path=str(folder / "data"), num_layers=3)
    argument_lists = [as_arguments(vars(tiny(**knobs, grad_clip=clip))) for clip in (0.0, 0.01)]
    return run_ranks(train_all, 2, scripts, argument_lists, timeout=120)[0]


def distance(a, b):
    """Return the largest distance of a parameter of a from that of b, in norms of b."""
    return max(((a.params[name] - p).norm() / p.norm()).item() for name, p in b.params.items())


@pytest.mark.parametrize("layout", layouts.LAYOUTS, ids=lambda layout: layout.name)
def test_a_copy_trains_the_same_weights(results, layout):
    """Without clipping all do; with it, all but the one that clips by another norm."""
    free, clipped = (distance(*pair) for pair in zip(results[layout.name], results["script"]))
    assert free <= CLOSE
    assert (clipped <= CLOSE) == (layout is not layouts.PUBLISHED_ORDER)


def test_each_copy_does_what_it_says(results):
    of_script, *copies = (results[name][0] for name in ["script", *(x.name for x in layouts.LAYOUTS)])
    products, tensors, whole, published = copies

    assert max(of_script.batches) > 1
    assert set(products.batches) == {1} and sum(products.batches) == sum(of_script.batches)
    assert of_script.weights_in_bank and not tensors.weights_in_bank
    assert "reduce_scatter" in of_script.collectives and "reduce_scatter" not in whole.collectives
    averaged_whole = ["all_reduce" if x == "reduce_scatter" else x for x in of_script.collectives]
    assert whole.collectives == averaged_whole
    # The norm of all ranks' gradients is no longer needed.
    assert len(published.collectives) == len(of_script.collectives) - 1


def test_a_script_that_lacks_a_place_is_refused(tmp_path, capsys):
    script = tmp_path / "other.py"
    script.write_text("pass\n")
    out = tmp_path / "out"
    assert layouts.main(["--out", str(out), "--script", str(script)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"record: {script}: separate_products: the script has") and said.count("\n") == 1
    assert layouts.main(["--out", str(out), "--script", str(tmp_path / "gone.py")]) == 2
    assert "gone.py: cannot read: No such file or directory; --script PATH" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(BadInput, match="2 times"):
        layouts.with_layout(TRAINER.read_text() * 2, layouts.WHOLE_BANKS)


def test_all_copies_are_written_or_none(tmp_path, capsys):
    (tmp_path / "published_order.py").mkdir()
    assert layouts.main(["--out", str(tmp_path)]) == 2
    assert "published_order.py: is a folder; name a file in it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["published_order.py"]
