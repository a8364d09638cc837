"""The lab's clocks: CUDA graphs, fresh inputs, ticks, the parts of a step."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from functools import partial

import pytest
import torch

from lab.shared import timing, trainer
from lab.step import parts, sustained
from tests.helpers import english_dataset, tiny
from tests.lab.lab_helpers import a_session, on_gpu
from tests.rank_cases import group_of_one

pytestmark = pytest.mark.usefixtures("quick_bench")


def test_a_graph_holds_every_call(monkeypatch):
    """ms are of one call of the captured graph; nothing is captured before it ran outside."""
    captured = []
    ran = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def elapsed_time(self, end):
            return 12.0

    @contextlib.contextmanager
    def lanes():
        yield contextlib.nullcontext

    monkeypatch.setattr(torch.cuda, "Event", Event)
    s = on_gpu(a_session(), lanes=lanes, sync=lambda: None, rank=0)
    s.m.graph_capture = lambda fn: captured.append(list(ran)) or fn
    calls = [partial(ran.append, number) for number in range(3)]
    assert timing.call_ms(s, "x", calls) == 4.0
    assert captured == [[0, 1, 2] * 2]
    assert ran == [0, 1, 2] * (2 + timing.REPLAYS + 1)

    def failing_capture(fn):
        fn()
        raise ZeroDivisionError

    # Calls that cannot be captured are launched, and the report says so.
    s.m.graph_capture = failing_capture
    assert timing.call_ms(s, "x", [lambda: None] * 6) == 2.0
    assert s.report["skipped"][0]["why"].startswith("ZeroDivisionError")


@pytest.mark.parametrize("error", [None, OSError("driver")], ids=["captured", "failed"])
def test_forward_and_backward_and_the_step_are_timed_as_training_launches_them(monkeypatch, error):
    """The pass is a graph where the machine captures, gone afterwards; if it fails, the report says so."""
    launches = []
    alive = []

    class Launch:
        def __init__(self, fn):
            self.fn = fn

        def __call__(self):
            launches.append(self.fn.__name__)
            self.fn()

    def record(fn):
        if error is not None and "schedule" not in fn.__name__:
            raise error
        launch = Launch(fn)
        alive.append(weakref.ref(launch))
        return launch

    with group_of_one() as m:
        h = tiny(data_path=english_dataset().path, vocab_size=english_dataset().vocab_size)
        s = a_session()._replace(h=h, m=dataclasses.replace(m, graph_capture=record))
        run = trainer.build_trained(s)
        launched = []
        wall_times = parts.wall_times

        def watched(*args):
            times = wall_times(*args)
            launched.append(list(launches))
            launches.clear()
            return times

        monkeypatch.setattr(parts, "wall_times", watched)
        parts.time_step(s, run)
        sustained.measure_sustained(s, run, None, 0.01)

    counts = {
        whole["name"]: (names.count("one_pass"), names.count("schedule"))
        for whole, names in zip(s.report["whole"], launched)
    }
    each, accumulated = (0, 0) if error else (14, 4 * 14)
    assert counts["forward"] == (0, 0)
    assert counts["forward+backward"] == (each, 0)
    assert counts["optimizer"] == (0, 14)
    assert counts["step"] == (accumulated, 14)
    assert [x() is None for x in alive] == ([False] if error else [False, True, True])
    assert (launches.count("one_pass") > 16) == (not error)  # sustained steps, too
    why = [x["why"] for x in s.report["skipped"] if "forward+backward" in x["what"]]
    assert why == (["rank 0: OSError: driver"] if error else [])


def test_inputs_are_fresh_where_they_would_stay_in_the_cache(monkeypatch):
    class Properties:
        L2_cache_size = 100

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: Properties)
    s = on_gpu(a_session())
    sets = timing.fresh_sets(s, lambda: [torch.zeros(49)])
    assert len({one[0].data_ptr() for one in sets}) == timing.FRESH
    assert len(timing.fresh_sets(s, lambda: [torch.zeros(50)])) == 1

    seen = []
    for call in timing.in_turn(s, seen.append, sets):
        call()
    assert seen == sets
    assert len(timing.in_turn(s, seen.append, sets[:1])) == timing.ROUNDS


def test_ticks_of_a_gpu(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = 3.0

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    s = on_gpu(a_session())
    first = timing.tick(s)
    second = timing.tick(s)
    second.at = 10.0
    assert timing.ms_between(first, second) == 7.0
    assert timing.ms_between(1.0, 1.5) == 500
