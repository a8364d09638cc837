"""Copies of the trainer with another layout of the optimizer: each does what it says, and trains the same."""

import dataclasses
import os
import re
from typing import NamedTuple

import pytest
import torch

import train_gpt as t
from lab import layouts
from lab.layout.one_stream import OneStream
from lab.shared.collectives import Recorder
from script import ROOT, TRAINER, BadInput, load_script
from tests.helpers import as_arguments, noisy_model, shard_folder, tiny
from tests.rank_cases import group_of_one, run_ranks

STEPS = 4
CLOSE = 3e-5  # of a parameter's norm, as in test_schedule.py; measured: 0


class Result(NamedTuple):
    """What a script trained on one rank, and what its last step did."""

    params: dict[str, torch.Tensor]
    collectives: list[str]  # their kinds in the order of their launches
    batches: list[int]  # matrices that were orthogonalized at once
    weights_in_bank: bool


def train_script(trainer, m, recorder, arguments):
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

    with pytest.MonkeyPatch.context() as patch, recorder.recording() as calls:
        patch.setattr(trainer, "orthogonalize", orthogonalize)
        trainer.train_step(backward, optimizer, loader.next(), trainer.hyper_at(h, 0, 0.0))
    collectives = [call.kind for call in calls]
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    bank = optimizer.bank["qo"].untyped_storage()
    return Result(params, collectives, batches, model.qo_bank.untyped_storage().data_ptr() == bank.data_ptr())


def train_all(rank, scripts, argument_lists):
    """Train every script with every list of arguments; {name: [Result]}."""
    m = t.init_machine(t.load_config(argument_lists[0], {}), os.environ)
    recorder = Recorder()
    results = {}
    with recorder.installed():
        for name, path in scripts.items():
            trainer = load_script(path, f"layout_{name}", (), "train")
            results[name] = [train_script(trainer, m, recorder, arguments) for arguments in argument_lists]
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return, for rank 0 of two, {name: (Result without clipping, Result with clipping)}."""
    folder = tmp_path_factory.mktemp("layouts")
    assert layouts.main(["--out", str(folder)]) == 0
    shard_folder(folder / "data", tiny(), [60, 40], seed=5)
    scripts = {"script": TRAINER} | {name: folder / f"{name}.py" for name in layouts.LAYOUTS}
    knobs = dict(data_path=str(folder / "data"), num_layers=3)
    argument_lists = [as_arguments(vars(tiny(**knobs, grad_clip=clip))) for clip in (0.0, 0.01)]
    return run_ranks(train_all, 2, scripts, argument_lists, timeout=120)[0]


def distance(a, b):
    """Return the largest distance of a parameter of a from that of b, in norms of b."""
    return max(((a.params[name] - p).norm() / p.norm()).item() for name, p in b.params.items())


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_a_copy_trains_the_same_weights(results, layout):
    """Without clipping all do; with it, all but the one that clips by another norm."""
    free, clipped = (distance(*pair) for pair in zip(results[layout], results["script"]))
    assert free <= CLOSE
    assert (clipped <= CLOSE) == (layout != "published_order")


def test_each_copy_does_what_it_says(results):
    of_script = results["script"][0]
    products, tensors, whole, published, one_stream = (results[name][0] for name in layouts.LAYOUTS)

    assert max(of_script.batches) > 1
    assert set(products.batches) == {1} and sum(products.batches) == sum(of_script.batches)
    assert of_script.weights_in_bank and not tensors.weights_in_bank
    assert "reduce-scatter" in of_script.collectives and "reduce-scatter" not in whole.collectives
    averaged_whole = ["all-reduce" if x == "reduce-scatter" else x for x in of_script.collectives]
    assert whole.collectives == averaged_whole
    # The norm of all ranks' gradients is no longer needed.
    assert len(published.collectives) == len(of_script.collectives) - 1
    assert one_stream.collectives == of_script.collectives


def test_one_stream_neither_captures_nor_asks_for_lanes(monkeypatch):
    """A Machine with graphs and streams does both."""
    captured = []
    asked = []
    called = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: asked.append(1) or "current")
    with group_of_one() as plain:
        m = dataclasses.replace(plain, graph_capture=captured.append, lane_streams=("current",))
        one_stream = OneStream(**vars(m))
        m.capture(lambda: called.append(1))
        with m.lanes():
            pass
    assert len(captured) == 1 and len(called) == 3  # to warm up
    assert len(asked) == 4  # also for the lane of each of these calls

    launch, failure = one_stream.capture(called.clear)
    with one_stream.lanes() as lane, lane():
        pass
    assert launch == called.clear and failure is None
    assert len(captured) == 1 and len(called) == 3 and len(asked) == 4


def test_documents_name_every_layout_and_edit_no_source():
    pages = {path: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
    section = (
        pages[ROOT / "docs/ranks.md"].partition("### Other layouts of the optimizer")[2].partition("```")[0]
    )
    assert tuple(re.findall(r"^\| `(\w+)` \|", section, re.M)) == layouts.LAYOUTS
    assert not [path for path, text in pages.items() if re.search(r"^\s*sed ", text, re.M)]


def test_a_script_that_lacks_a_place_is_refused(tmp_path, capsys):
    script = tmp_path / "other.py"
    script.write_text("pass\n")
    out = tmp_path / "out"
    assert layouts.main(["--out", str(out), "--script", str(script)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"record: {script}: this script has no Optimizer, OwnedMatrices, nn, Optimizer.make_"
    )
    assert said.count("\n") == 1
    assert layouts.main(["--out", str(out), "--script", str(tmp_path / "gone.py")]) == 2
    assert (
        "gone.py: cannot read the script (No such file or directory); --script PATH"
        in capsys.readouterr().err
    )
    assert not out.exists()
    with pytest.raises(BadInput, match="does not end with `if __name__"):
        layouts.with_layout("pass\n", layouts.read_layout("whole_banks"))


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_a_copy_is_the_trainer_with_a_module_before_its_last_lines(layout):
    """Nothing of the trainer is edited; what the module defines stands there as it is."""
    source = TRAINER.read_text()
    copy = layouts.with_layout(source, layouts.read_layout(layout))
    start = source.rindex("if __name__")
    assert copy.startswith(source[:start]) and copy.endswith("\n" + source[start:])
    module = (layouts.FOLDER / f"{layout}.py").read_text()
    classes = module[module.index("from train_gpt import") :].partition("\n")[2].strip("\n")
    assert classes in copy and classes.splitlines()[-1].startswith("REPLACES = {")


def test_all_copies_are_written_or_none(tmp_path, capsys):
    (tmp_path / "published_order.py").mkdir()
    assert layouts.main(["--out", str(tmp_path)]) == 2
    assert "published_order.py: is a folder; name a file in it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["published_order.py"]
