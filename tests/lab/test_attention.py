"""The attention table: masks by hand, planted packages and faults, clocks, tables, the command's manners."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from lab import bench
from lab.model import attention
from lab.model.attention import AttentionPath, BoundPath, HeadShape, PathRow, PathTimes, Status
from lab.shared import exact, timing
from tests.helpers import TINY, refused_by, tiny
from tests.lab.lab_helpers import a_session

KNOBS = [f"{k}={v}" for k, v in (TINY | dict(micro_batch_tokens=64)).items()]  # 4 rows of 16 tokens
pytestmark = pytest.mark.usefixtures("quick_bench")
NAMES = ["causal", "documents", "window 8", "window 4", "documents, window 8"]


def cases(rows=3, head_shape=None):
    """Return {mask: attention layer} of a tiny model."""
    s = a_session(rows)
    head_shape = head_shape or attention.head_shapes_of(s.h)[0]
    masks = attention.masks_of(rows, s.h.train_seq_len)
    return {mask.name: attention.make_layer(s, head_shape, mask) for mask in masks}


def outcome(c, path):
    """Return the row that the table would have for a path."""
    attention.PATHS["planted"] = path
    try:
        return attention.attempt_path(c, "planted", attention.exact_rows(c), lambda: None)
    finally:
        del attention.PATHS["planted"]


# ---- masks ---------------------------------------------------------------------------------------


def sees(mask, i, j):
    """Return whether token i of the flat batch sees token j, by the definition of the mask."""
    start = max(x for x in mask.bounds if x <= i)
    return start <= j <= i and (not mask.window or i - j < mask.window)


@pytest.mark.parametrize("name", NAMES)
def test_masks_agree_with_their_definition(name):
    c = cases()[name]
    seen = [exact.visible(c.ids[row], c.mask.window) for row in range(3)]
    for row in range(3):
        by_hand = [[sees(c.mask, 16 * row + i, 16 * row + j) for j in range(16)] for i in range(16)]
        assert seen[row].tolist() == by_hand
    assert c.mask.pairs == sum(int(s.sum()) for s in seen)
    assert c.bounds.dtype == torch.int32 and c.bounds.tolist() == c.mask.bounds


def test_masks_of_a_long_row():
    masks = attention.masks_of(48, 2048)
    names = ["causal", "documents", "window 512", "window 256", "documents, window 512"]
    assert [m.name for m in masks] == names
    assert masks[0].pairs == 48 * 2048 * 2049 // 2
    assert masks[3].pairs == 48 * (256 * 257 // 2 + 1792 * 256)
    assert masks[1].bounds == masks[4].bounds
    assert masks[4].pairs < min(masks[1].pairs, masks[2].pairs)
    assert [m.name for m in attention.masks_of(2, 1024)][2:4] == ["window 512", "window 256"]
    assert all(m.pairs == 3 for m in attention.masks_of(3, 1))  # no room for anything


def test_documents():
    bounds = attention.document_bounds(500, 2048)
    assert bounds == attention.document_bounds(500, 2048) != attention.document_bounds(500, 2048, seed=1)
    assert bounds[0] == 0
    assert bounds[-1] == 500 * 2048
    assert all(a < b for a, b in zip(bounds, bounds[1:]))
    assert {*range(0, 500 * 2048, 2048)} <= {*bounds}  # every row begins one
    whole = [b - a for a, b in zip(bounds, bounds[1:]) if b % 2048]
    # exponential: 1 - 1/e of those with room for it are shorter than the mean
    early = [b - a for a, b in zip(bounds, bounds[1:]) if a % 2048 == 0]
    assert len(early) == 500 and 0.55 < sum(n < 1000 for n in early) / 500 < 0.71  # measured: 0.644
    assert min(whole) < 50


def test_head_shapes():
    def h(**knobs):
        return attention.head_shapes_of(tiny(**knobs))

    assert h() == [HeadShape(4, 2, 8), HeadShape(2, 1, 16)]
    assert h(num_heads=2, num_kv_heads=1) == [HeadShape(2, 1, 16), HeadShape(1, 1, 32)]
    assert h(num_heads=6, num_kv_heads=3, model_dim=48) == [HeadShape(6, 3, 8), HeadShape(3, 1, 16)]
    assert h(num_heads=1, num_kv_heads=1) == [HeadShape(1, 1, 32)]
    assert str(HeadShape(8, 4, 64)) == "8 head(s) of 64, 4 KV"


@pytest.mark.parametrize("head_shape", [HeadShape(4, 2, 8), HeadShape(3, 3, 4)])
def test_the_exact_attention(head_shape):
    """It agrees with torch's own attention, in float64 with the mask written out."""
    for c in cases(head_shape=head_shape).values():
        leaves = [x.detach().double().requires_grad_() for x in c.tensors]
        q, k, v = (x.transpose(1, 2) for x in leaves)
        seen = torch.stack([exact.visible(ids, c.mask.window) for ids in c.ids])[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)
        expected = [out, *torch.autograd.grad(out, leaves, c.dout.double())]
        found = attention.exact_rows(c)
        assert list(found) == [0, 2]
        for row in found:
            for x, y in zip(found[row], expected):
                torch.testing.assert_close(x, y[row : row + 1])
        assert max(attention.errors_of(expected, found).values()) < 1e-14  # measured: 4.7e-16


# ---- paths ---------------------------------------------------------------------------------------


def sequences(q, k, v, bounds, window):
    """Attend causally in a flat batch, one sequence at a time. window: tokens before the query; -1: all."""
    out = []
    group = q.size(1) // k.size(1)
    for start, end in zip(bounds.tolist(), bounds.tolist()[1:]):
        queries, keys, values = (x[start:end].transpose(0, 1) for x in (q, k, v))
        keys = keys.repeat_interleave(group, 0)
        values = values.repeat_interleave(group, 0)
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        if window >= 0:
            seen = seen.triu(-window)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        out.append(attended.transpose(0, 1))
    return torch.cat(out)


def varlens(calls):
    """Return stand-ins for varlen_attn with the signatures of torch 2.12, 2.11 and 2.10."""

    def newest(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False
    ):
        calls.append((max_q, max_k, enable_gqa))
        assert torch.equal(cu_seq_q, cu_seq_k)
        assert isinstance(window_size, tuple)
        assert window_size[1] == 0  # else it is not causal
        assert enable_gqa or query.size(1) == key.size(1)
        return sequences(query, key, value, cu_seq_q, window_size[0])

    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        return newest(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)

    def oldest(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        window_size = (-1, 0 if is_causal else -1)
        return older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)

    return newest, older, oldest


@pytest.mark.parametrize("age", range(3))
def test_varlen_by_its_signature(age, monkeypatch):
    calls = []
    module = ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = varlens(calls)[age]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name, c in cases().items():
        row = outcome(c, attention.PATHS["varlen"])
        if age == 2 and c.mask.window:
            assert row.status is Status.SKIPPED and row.why.endswith("has no window_size"), row
            continue
        # Measured: 1.8e-7.
        assert row.status is Status.MEASURED and max(row.errors.values()) < 1e-5, (name, row)
        assert row.note == ("" if age == 0 else "k, v heads repeated")
        assert calls[-1] == (max(c.mask.lengths), max(c.mask.lengths), age == 0)


def plant_flash4(monkeypatch, calls):
    """Plant a package flash-attn-4 whose operator attends by `sequences`. calls: receives T and window."""
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))

    def apply(q, k, v, bounds, form):
        T, window = form
        calls.append(form)
        if bounds is not None:
            return sequences(q, k, v, bounds, window - 1).view(q.shape)
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        return sequences(*flat, torch.arange(0, len(q) * T + 1, T), window - 1).view(q.shape)

    monkeypatch.setattr(t, "Flash4", SimpleNamespace(apply=apply))


def test_flash4_is_the_trainers(monkeypatch):
    """The path calls attend_flash4, compiled by the machine, with the window and documents of the mask."""
    calls = []
    compiled = []
    plant_flash4(monkeypatch, calls)
    s = a_session(rows=3)
    s = s._replace(m=dataclasses.replace(s.m, compile=lambda f: (compiled.append(f), f)[1]))
    for mask in attention.masks_of(3, 16):
        c = attention.make_layer(s, attention.head_shapes_of(s.h)[0], mask)
        row = outcome(c, attention.PATHS["flash4"])
        # Measured: 1.8e-7.
        assert row.status is Status.MEASURED and max(row.errors.values()) < 1e-5, (mask, row)
        assert set(calls) == {(16, mask.window)}
        assert compiled == [t.attend_flash4]
        calls.clear()
        compiled.clear()

    monkeypatch.setattr(t, "attend_flash4", lambda *args, **how: 1.1 * t.attend_sdpa(*args, **how))
    assert outcome(c, attention.PATHS["flash4"]).status is Status.WRONG


def test_flash4_compiles_whole_for_every_mask(monkeypatch):
    """One graph each, for more masks than one function may be recompiled; none without the package."""
    compiled = []

    def stand_in(q, k, v, window=0, documents=None):
        return t.attend_sdpa(q, k, v, window, documents)

    def compiler(f):
        compiled.append(f)
        return torch.compile(f, backend="eager", dynamic=False, fullgraph=True)

    def case(head_shape, mask):
        return attention.make_layer(s, head_shape, mask)

    monkeypatch.setattr(t, "attend_flash4", stand_in)
    s = a_session(rows=2)
    s = s._replace(m=dataclasses.replace(s.m, compile=compiler))
    head_shapes = attention.head_shapes_of(s.h)
    masks = attention.masks_of(2, 16)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    row = outcome(case(head_shapes[0], masks[0]), attention.PATHS["flash4"])
    assert row.status is Status.SKIPPED and "flash_attn" in row.why and not compiled, row
    plant_flash4(monkeypatch, [])
    for head_shape in head_shapes:
        for mask in masks:
            row = outcome(case(head_shape, mask), attention.PATHS["flash4"])
            assert row.status is Status.MEASURED and max(row.errors.values()) < 1e-5, row  # measured: 2.1e-7


def test_flash4_has_room_for_so_many_documents(monkeypatch):
    plant_flash4(monkeypatch, [])
    c = cases(rows=2)["documents"]
    count = max(int((row - row[0]).max()) + 1 for row in c.ids)
    monkeypatch.setattr(t, "MAX_DOCUMENTS", count)
    assert outcome(c, attention.PATHS["flash4"]).status is Status.MEASURED
    monkeypatch.setattr(t, "MAX_DOCUMENTS", count - 1)
    row = outcome(c, attention.PATHS["flash4"])
    assert row.why == f"{count} documents in a row: attend_flash4 keeps {count - 1} apart"


def test_pytorchs_backends_go_through_the_trainers_function(monkeypatch):
    """A path runs attend_sdpa under one backend, with the mask where the backend takes one."""
    seen = []
    reference = t.attend_sdpa

    def attend_sdpa(q, k, v, window, documents):
        seen.append((window, documents))
        return reference(q, k, v, window, documents)

    def sdpa_kernel(backend):
        seen.append(backend)
        return contextlib.nullcontext()

    monkeypatch.setattr(t, "attend_sdpa", attend_sdpa)
    monkeypatch.setattr(attention, "sdpa_kernel", sdpa_kernel)
    backend = attention.SDPBackend
    for name, c in cases(rows=2).items():
        for path, mine in (("math", backend.MATH), ("efficient", backend.EFFICIENT_ATTENTION)):
            if path == "math" and name != "causal":
                continue
            row = outcome(c, attention.PATHS[path])
            # Measured: 2.1e-7.
            assert row.status is Status.MEASURED and max(row.errors.values()) < 1e-5, (name, row)
            calls = [x for x in seen if isinstance(x, tuple)]
            assert {x for x in seen if not isinstance(x, tuple)} == {mine}
            assert bool(calls) == (path == "math" or name != "causal")
            assert all(window == c.mask.window for window, _ in calls)
            assert all((documents is not None) == ("documents" in name) for _, documents in calls)
            repeats = "k, v heads repeated" if name == "causal" else "k, v heads repeated, mask made"
            assert row.note == ("" if path == "math" else repeats)
            seen.clear()


def test_paths_of_a_cpu():
    """math and flash run; flex runs forward on every mask; the others give their reason in one line."""
    found = {}
    for name, c in cases(rows=2).items():
        exact_rows = attention.exact_rows(c)
        found[name] = {
            path: attention.attempt_path(c, path, exact_rows, lambda: None) for path in attention.PATHS
        }
    for name, rows in found.items():
        assert rows["flex"].status is Status.MEASURED, rows["flex"]
        assert [*rows["flex"].errors] == ["out"], rows["flex"]
        # Measured: 7.6e-8.
        assert rows["flex"].errors["out"] < 1e-5 and rows["flex"].times.both_us is None, name
    for path in ("math", "flash"):
        row = found["causal"][path]
        assert row.status is Status.MEASURED
        assert len(row.errors) == 4
        assert max(row.errors.values()) < 1e-5  # measured: 1.9e-7
    for path in ("cudnn", "varlen", "flash4"):
        row = found["causal"][path]
        assert row.status is Status.SKIPPED and row.why and "\n" not in row.why, row


def test_flex_compiles_whole_and_skips_blocks():
    """One graph, for more masks than one function may be recompiled; only blocks with a visible pair."""
    T = 512
    blocks = []

    def compiler(f):
        compiled = torch.compile(f, backend="eager", dynamic=False, fullgraph=True)
        return lambda *args, **how: (blocks.append(how["block_mask"]), compiled(*args, **how))[1]

    s = a_session(rows=2, train_seq_len=T, micro_batch_tokens=2 * T, train_batch_tokens=2 * T)
    s = s._replace(m=dataclasses.replace(s.m, compile=compiler))
    for head_shape in attention.head_shapes_of(s.h):
        for mask in attention.masks_of(2, T):
            c = attention.make_layer(s, head_shape, mask)
            row = attention.attempt_path(c, "flex", attention.exact_rows(c), lambda: None)
            assert row.status is Status.MEASURED and row.errors["out"] < 1e-5, row  # measured: 2.3e-7
            seen = torch.stack([exact.visible(ids, mask.window) for ids in c.ids])
            seen = seen.view(2, T // 128, 128, T // 128, 128).any(4).any(2)
            found = blocks[-1].to_dense()[:, 0].bool()
            assert torch.equal(found.expand_as(seen), seen), mask
    assert torch.equal(seen[0], seen[1]) is False  # documents differ from row to row


def test_repeated_heads():
    """efficient repeats: q head n sees k head n // group."""
    q = torch.zeros(1, 2, 6, 4)
    k = torch.arange(2.0).view(1, 1, 2, 1).expand(1, 2, 2, 4)
    heads = attention.repeated(q, k, k)
    assert heads[0] is q
    assert heads[1][0, 0, :, 0].tolist() == heads[2][0, 1, :, 3].tolist() == [0, 0, 0, 1, 1, 1]
    assert [name for name, path in attention.PATHS.items() if path.causal_only] == ["cudnn", "flash", "math"]


# ---- faults --------------------------------------------------------------------------------------


def flat_sequences(q, k, v, bounds, window):
    """Attend by `sequences` in a batch (B, T, H, D)."""
    return sequences(*(x.flatten(0, 1) for x in (q, k, v)), bounds, window).view(q.shape)


def right(c):
    """Return a correct attention of the case."""
    return lambda q, k, v: flat_sequences(q, k, v, c.bounds, (c.mask.window or 0) - 1)


def planted(make):
    """Return a path made of a case and its correct attention."""
    return AttentionPath(lambda c: BoundPath(make(c, right(c))))


class Fault(NamedTuple):
    """A wrong attention and a word of why it is not timed."""

    make: Callable  # (layer, its correct attention) -> the wrong one
    word: str


FAULTS = {
    "the output": Fault(lambda c, f: lambda q, k, v: 1.03 * f(q, k, v), "out"),
    "dq only": Fault(lambda c, f: lambda q, k, v: f(1.05 * q - 0.05 * q.detach(), k, v), "dq"),
    "dk only": Fault(lambda c, f: lambda q, k, v: f(q, 1.05 * k - 0.05 * k.detach(), v), "dk"),
    "dv only": Fault(lambda c, f: lambda q, k, v: f(q, k, 1.05 * v - 0.05 * v.detach()), "dv"),
    "not a number": Fault(lambda c, f: lambda q, k, v: f(q, k, v) * math.nan, "nan"),
    "the last row": Fault(
        lambda c, f: lambda q, k, v: torch.cat([f(q, k, v)[:-1], f(q, k, v)[-1:] + 1]), "out"
    ),
    "a window one too long": Fault(
        lambda c, f: lambda q, k, v: flat_sequences(q, k, v, c.bounds, c.mask.window),
        "out",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_path_is_not_timed(name, monkeypatch):
    make, word = FAULTS[name]
    mask = "documents, window 8"
    if name == "the last row":
        mask = "causal"
    elif name == "a window one too long":
        mask = "window 8"
    c = cases()[mask]
    monkeypatch.setattr(attention, "micros", lambda *_: pytest.fail("timed"))
    row = outcome(c, planted(make))
    assert row.status is Status.WRONG and word in row.why and row.times is None, row
    if name.endswith("only"):
        assert row.why.split()[2] == word and "," not in row.why, row
    assert attention.row_line(row).startswith("planted   wrong: error of ")
    json.dumps(attention.row_json(row), allow_nan=False)


def test_a_small_error_is_timed():
    c = cases()["documents"]
    row = outcome(c, planted(lambda c, f: lambda q, k, v: 1.01 * f(q, k, v)))
    assert row.status is Status.MEASURED
    assert row.errors["out"] == pytest.approx(0.01, rel=1e-4)  # measured: 2.2e-6


@pytest.mark.parametrize("late", [False, True])
def test_a_path_that_raises_is_skipped(late, capsys, monkeypatch):
    def broken(c):
        if not late:
            raise ImportError("no such\npackage")
        return BoundPath(lambda q, k, v: torch.ones(3).view(2))

    monkeypatch.setitem(attention.PATHS, "varlen", AttentionPath(broken))
    rows = attention.time_paths(cases()["causal"], ["varlen", "math"], lambda: None)
    assert [row.status for row in rows] == [Status.SKIPPED, Status.MEASURED]
    if late:
        assert rows[0].why.startswith("RuntimeError: ")
    else:
        assert rows[0].why == "ImportError: no such"
    said = capsys.readouterr().out
    assert "varlen    skipped: " in said
    assert said.endswith("fastest: forward math, backward math, both math\n")


# ---- clocks and tables ---------------------------------------------------------------------------


def test_figures_by_hand(monkeypatch):
    """A visible pair and head costs 4 Dh products forward and 2.5 times that backward.

    The time of backward is that of both less that of forward.
    """
    times = iter([200.0, 700.0])
    monkeypatch.setattr(attention, "micros", lambda b, what, fn, ahead: (fn(), next(times))[1])
    c = cases(rows=2)["window 4"]
    row = attention.attempt_path(c, "flex", attention.exact_rows(c), lambda: None)
    pairs = 2 * (1 + 2 + 3 + 13 * 4)
    assert c.mask.pairs == pairs
    assert row.times.forward_tflops == pytest.approx(4 * 8 * 4 * pairs / 200e-6 / 1e12)
    times = iter([200.0, 700.0])
    row = outcome(c, planted(lambda c, f: f))
    assert (row.times.forward_us, row.times.backward_us, row.times.both_us) == (200, 500, 700)
    assert row.times.backward_tflops == pytest.approx(2.5 * 4 * 8 * 4 * pairs / 500e-6 / 1e12)
    line = attention.row_line(row).split()
    assert line[:4] == ["planted", "200.0", "500.0", "700.0"] and len(line) == 10
    assert len(attention.row_line(row)) == len(attention.path_line(list(attention.COLUMNS)))


def test_the_devices_clock(monkeypatch):
    """Work is queued before every timed call; the median counts, warm calls do not."""
    queue = []
    clock = iter(range(10**6))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            queue.append("event")
            self.at = next(clock) + 1000 * queue.count("fn")

        def elapsed_time(self, end):
            return (end.at - self.at) / 1000

    monkeypatch.setattr(torch.cuda, "Event", Event)
    s = SimpleNamespace(cuda=True, m=SimpleNamespace(sync=lambda: queue.append("sync")))
    us = attention.micros(s, "x", lambda: queue.append("fn"), lambda: queue.append("ahead"))
    assert us == pytest.approx(1001)
    assert queue == ["fn"] * 3 + ["ahead", "event", "fn", "event"] * 15 + ["sync"]
    assert attention.CALLS >= 10


def test_a_noisy_path_is_named(monkeypatch):
    monkeypatch.setattr(timing, "host_times", lambda calls: [1.0, 4.0, 4.0])
    c = cases(rows=2)["window 4"]
    attention.attempt_path(c, "math", attention.exact_rows(c), lambda: None)
    path = f"math on window 4, {c.head_shape}"
    assert c.s.report["noisy"] == [f"{path}, forward", f"{path}, forward + backward"]


def a_row(head_shape, mask, path, forward=None, both=None):
    """Return a measured row without a rate, or without `forward` a skipped one."""
    if forward is None:
        return PathRow(head_shape, mask, path, Status.SKIPPED, why="")
    backward = None if both is None else both - forward
    times = PathTimes(forward, forward_tflops=1.0, backward_us=backward, both_us=both)
    return PathRow(head_shape, mask, path, Status.MEASURED, times=times)


def test_the_fastest():
    one = HeadShape(8, 4, 64)
    two = HeadShape(4, 2, 128)
    rows = [
        a_row(one, "causal", "cudnn", 300.0, 1000.0),
        a_row(one, "causal", "flash", 250.0, 1200.0),
        a_row(one, "causal", "math"),
        a_row(one, "documents", "flex", 200.0, 600.0),
        a_row(two, "causal", "math"),
        a_row(two, "documents", "flex", 100.0),
    ]
    best = attention.fastest(rows[:3])
    assert [row.path for row in best] == ["flash", "cudnn", "cudnn"]
    assert attention.fastest(rows[2:3]) == (None, None, None)
    lines = [line.split() for line in attention.fastest_table(rows).splitlines()[1:]]
    assert [line[6:] for line in lines] == [
        ["causal", "cudnn", "1,000.0", "1.000"], ["documents", "flex", "600.0", "0.600"], ["causal", "none"],
        ["documents", "flex", "100.0", "-", "forward", "only"],
    ]  # fmt: skip


def test_keys_of_the_report():
    """Earlier reports have these keys: what a row does not have is not in it."""
    both = {"both_us", "backward_us", "backward_tflops"}
    forward = {
        "head_shape",
        "mask",
        "path",
        "status",
        "note",
        "errors",
        "seconds",
        "forward_us",
        "forward_tflops",
    }
    c = cases(rows=2)["window 4"]

    def keys(path):
        row = outcome(c, path)
        return row.status, {*attention.row_json(row)}

    assert keys(planted(lambda c, f: f)) == (Status.MEASURED, forward | both)
    assert keys(attention.PATHS["flex"]) == (Status.MEASURED, forward)
    wrong = {"head_shape", "mask", "path", "status", "note", "errors", "seconds", "why"}
    assert keys(planted(lambda c, f: lambda q, k, v: 1.03 * f(q, k, v))) == (Status.WRONG, wrong)
    skipped = {"head_shape", "mask", "path", "status", "seconds", "why"}
    assert keys(AttentionPath(lambda c: 1 / 0)) == (Status.SKIPPED, skipped)
    found = attention.row_json(outcome(c, planted(lambda c, f: f)))
    assert (found["head_shape"], found["status"]) == (c.head_shape._asdict(), "measured")


# ---- the command ---------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys, monkeypatch):
    rows = []
    row_json = attention.row_json
    monkeypatch.setattr(attention, "row_json", lambda row: (rows.append(row), row_json(row))[1])
    at = tmp_path / "a.json"
    args = ["--attention", "--json", str(at), "--paths", "math,flex,varlen,math", *KNOBS]
    assert bench.main(args, {}) == 0
    printed = capsys.readouterr()
    assert printed.err == "", printed.err
    report = json.loads(at.read_text())
    assert (report["sequences"], report["seq_len"], report["dtype"]) == (4, 16, "float32")
    assert report["versions"]["torch"] == torch.__version__ and report["device"]
    assert report["head_shapes"] == [HeadShape(4, 2, 8)._asdict(), HeadShape(2, 1, 16)._asdict()]
    assert [m["name"] for m in report["masks"]] == NAMES
    assert report["masks"][0]["pairs"] == 4 * 136
    got = [(row["head_shape"]["heads"], row["mask"], row["path"]) for row in report["table"]]
    assert got == [(n, mask, path) for n in (4, 2) for mask in NAMES for path in ("math", "flex", "varlen")
                   if mask == "causal" or path != "math"]  # fmt: skip
    assert {row["status"] for row in report["table"] if row["path"] != "varlen"} == {"measured"}
    assert 0 < sum(row["seconds"] for row in report["table"]) < report["seconds"]
    assert [json.loads(json.dumps(row_json(row))) for row in rows] == report["table"]
    for row in rows:
        assert printed.out.count(attention.row_line(row)) >= 1
    assert "attention of a layer: 4 x 16 tokens, float32" in printed.out
    assert printed.out.index("fastest: forward") < printed.out.index(
        "forward + backward, the fastest path of each"
    )


def test_an_odd_number_of_heads(capsys):
    """There is one head shape then, and a line that says so. Without --paths, a CPU tries all paths."""
    knobs = [*KNOBS, "num_heads=1", "num_kv_heads=1", "rope_dims=4"]
    knobs += ["micro_batch_tokens=16", "train_batch_tokens=16"]
    assert bench.main(["--attention", *knobs], {}) == 0
    out = capsys.readouterr().out
    assert "skipped the second head shape: num_heads=1 is odd" in out
    first = [line.split()[0] for line in out.splitlines() if line]
    masked = ["efficient", "varlen", "flex", "flash4"]
    assert [word for word in first if word in attention.PATHS] == [*attention.PATHS] + 4 * masked


def test_bad_input_is_one_line(tmp_path, capsys):
    refused = partial(refused_by, bench.main, capsys)
    at = tmp_path / "t.json"
    assert "--paths sdpa: not one of cudnn, flash" in refused("--attention", "--paths", "flex,sdpa", *KNOBS)
    assert "--paths (empty): not one of" in refused("--attention", "--paths", "", *KNOBS)
    assert "--paths needs --attention" in refused("--paths", "flex", *KNOBS)
    assert "give one of them" in refused("--attention", "--timeline", at, *KNOBS)
    assert "--candidates" in refused("--attention", "--candidates", at, *KNOBS)
    assert "no such folder" in refused("--attention", "--json", tmp_path / "no" / "a.json", *KNOBS)
    assert "unknown config key" in refused("--attention", *KNOBS, "sed=1")
    assert "cannot read the script" in refused("--attention", "--script", tmp_path / "no.py", *KNOBS)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written(tmp_path, capsys):
    """The reason is one line, before the work, and no temporary file stays."""
    at = tmp_path / "a.json"
    at.mkdir()
    assert bench.main(["--attention", "--paths", "math", "--json", str(at), *KNOBS], {}) == 2
    printed = capsys.readouterr()
    assert printed.err.endswith("a.json: is a folder; name a file in it\n")
    assert printed.out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.gpu
def test_a_gpu(tmp_path):
    """Whatever this GPU has is right on every mask and head shape, and something runs everywhere."""
    at = tmp_path / "a.json"
    knobs = [
        "preset=h100x1_sp1024",
        "train_batch_tokens=4096",
        "micro_batch_tokens=4096",
        "train_seq_len=1024",
    ]
    assert bench.main(["--attention", "--json", str(at), *knobs], {}) == 0
    report = json.loads(at.read_text())
    assert not [row for row in report["table"] if row["status"] == "wrong"]
    for head_shape in report["head_shapes"]:
        for mask in report["masks"]:
            rows = [
                row
                for row in report["table"]
                if (row["head_shape"], row["mask"]) == (head_shape, mask["name"])
            ]
            assert any("both_us" in row for row in rows), (head_shape, mask)
