"""Kernels are bound by their times on this device, on all ranks alike: fake clocks and fake kernels."""

import dataclasses
import math
import os
import time
from functools import partial

import pytest
import torch

import train_gpt as t
from ledger.read.runlog import parse_log
from tests.helpers import english_args, machine, tiny
from tests.rank_cases import run_ranks


def double(x):
    return 2 * x


def small():
    """Return inputs of `double`."""
    return [torch.arange(1.0, 5.0).view(2, 2).requires_grad_()]


class HostEvent:
    """torch.cuda.Event on a machine without a GPU."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1000 * (end.at - self.at)


@pytest.fixture
def judge(monkeypatch):
    """Return a Judge of this process that asks for times, by the host's clock."""
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    monkeypatch.setattr(t, "TIMED_S", 0.0)
    monkeypatch.setattr(t.Machine, "of_every_rank", lambda self, value: [value])
    monkeypatch.setattr(t.Machine, "largest_of_each", lambda self, *numbers: list(numbers))
    return t.Judge(machine(), times_count=True)


def with_times(monkeypatch, **known):
    """Let functions of these names take these times in ms. Returns the list of the names asked for."""
    asked = []

    def measure(self, functions, draw):
        asked.append(list(functions))
        return {name: float(known[name.split("+")[0]]) for name in functions}

    monkeypatch.setattr(t.Judge, "measure", measure)
    return asked


# ---------------------------------------------------------------- one function and its reference


@pytest.mark.parametrize(
    "times,first",
    [
        ({"triton": 1.0, "torch": 2.0}, "triton"),
        ({"triton": 1.04, "torch": 1.0}, "triton"),  # noise must not choose
        ({"triton": 1.06, "torch": 1.0}, "torch"),
        ({"triton": math.inf, "torch": 1.0}, "torch"),
        ({"triton": 1.0, "torch": math.inf}, "triton"),
        ({"triton": math.inf, "torch": math.inf}, "triton"),  # nothing is known
        ({"flash4": 1.2, "cudnn": 1.04, "flash": 1.0}, "cudnn"),
    ],
)
def test_the_first_that_is_fast_enough_wins(times, first):
    assert t.first_fast_enough(times) == first


@pytest.mark.parametrize("slow", ["kernel", "reference"])
def test_a_kernel_is_bound_if_it_is_right_and_not_slow(slow, judge):
    def dawdling(x):
        time.sleep(0.005)
        return 2 * x

    kernel, reference = (dawdling, double) if slow == "kernel" else (double, dawdling)
    right = t.bind(kernel, reference, small())
    assert right == t.Bound(kernel, "triton")
    found = judge.faster(right, reference, small)
    (first, kernel_ms), (second, reference_ms) = found.times
    assert (first, second) == ("triton", "torch")
    assert (kernel_ms > reference_ms + 3) == (slow == "kernel")
    if slow == "kernel":
        assert (found.function, found.label) == (reference, "torch(triton:slower)")
    else:
        assert (found.function, found.label) == (kernel, "triton")
    # Where times do not count, being right is enough.
    assert t.Judge(judge.m).faster(right, reference, small) == right


def test_a_wrong_kernel_is_not_timed(judge, monkeypatch):
    asked = with_times(monkeypatch)
    found = judge.faster(t.bind(lambda x: 3 * x, double, small()), double, small)
    assert (found.function, found.label, found.times) == (double, "torch(triton:error_0.500)", ())
    assert asked == []


def test_a_kernel_that_fails_at_the_size_of_training_is_not_bound(judge):
    def kernel(x):
        if len(x) > 2:
            raise RuntimeError("an illegal address")
        return 2 * x

    found = judge.faster(t.bind(kernel, double, small()), double, lambda: [torch.ones(8, requires_grad=True)])
    assert found.function is double and found.label == "torch(triton:slower)"
    (first, kernel_ms), (second, reference_ms) = found.times
    assert (first, kernel_ms, second) == ("triton", math.inf, "torch") and reference_ms < math.inf


def test_no_memory_for_the_inputs_leaves_the_results_to_choose(judge):
    def draw():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    found = judge.faster(t.bind(double, double, small()), double, draw)
    assert (found.function, found.times) == (double, (("triton", math.inf), ("torch", math.inf)))
    assert not found.rejected


def test_both_functions_are_compiled_as_training_compiles(judge):
    compiled = []

    def note(function):
        compiled.append(function)
        return function

    m = machine()
    object.__setattr__(m, "compile", note)
    t.Judge(m, times_count=True).faster(t.Bound(double, "triton"), double, small)
    assert len(compiled) == 2


@pytest.mark.parametrize("limit,B", [(65_536, 4), (40, 2), (8, 1)])
def test_inputs_are_timed_at_the_size_of_a_micro_batch_that_fits(limit, B, monkeypatch):
    monkeypatch.setattr(t, "TIMED_TOKENS", limit)
    assert t.timed_shape(tiny(train_seq_len=16, micro_batch_tokens=64, train_batch_tokens=64)) == (B, 16)


# ---------------------------------------------------------------- the model's functions


def bind_right(fast, reference, inputs, name="triton", limit=0.01):
    """Bind the fast function without comparing it."""
    return t.Bound(fast, name)


@pytest.mark.parametrize(
    "times,label",
    [
        (dict(fp8=1, triton=2, torch=3), "triton+fp8"),
        (dict(fp8=2.2, triton=2, torch=3), "triton(fp8:slower)"),
        (dict(fp8=4, triton=3, torch=2), "torch(triton:slower,fp8:slower)"),
        (dict(fp8=1, triton=3, torch=2), "torch+fp8(triton:slower)"),
    ],
    ids=str,
)
def test_the_mlp_by_its_times(times, label, judge, monkeypatch):
    monkeypatch.setattr(t, "bind", bind_right)
    asked = with_times(monkeypatch, **times)
    bound = t.bind_mlp(tiny(fp8=1), torch.device("cpu"), judge)
    assert bound.label == label
    kept = "torch" if label.startswith("torch") else "triton"
    assert asked == [["triton", "torch"], ["fp8", kept]]
    assert [name for name, _ in bound.times] == ["triton", "torch", "fp8", kept]
    with torch.no_grad():
        x, up, down = torch.ones(1, 2, 16), torch.ones(8, 16), torch.ones(16, 8)
        function = t.mlp if kept == "torch" else t.FusedMLP.apply
        if "+fp8" not in label:
            assert bound.function == function
        elif kept == "torch":
            assert torch.equal(bound.function(x, up, down), t.mlp(x, up, down))


@pytest.mark.parametrize("knobs", [{}, dict(attn_windows="8 0")], ids=str)
@pytest.mark.parametrize(
    "times,label",
    [
        (dict(flash4=10, flash=10, mem_efficient=10), "flash4"),
        (dict(flash4=10.4, flash=10, mem_efficient=20), "flash4"),
        (dict(flash4=11, flash=10, mem_efficient=20), "flash(flash4:slower)"),
        (dict(flash4=11, flash=20, mem_efficient=10), "mem_efficient(flash4:slower)"),
    ],
    ids=str,
)
def test_attention_by_its_times(times, label, knobs, judge, monkeypatch):
    """Keep the order of preference within the margin. The kernels that run on a CPU stand for a GPU's."""
    monkeypatch.setattr(t, "bind", bind_right)
    monkeypatch.setattr(t, "sdpa_kernels_that_run", lambda qkv, judge: ["flash", "mem_efficient"])
    with_times(monkeypatch, **times)
    bound = t.bind_attention(tiny(**knobs), torch.device("cpu"), judge)
    if knobs and label.startswith("flash("):
        label = "flash+mem_efficient(flash4:slower)"
    assert bound.label == label
    assert bound.function is (t.attend_flash4 if label == "flash4" else t.attend_sdpa)
    assert bound.times[0] == ("flash4", times["flash4"])
    on = [name for name in t.SDPA_KERNELS if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]
    kept = label.partition("(")[0].split("+")
    assert on == (list(t.SDPA_KERNELS) if label == "flash4" else kept)
    # The compiler keeps graphs on disk and would take one in which another kernel was chosen.
    assert torch.compiler.config.cache_key_tag == "+".join(on)


def test_the_time_of_attention_is_the_mean_of_all_layers(judge, monkeypatch):
    """Weigh each form of mask by the layers that have it."""

    windows = []
    monkeypatch.setattr(t, "attend_sdpa", lambda q, k, v, window, documents: windows.append(window))

    def measure(self, functions, draw):
        functions["flash"](*draw())
        return {"flash": 1.0 if windows[-1] else 5.0}

    monkeypatch.setattr(t.Judge, "measure", measure)
    h = tiny(num_layers=4, attn_windows="8 8 8 0", xsa_last_n=0)
    candidates = {"flash": t.Attention(t.attend_sdpa, ("flash",))}
    found = t.attention_times(h, torch.device("cpu"), judge, candidates)
    assert found == {"flash": pytest.approx(2.0)}


@pytest.mark.parametrize(
    "knobs,trains,counts",
    [({}, True, False), (dict(bind_by_time=True), True, True), (dict(bind_by_time=True), False, False)],
)
def test_where_times_count(knobs, trains, counts, monkeypatch):
    """Without the knob, and in a command that only scores, results alone count."""
    judges = []

    def bind_qk(h, device, judge):
        judges.append(judge)
        return t.Bound(len, "triton", times=(("triton", 1.0), ("torch", 2.0)) if judge.times_count else ())

    def bind_another(h, device, judge):
        judges.append(judge)
        return t.Bound(abs, "torch", (t.Rejection("fp8", "slower"),))

    monkeypatch.setattr(t, "bind_qk", bind_qk)
    monkeypatch.setattr(t, "bind_mlp", bind_another)
    monkeypatch.setattr(t, "bind_attention", lambda *args: bind_another(*args)._replace(function=max))
    m = t.with_kernels(machine(), tiny(**knobs), trains)
    assert [judge.times_count for judge in judges] == [counts] * 3
    assert m.ops == t.Ops(attend=max, qk=len, mlp=abs)
    label = "torch(fp8:slower)"
    assert m.binding == machine().binding._replace(attention=label, qk="triton", mlp=label)
    assert m.device_name == "cpu"
    assert m.bind_times == ({"qk": (("triton", 1.0), ("torch", 2.0))} if counts else {})


def test_a_deterministic_run_refuses_the_knob():
    with pytest.raises(t.InputError, match="deterministic=1 needs bind_by_time=0"):
        t.make_config(dict(deterministic=True, bind_by_time=True))


# ---------------------------------------------------------------- several ranks


def rank_that_binds(rank, cases):
    """Bind `double` on this rank, where the kernel takes times[rank] ms and is wrong if errors[rank]."""
    judge = t.Judge(t.init_machine(tiny(), os.environ), times_count=True)
    found = []
    for times, errors in cases:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(t, "device_times", lambda *_, ms=times[rank]: [ms, 1.0])
            kernel = (lambda x: 3 * x) if errors[rank] else double
            bound = judge.faster(t.bind(kernel, double, small()), double, small)
        found.append((bound.label, bound.times))
    return found


def test_ranks_with_other_times_and_results_bind_the_same():
    """The slowest rank decides, because a step waits for it; one wrong rank is enough against a kernel."""
    cases = [([0.5, 0.9], [0, 0]), ([0.5, 1.5], [0, 0]), ([1.5, 0.5], [0, 0]), ([0.5, 0.5], [0, 1])]
    expected = [
        ("triton", (("triton", 0.9), ("torch", 1.0))),
        ("torch(triton:slower)", (("triton", 1.5), ("torch", 1.0))),
        ("torch(triton:slower)", (("triton", 1.5), ("torch", 1.0))),
        ("torch(triton:error_0.500)", ()),
    ]
    assert run_ranks(rank_that_binds, 2, cases) == [expected] * 2


def rank_with_kernels(rank, cases):
    """Return the attention kernels that are taken for running here, of which case[rank] do."""
    judge = t.Judge(t.init_machine(tiny(), os.environ))

    def attend(q, running=()):
        on = [name for name in t.SDPA_KERNELS if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]
        if not set(on) & set(running):
            raise RuntimeError(f"{on}")
        return q * 1

    found = []
    for case in cases:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(t, "attend_sdpa", partial(attend, running=case[rank]))
            try:
                found.append(t.sdpa_kernels_that_run(small(), judge))
            except t.InputError as e:
                found.append(str(e).partition(" of")[0])
    return found


def test_an_attention_kernel_must_run_on_every_rank():
    cases = [
        (["cudnn", "flash", "math"], ["flash", "mem_efficient", "math"]),
        (["cudnn", "math"], ["flash", "math"]),
        (["cudnn"], ["flash"]),
    ]
    expected = [["flash"], ["math"], "no attention kernel"]
    assert run_ranks(rank_with_kernels, 2, cases) == [expected] * 2


# ---------------------------------------------------------------- the log


def test_the_log_has_the_times_in_lines_of_their_own(tmp_path, monkeypatch):
    """The machine line holds no time: runs of one machine have the same line."""
    times = {
        "qk": (("triton", 0.4123), ("torch", 0.6549)),
        "mlp": (("triton", 1.1), ("torch", math.inf), ("fp8", 1.0), ("triton", 1.1)),
    }
    lines = (
        "bind qk triton:0.412ms torch:0.655ms\nbind mlp triton:1.100ms torch:infms fp8:1.000ms triton:1.100ms"
    )
    init_machine = t.init_machine

    def timed(h, env, **options):
        return dataclasses.replace(init_machine(h, env, **options), bind_times=times)

    monkeypatch.setattr(t, "init_machine", timed)
    assert t.main(english_args(out_dir=tmp_path, iterations=1)) == 0
    log = (tmp_path / "run.txt").read_text()
    assert log.count(f" update:eager\n{lines}\ndata ") == 1
    facts = parse_log(tmp_path / "run.txt").facts
    assert "bind" not in facts and facts["machine"]["update"] == "eager"


# ---------------------------------------------------------------- the device


@pytest.mark.gpu
def test_on_a_device_the_larger_product_takes_longer():
    m = t.with_gpu(machine())
    m = t.replace(m, device=torch.device("cuda"))
    calls = [t.call_of(double, t.draw_normal(m.device, (n, 4096))) for n in (4096, 16384)]
    small_ms, large_ms, failed = t.device_times(m, [*calls, lambda: 1 / 0])
    assert 2 < large_ms / small_ms < 8 and failed == math.inf
