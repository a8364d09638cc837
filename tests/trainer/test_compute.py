"""The line `compute` at the end of training: tokens, FLOPs and the share of the device's peak."""

import re
from types import SimpleNamespace

import pytest

import train_gpt as t
from tests.helpers import english_args, tiny
from tests.trainer.fault_cases import STEPS, args, stop_after
from tests.trainer.test_batch_growth import COUNTS, GROWTH
from tests.trainer.train_cases import finished_with, starting

LINE = re.compile(
    r"compute scaling_params:(?P<params>\d+) flops_per_token:(?P<each>\d+) tokens:(?P<tokens>\d+) "
    r"tokens_per_param:(?P<ratio>\d+\.\d{4})( flops:(?P<flops>\d\.\d{6}e\+\d\d))?( mfu:(?P<mfu>\d\.\d{4}))?$"
)
LOOP = dict(loop_layers="0 1", loop_times=1, loop_frac=0.5)


def compute_in(text):
    """Return the match of the only line `compute` of a log."""
    (line,) = [line for line in text.splitlines() if line.startswith("compute ")]
    return LINE.match(line)


def compute_of(folder):
    return compute_in((folder / "run.txt").read_text())


def flops_of(tokens, each):
    return pytest.approx(tokens * each, rel=1e-6)  # measured: 3.6e-7


def test_a_run_on_a_cpu_says_all_but_the_share_of_a_peak():
    run = finished_with()
    h = t.load_config(english_args(), {})
    found = compute_in(run.log)
    assert int(found["params"]) == t.scaling_params(h)
    assert int(found["each"]) == t.flops_per_token(h)
    assert int(found["tokens"]) == 24 * 512
    # Measured: 7.7e-6.
    assert float(found["ratio"]) == pytest.approx(24 * 512 / t.scaling_params(h), abs=1e-4)
    assert float(found["flops"]) == flops_of(24 * 512, t.flops_per_token(h))
    assert found["mfu"] is None
    assert run.lines.index(starting(run, "compute ")[0]) < run.lines.index(starting(run, "final_live")[0])


def test_growing_batches_are_counted_as_they_were(tmp_path):
    assert t.main(args(tmp_path, **GROWTH)) == 0
    found = compute_of(tmp_path)
    assert int(found["tokens"]) == 256 * sum(COUNTS)
    assert float(found["flops"]) == flops_of(256 * sum(COUNTS), int(found["each"]))


def test_a_loop_is_counted_from_where_it_begins(tmp_path):
    argv = args(tmp_path, **LOOP)
    assert t.main(argv) == 0
    begins = int(re.search(r"^loop_begins step:(\d+) ", (tmp_path / "run.txt").read_text(), re.M)[1])
    assert 0 < begins < STEPS
    h = t.load_config(argv, {})
    plain = t.flops_per_token(h, loops=False)
    found = compute_of(tmp_path)
    assert int(found["each"]) == t.flops_per_token(h) > plain
    tokens = h.train_batch_tokens
    wanted = begins * tokens * plain + (STEPS - begins) * tokens * t.flops_per_token(h)
    assert float(found["flops"]) == pytest.approx(wanted, rel=1e-6)  # measured: 5.7e-9


@pytest.mark.parametrize("knobs,known", [({}, True), (LOOP, False)], ids=["alike", "loop"])
def test_a_resumed_run_counts_all_of_its_steps_if_they_are_alike(tmp_path, monkeypatch, knobs, known):
    """Their FLOPs, and their time in the mean by which the last step is chosen."""
    stop_after(tmp_path, monkeypatch, 5, **knobs)
    paces = []
    leaves_time = t.Pace.leaves_time

    def noted(pace, *rest):
        paces.append(pace)
        return leaves_time(pace, *rest)

    monkeypatch.setattr(t.Pace, "leaves_time", noted)
    assert t.main(args(tmp_path, resume="auto", **knobs)) == 0
    assert paces[0].step == (0 if known else 5)
    assert (paces[0].clock_ms > 0) != known
    text = (tmp_path / "run.txt").read_text()
    found = compute_in(text[text.rindex("resumed step:") :])
    assert int(found["tokens"]) == STEPS * t.load_config(args(tmp_path), {}).train_batch_tokens
    if known:
        assert float(found["flops"]) == flops_of(int(found["tokens"]), int(found["each"]))
    else:
        assert found["flops"] is None


def test_the_mean_time_of_a_pace_by_hand():
    assert t.Pace(False, 1).step_ms(0, 0.0) == 0
    pace = t.Pace(True, 1, step=5, clock_ms=100.0)
    assert pace.step_ms(5, 100.0) == 20  # of the five before, with other steps among them
    assert pace.leaves_time(5, 100.0, 140.0) and not pace.leaves_time(5, 100.0, 139.0)
    assert pace.step_ms(7, 180.0) == 40


@pytest.mark.parametrize(
    "device,peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA T1000", 0),
        ("x86_64", 0),
    ],
)
def test_mfu_by_hand(device, peak):
    """Two ranks take 10 steps of 128 tokens in 2 ms."""
    h = tiny()
    lines = []
    m = SimpleNamespace(world_size=2, device_name=device)
    run = SimpleNamespace(h=h, m=m, resumed=None, log=lambda line, console: lines.append((line, console)))
    accum = t.cut_batch(h, 2).accum
    t.log_compute(run, t.Pace(False, accum), accum, step=10, train_ms=2.0, tokens=1280)
    ((line, console),) = lines
    found = LINE.match(line)
    flops = 1280 * t.flops_per_token(h)
    assert float(found["flops"]) == pytest.approx(flops, rel=1e-6)  # measured: 7.2e-8
    if peak:
        assert float(found["mfu"]) == pytest.approx(flops / (0.002 * 2 * peak), abs=1e-4)  # measured: 3.1e-5
        assert console.endswith("%") and ", MFU " in console
    else:
        assert found["mfu"] is None and "MFU" not in console
