"""The bench: work by hand, floors, kernels by class, candidates with planted faults, the command's manners."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "records"), str(ROOT / "tests")]

import bench  # noqa: E402
import train_gpt as t  # noqa: E402
from helpers import english_args, english_dataset, group_of_one, machine, stop_one_line, tiny  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_bench")
SECTIONS = [
    "embedding + bigram + smear", "value embedding", "residual mix + norm", "QKV product", "QK norm + rope + gain",
    "attention", "XSA", "O product", "residual add + norm", "MLP", "skip adds",
    "head + softcap + cross-entropy", "bank casts",
]  # fmt: skip
WHOLE = ["forward", "forward+backward", "optimizer", "ema", "zero gradients", "clock check", "step", "log line",
         "loader.next", "loader.build (in its thread)"]  # fmt: skip


def a_bench(rows=2, **knobs):
    return bench.Bench(t, tiny(**knobs), machine(), rows, dict(skipped=[], whole=[], sections=[]), math.inf)


def sections(b, dtype=torch.float32):
    return {s.name: s for s in bench.sections_of(b, t, t.Ops(), dtype)}


def measured(args, tmp_path, capsys):
    """(report, output) of a bench in this process."""
    file = tmp_path / "bench.json"
    assert bench.main(["--json", str(file), *map(str, args), *english_args()], {}) == 0
    said = capsys.readouterr()
    assert said.err == "", said.err
    return json.loads(file.read_text()), said.out


# ---------------------------------------------------------------- work and floors


def test_the_sections_make_the_models_products():
    """Together they have the products of a forward, counted by torch, and those of a backward are twice that."""
    b = a_bench()
    identity = lambda q, k, v, window, docs: q
    model = t.GPT(b.h, t.Ops(attend=identity))
    tokens = torch.zeros(2, b.h.train_seq_len, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        loss = model.loss(tokens, tokens)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    rows = [s for s in sections(b).values() if s.name != "attention"]
    assert sum(s.count * s.forward.flops for s in rows) == forward.get_total_flops()
    assert sum(s.count * s.backward.flops for s in rows) == backward.get_total_flops()


def test_work_by_hand():
    b = a_bench()
    h, N, found = b.h, 2 * b.h.train_seq_len, sections(b)
    assert [s.name for s in found.values() if s.count] == SECTIONS
    assert [s.name for s in found.values() if not s.count] == ["attention block", "layer"]
    D, kv, F = h.model_dim, h.kv_dim, h.mlp_dim
    products = (N, D, F), (N, F, D)
    assert found["MLP"].forward == bench.Work(4 * 2 * (N * D + D * F + N * F), tuple((2 * N * D * F, p) for p in products))
    assert found["MLP"].backward.moved == 4 * (3 * N * (D + F) + 4 * D * F)
    assert found["O product"].backward.moved == 4 * (3 * N * D + 2 * D * D)
    qk, both = found["QK norm + rope + gain"], N * (D + kv)  # v is a view, its gradient is copied
    assert qk.forward.moved == 4 * 2 * both and qk.backward.moved == 4 * (3 * both + 2 * N * kv)
    assert found["XSA"].forward.moved == 4 * (2 * N * D + N * kv) and found["XSA"].count == h.xsa_last_n
    pairs = h.train_seq_len**2 / 2  # of a query and a key that it sees
    assert found["attention"].forward.flops == 2 * (2 * 2 * h.num_heads * pairs * h.head_dim)
    assert found["attention"].backward.flops == 2.5 * found["attention"].forward.flops
    parts = ("QKV product", "attention", "O product", "MLP")
    assert found["layer"].forward.flops == sum(found[part].forward.flops for part in parts)
    assert found["skip adds"].count == h.num_layers // 2
    assert found["bank casts"].forward.moved == 0  # float32 to float32


def test_masked_attention_is_counted_by_window():
    """4 layers; documents of a quarter of 16 tokens; 3 of 4 tokens see as many as the window, the first fewer."""
    pairs = lambda **knobs: {
        name.removeprefix("attention"): (s.count, s.forward.flops / (4 * 2 * 32))
        for name, s in sections(a_bench(**knobs)).items()
        if s.name.startswith("attention") and s.count
    }
    assert pairs() == {"": (4, 128)}
    assert pairs(attn_windows="4 0 4") == {"": (1, 128), ", window 4": (3, 4 * 12 + 4 * 4 / 2)}
    assert pairs(doc_mask=1) == {"": (4, 4 * 4 * 4 / 2)}
    assert pairs(doc_mask=1, attn_windows="2") == {", window 2": (4, 4 * (2 * 2 + 2 * 2 / 2))}


@pytest.mark.parametrize("knobs", [{}, dict(attn_windows="4 0", doc_mask=1)], ids=str)
def test_every_section_runs_forward_and_backward(knobs):
    b = a_bench(**knobs)
    for s in sections(b).values():
        assert len(bench.time_section(b, s)) == 2
        leaves = bench.leaves_of(s, s.inputs())
        assert leaves or s.back, s.name


def test_a_floor_is_the_larger_of_copy_and_products():
    rates = {None: 10.0, (2, 3, 4): 5.0}
    assert bench.floor_of(bench.Work(3e9), 1000.0, rates) == (3.0, "copy")
    work = bench.Work(1e9, ((1e10, (2, 3, 4)), (2e10, None)))
    ms, bound = bench.floor_of(work, 1000.0, rates)
    assert bound == "product" and math.isclose(ms, 1e10 / 5e12 * 1e3 + 2e10 / 10e12 * 1e3)
    s = bench.Section("s", 4, None, None, work, bench.Work(1e9))
    row = bench.section_row(s, "forward", 8.0, (1000.0, rates))
    assert row["percent_of_floor"] == 50 and row["total_ms"] == 32 and row["floor_total_ms"] == 16
    assert row["gbps"] == 125 and row["tflops"] == 3.75 and row["mb"] == 1000 and row["gflop"] == 30
    assert bench.section_row(s, "backward", 2.0, (1000.0, rates))["percent_of_floor"] == 50


# ---------------------------------------------------------------- clocks


def test_a_graph_holds_every_call(monkeypatch):
    """ms are of one call of the recorded graph; nothing is recorded before it ran outside."""
    recorded, ran = [], []

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
    m = SimpleNamespace(device=torch.device("cuda"), lanes=lanes, sync=lambda: None, is_main=True)
    m.record = lambda fn: recorded.append(list(ran)) or fn
    b = a_bench()._replace(m=m)
    assert bench.call_ms(b, [lambda: ran.append(0), lambda: ran.append(1), lambda: ran.append(2)]) == 4.0
    assert recorded == [[0, 1, 2] * 2] and ran == [0, 1, 2] * (2 + bench.REPLAYS + 1)
    m.record = lambda fn: fn() or 1 / 0  # what cannot be recorded is launched, and the report says so
    assert bench.call_ms(b, [lambda: None] * 6) == 2.0
    assert b.report["skipped"][0]["why"].startswith("ZeroDivisionError")


@pytest.mark.parametrize("error", [None, OSError("driver")], ids=["recorded", "failed"])
def test_forward_and_backward_and_the_step_are_timed_as_training_launches_them(monkeypatch, error):
    """The pass is a graph where the machine records, gone when all is timed; where it cannot be, the report says so."""
    launches, alive = [], []

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
        b = a_bench()._replace(h=h, m=dataclasses.replace(m, record=record), rows=2)
        run, of, wall = bench.build(b), {}, bench.wall_times

        def wall_times(b, fn, before=lambda: None):
            times = wall(b, fn, before)
            of[len(of)] = list(launches)
            launches.clear()
            return times

        monkeypatch.setattr(bench, "wall_times", wall_times)
        bench.time_whole(b, run, 4)
    counts = {w["name"]: (of[i].count("both_ways"), of[i].count("schedule")) for i, w in enumerate(b.report["whole"])}
    each, accumulated = (0, 0) if error else (14, 4 * 14)
    assert counts["forward"] == (0, 0) and counts["forward+backward"] == (each, 0)
    assert counts["optimizer"] == (0, 14) and counts["step"] == (accumulated, 14)
    assert [x() is None for x in alive] == ([False] if error else [False, True])
    why = [x["why"] for x in b.report["skipped"] if "forward+backward" in x["what"]]
    assert why == (["rank 0: OSError: driver"] if error else [])


def test_inputs_are_fresh_where_they_would_stay_in_the_cache(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(L2_cache_size=100))
    b = a_bench()._replace(m=SimpleNamespace(device=torch.device("cuda")))
    sets = bench.fresh_sets(b, lambda: [torch.zeros(49)])
    assert len({s[0].data_ptr() for s in sets}) == bench.FRESH
    assert len(bench.fresh_sets(b, lambda: [torch.zeros(50)])) == 1
    seen = []
    for call in bench.in_turn(b, seen.append, sets):
        call()
    assert seen == sets and len(bench.in_turn(b, seen.append, sets[:1])) == bench.ROUNDS


# ---------------------------------------------------------------- kernels


def test_kernels_by_class():
    own = bench.own_kernels(ROOT / "train_gpt.py")
    assert {"qk_kernel", "mlp_kernel", "symmetric_kernel", "substitution_kernel"} <= own
    for name, which in [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1", "attention"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>(T1)", "matrix products"),
        ("triton_red_fused__to_copy_mul_sum_12", "Inductor reductions"),
        ("triton_per_fused_add_rsqrt_3", "Inductor reductions"),
        ("triton_poi_fused_leaky_relu_pow_1", "Inductor pointwise"),
        ("qk_kernel", "our kernels"),
        ("Memset (Device)", "copies and fills"),
        ("void at::native::vectorized_elementwise_kernel<4>()", "others (ATen)"),
    ]:
        assert bench.kernel_class(name, own) == which, name
    kernel = lambda name, us, cat="kernel": dict(ph="X", cat=cat, name=name, dur=us)
    events = [kernel("nvjet_a", 3000), kernel("nvjet_a", 3000), kernel("triton_poi_x", 900), dict(ph="M", name="p"),
              kernel("Memcpy DtoD", 90, "gpu_memcpy"), kernel("aten::mm", 1e6, "cpu_op"),
              kernel("region", 1e6, "gpu_user_annotation"), kernel("nvjet_b", 300)]  # fmt: skip
    found = bench.kernel_tables(events, own, 2)
    assert [k["name"] for k in found["kernels"]] == ["nvjet_a", "triton_poi_x", "nvjet_b", "Memcpy DtoD"]
    first = found["classes"][0]
    assert first["which"] == "matrix products" and math.isclose(first["ms"], 3.15) and first["count"] == 1.5
    assert math.isclose(sum(c["ms"] for c in found["classes"]), 3.645)


# ---------------------------------------------------------------- candidates

CANDIDATES = """
import torch
import torch.nn.functional as F
plain_xsa, plain_nats, plain_heads = t.exclude_self, t.GPT.nats, t.qk_heads
calls = []

class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, d): return 0.5 * d

def lean(x, up, down): return F.linear(F.leaky_relu(F.linear(x, up), 0.5).square(), down)
def wrong_gradient(y, v): return Half.apply(plain_xsa(y, v))
def wrong_forward(qkv, gain, cos, sin): return [1.01 * x for x in plain_heads(qkv, gain, cos, sin)]
def not_a_number(self, tokens, targets, last): return plain_nats(self, tokens, targets, last) * float("nan")
def broken(*args): raise RuntimeError("no kernel\\nhere")

CANDIDATES = {
    "lean": ("t.mlp", lean), "gradient": ("exclude_self", wrong_gradient), "broken": ("layer", broken),
    "rope": ("qk_heads", wrong_forward), "nan": ("GPT.nats", not_a_number), "absent": ("no_such.thing", lean),
    "two": [("mlp", lean), ("exclude_self", lambda y, v: plain_xsa(y, v))],
}
"""


def test_the_fused_paths_as_candidates(tmp_path, capsys):
    """On a CPU, where nothing is fused: each is the same model."""
    report, out = measured(["--candidates", ROOT / "records" / "candidates.py", "--seconds", 0], tmp_path, capsys)
    assert not [s for s in report["skipped"] if s["what"].startswith("candidate")], report["skipped"]
    rows = {row["name"]: row for row in report["candidates"]}
    assert list(rows) == ["plain QK", "MLP in bf16", "plain MLP", "PyTorch's attention"]
    for row in rows.values():
        assert max(row["errors"][key] for key in ("loss", "gradients", "worst")) < 1e-3


def test_candidates(tmp_path, capsys):
    file = tmp_path / "c.py"
    file.write_text(CANDIDATES)
    report, out = measured(["--candidates", file, "--seconds", 0], tmp_path, capsys)
    rows = {row["name"]: row for row in report["candidates"]}
    assert list(rows) == ["lean", "gradient", "rope", "nan", "two"]
    for name in ("lean", "two"):
        assert rows[name]["errors"] == rows[name]["plain"] and max(list(rows[name]["errors"].values())[:3]) < 1e-3
        assert re.match(r"keep|drop \(takes", rows[name]["verdict"])
    assert [s["section"] for s in rows["lean"]["sections"]] == ["MLP", "layer"]
    assert [s["section"] for s in rows["two"]["sections"]] == ["XSA", "MLP", "layer"]
    xsa = rows["gradient"]["sections"][0]
    assert xsa["section"] == "XSA" and xsa["errors"]["forward"] < 1e-5 and math.isclose(xsa["errors"]["gradients"], 0.5, rel_tol=1e-3)
    assert rows["gradient"]["errors"]["loss"] < 1e-3 and rows["gradient"]["verdict"].startswith("drop (gradients error")
    rope = rows["rope"]["sections"][0]
    assert rope["section"] == "QK norm + rope + gain" and math.isclose(rope["errors"]["forward"], 0.01, rel_tol=1e-2)
    assert rows["rope"]["verdict"].startswith("drop (")
    assert "nan" in rows["nan"]["verdict"] and rows["nan"]["sections"][0]["section"].startswith("head")
    why = {s["what"]: s["why"] for s in report["skipped"]}
    assert why["candidate broken"] == "RuntimeError: no kernel" and "no_such" in why["candidate absent"]
    assert why["section MLP"] == "out of time (--seconds)"
    assert "skipped candidate broken: RuntimeError: no kernel" in out
    assert re.search(r"^candidate lean \(mlp\): forward\+backward [\d.]+ ms, plain [\d.]+; error of loss", out, re.M)
    assert t.mlp(torch.zeros(1, 1, 2), torch.zeros(3, 2), torch.zeros(2, 3)).shape == (1, 1, 2)


def test_verdicts():
    errors = dict(loss=1e-6, gradients=1e-2, worst=2e-2)
    row = dict(errors=errors, plain=errors, sections=[], ms=9.0, plain_ms=10.0, wins=8, pairs=10)
    assert bench.verdict(row) == "keep (10.0 % faster, faster in 8 of 10 pairs)"
    assert bench.verdict(row | dict(ms=9.99)) == "drop (takes 99.9 % of the time, faster in 8 of 10 pairs)"
    assert bench.verdict(row | dict(wins=7)) == "drop (takes 90.0 % of the time, faster in 7 of 10 pairs)"
    assert bench.verdict(row | dict(errors=errors | dict(gradients=1.6e-2))).startswith("drop (gradients error")
    assert bench.verdict(row | dict(errors=errors | dict(worst=math.nan))).startswith("drop (worst error nan")
    part = dict(section="XSA", errors=dict(forward=4e-3), plain_errors=dict(forward=2e-3))
    assert bench.verdict(row | dict(sections=[part])).startswith("drop (XSA, forward error")


def test_pairs_take_turns(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def runs(name, seconds):
        def both():
            order.append(name)
            clock[0] += seconds

        return SimpleNamespace(both=both)

    pairs = bench.in_pairs(a_bench(), runs("plain", 2.0), runs("other", 1.0))
    assert len(pairs) == 10 and all(math.isclose(p, 2000) and math.isclose(c, 1000) for p, c in pairs)
    assert order[:4] == ["other", "plain", "plain", "other"]


def test_the_reference_is_the_model_in_float64():
    b = a_bench()
    model = bench.scatter(t.GPT(b.h))
    rows = torch.randint(b.h.vocab_size, (3, b.h.train_seq_len + 1))
    loss, grads = bench.reference(b, SimpleNamespace(model=model), rows)
    exact = t.GPT(b.h, dtype=torch.float64).double()
    exact.load_state_dict(model.state_dict())
    true = exact.loss(rows[:, :-1], rows[:, 1:])
    true.backward()
    assert math.isclose(loss, true.item(), rel_tol=1e-6) and set(grads) == dict(exact.named_parameters()).keys()
    for name, p in exact.named_parameters():
        assert bench.relative(grads[name], p.grad) < 1e-5 and p.grad.norm() > 0, name


# ---------------------------------------------------------------- the command


def test_the_command_measures_everything(tmp_path, capsys):
    """Through train_gpt.py: summary lines, both passes of every section, sums, a machine-readable copy."""
    file = tmp_path / "b.json"
    argv = list(sys.argv)
    assert t.main(["bench", "--json", str(file), *english_args()]) == 0 and sys.argv == argv
    out, report = capsys.readouterr().out, json.loads(file.read_text())
    assert [w["name"] for w in report["whole"]] == WHOLE
    for name in WHOLE:
        line = rf"^bench {re.escape(name)}: median [\d.]+ ms, min [\d.]+, max [\d.]+ \(device \S+, attention cpu\)$"
        assert re.search(line, out, re.M), name
    rows = report["sections"]
    assert [(r["section"], r["which"]) for r in rows] == [(n, w) for n in SECTIONS for w in ("forward", "backward")]
    assert math.isclose(report["sums"]["floors_ms"], sum(r["floor_ms"] * r["count"] for r in rows))
    assert report["rates"]["copy_gbps"] > 0 and all(p["tflops"] > 0 for p in report["rates"]["products"])
    assert [s["what"] for s in report["skipped"]] == ["profile"] and report["config"]["num_layers"] == 2
    assert re.search(r"^MLP +backward +2 ", out, re.M) and "sum of floors" in out


def test_bad_input_is_one_line(tmp_path, capsys):
    file = tmp_path / "c.py"
    file.write_text("CANDIDATES = {}\n")
    named = tmp_path / "d.py"
    named.write_text("CANDIDATES = {'a': ('mlp', t.mlp)}\n")
    for argv, word in [
        (["sead=1"], "sead"), (["--fast"], "--fast"), (["--json", str(tmp_path / "no" / "b.json")], "no such folder"),
        (["--candidates", str(tmp_path / "none.py")], "none.py"), (["--candidates", str(file)], "CANDIDATES"),
        (["--only", "a"], "--candidates"), (["--candidates", str(named), "--only", "b"], "which has a"),
        (["--seconds", "soon"], "--seconds"),
    ]:  # fmt: skip
        said = stop_one_line(["bench", *argv], capsys)
        assert said.startswith("bench.py: ") and word in said, said
    assert t.main(["bench", "--help"]) == 0 and "--candidates FILE.py" in capsys.readouterr().out


def test_a_script_without_the_tool_says_where_it_is(tmp_path):
    script = shutil.copy(t.__file__, tmp_path / "train_gpt.py")
    done = subprocess.run([sys.executable, script, "bench"], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done
    assert f"python records/bench.py --script {script} KEY=VALUE" in done.stderr


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    file = tmp_path / "b.json"
    started = time.perf_counter()
    assert bench.main(["--json", str(file), "preset=h100x1", "train_batch_tokens=98304", "micro_batch_tokens=98304"], {}) == 0
    report = json.loads(file.read_text())
    assert [s["what"] for s in report["skipped"]] in ([], ["loader"]) and time.perf_counter() - started < 120
    assert {c["which"] for c in report["profile"]["classes"]} >= {"attention", "matrix products", "Inductor pointwise"}
