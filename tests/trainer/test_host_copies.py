"""Copies from a GPU to the host: their values, their stream, their memory."""

import contextlib
import dataclasses

import pytest
import torch

import train_gpt as t
from tests.helpers import machine

pytestmark = pytest.mark.usefixtures("clean_environment")


def test_host_copies_keep_the_values_of_the_call():
    x = torch.zeros(3)
    fetched = machine().fetch(x)
    x += 1
    assert fetched()[0].tolist() == [0, 0, 0]


class SideStream:
    """A stream that is its own event and notes its calls in `events`. Its query number `passes` is true."""

    def __init__(self, events, passes):
        self.events = events
        self.passes = passes

    def wait_stream(self, other):
        self.events.append(f"waits for {other}")

    def record_event(self):
        self.events.append("event")
        return self

    def query(self):
        self.passes -= 1
        return self.passes <= 0


@pytest.mark.parametrize("passes", [3, 1 << 60], ids=["soon", "never"])
def test_a_gpus_copies_run_on_a_side_stream_and_the_host_polls(monkeypatch, passes):
    events = []
    side = SideStream(events, passes)

    def enter(stream):
        events.append(f"on side {stream is side}")
        return contextlib.nullcontext()

    def hold(tensor, stream):
        events.append(f"held for side {stream is side}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "main")
    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(torch.Tensor, "record_stream", hold)
    monkeypatch.setattr(t, "PATIENCE_S", 0.3)
    fetched = dataclasses.replace(machine(), device=torch.device("cuda"), side_stream=side).fetch(
        torch.ones(2), torch.zeros(1)
    )
    assert events == ["waits for main", "on side True", "event", "held for side True", "held for side True"]
    if passes == 3:
        assert [x.tolist() for x in fetched()] == [[1, 1], [0]] and side.passes == 0
    else:
        with pytest.raises(t.Fault, match="the device has been busy for 0.3 s"):
            fetched()


@pytest.mark.gpu
def test_on_a_gpu_host_copies_are_page_locked_and_cost_no_allocation():
    """They also keep the values of the call, whatever is queued after it."""
    m = dataclasses.replace(machine(), device=torch.device("cuda"), side_stream=torch.cuda.Stream())
    big = torch.zeros(1 << 26, device="cuda")
    numbers = torch.zeros(2, dtype=torch.float64, device="cuda")

    def step(i, earlier):
        numbers.fill_(i)
        fetched = m.fetch(numbers)
        for _ in range(20):  # work after the copy, which does not wait for it
            big.add_(1)
        numbers.fill_(-1)
        assert earlier is None or earlier()[0].tolist() == [i - 1, i - 1]
        return fetched

    fetched = None
    for i in range(50):
        fetched = step(i, fetched)
    blocks = torch.cuda.host_memory_stats()["num_host_alloc"]
    for i in range(50, 200):
        fetched = step(i, fetched)
    assert fetched()[0].is_pinned()
    assert torch.cuda.host_memory_stats()["num_host_alloc"] <= blocks + 1
