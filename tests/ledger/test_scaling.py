"""`record scaling`: the law of loss against compute, on made-up losses whose law is known."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from ledger.make import scaling
from tests.helpers import ROOT
from tests.ledger import fixtures_records as fx
from tests.ledger.record_helpers import run

PAGE = "# Scaling\n\n<!-- scaling:start -->\nold\n<!-- scaling:end -->\n\nlast line\n"
FLOPS = {2: 3e14, 4: 3e15, 8: 6e16, 12: 7e17, 16: 3e18}
FLOOR = 0.6
SCALE = 40.0
EXPONENT = 0.12
SEEDS = (1337, 42, 2025)


def law(flops: float, floor: float = FLOOR, scale: float = SCALE, exponent: float = EXPONENT) -> float:
    return floor + scale * flops**-exponent


@pytest.fixture
def root(tmp_path) -> Path:
    """A repository with an empty ledger and the page."""
    root = tmp_path / "repo"
    (root / "records").mkdir(parents=True)
    (root / "docs" / "pictures").mkdir(parents=True)
    (root / "docs" / "scaling.md").write_text(PAGE)
    return root


def add_log(root: Path, depth: int, bpb: float, row: str = "base", seed: int = 1337, **config) -> Path:
    """Write the log of a run of a depth that ended at a bpb, as a sweep has it."""
    flops = FLOPS[depth]
    knobs = {"depth": depth, "model_dim": 64 * depth, "tokens_per_param": 12.0, **config}
    text = fx.log_text(seed, config=knobs)
    compute = f"compute scaling_params:{depth**3} flops_per_token:9 tokens:{12 * depth**3} flops:{flops:.6e}"
    text = text.replace("final_live ", f"sweep row:{row} rate:1\n{compute}\nfinal_live ", 1)
    text, count = re.subn(r"^(final_ema .*val_bpb:)\S+", rf"\g<1>{bpb:.8f}", text, flags=re.M)
    assert count == 1
    logs = root / "records" / "sweeps" / f"2026-11-28_Depth{depth}" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"{row}_{config.get('matrix_lr', 0)}_seed{seed}.txt"
    path.write_text(text)
    return path


def add_curve(root: Path, row: str = "base", noise: float = 0.0, **numbers: float) -> None:
    """Write a log for each depth and seed, by the law."""
    dice = random.Random(1)
    for depth, flops in FLOPS.items():
        for seed in SEEDS:
            add_log(root, depth, law(flops, **numbers) + dice.gauss(0, noise), row=row, seed=seed)


# ---- the law -------------------------------------------------------------------------------------


@pytest.mark.parametrize("floor,scale,exponent", [(0.6, 40.0, 0.12), (0.0, 30.0, 0.08), (0.9, 3e6, 0.5)])
@pytest.mark.parametrize("count", [3, 5])
def test_an_exact_law_is_found(floor, scale, exponent, count):
    flops = list(FLOPS.values())[:count]
    fit = scaling.fit_law(flops, [law(c, floor, scale, exponent) for c in flops])
    assert fit.floor == pytest.approx(floor, abs=1e-8)  # measured: 4.9e-10
    assert fit.exponent == pytest.approx(exponent, rel=1e-8)  # measured: 2.9e-10
    assert fit.scale * fit.unit**fit.exponent == pytest.approx(scale, rel=1e-7)  # measured: 2.2e-9
    assert fit.loss(1e20) == pytest.approx(law(1e20, floor, scale, exponent), abs=1e-8)  # measured: 9.2e-11


@pytest.mark.parametrize(
    "losses",
    [
        [1.2, 1.1],  # too few
        [1.0, 1.1, 1.2, 1.3],  # it rises
        [1.5, 1.0, 1.0, 1.0],  # a step, which any large exponent fits
    ],
    ids=["two", "rising", "step"],
)
def test_no_law_where_there_is_none(losses):
    assert scaling.fit_law([1e15, 1e16, 1e17, 1e18][: len(losses)], losses) is None


def test_runs_of_one_compute_are_one_budget():
    assert scaling.fit_law([1e15, 1e15, 1e16, 1e16], [1.2, 1.21, 1.1, 1.11]) is None


def points(noise: float, seeds: int, seed: int = 1) -> list[scaling.Point]:
    dice = random.Random(seed)
    return [
        scaling.Point(d, d**3, 12 * d**3, c, [law(c) + dice.gauss(0, noise) for _ in range(seeds)])
        for d, c in FLOPS.items()
    ]


def test_the_interval_mostly_covers_the_truth():
    covered = 0
    for seed in range(30):
        ends = scaling.interval_of(points(0.001, seeds=5, seed=seed), resamples=80)
        covered += ends.exponent[0] < EXPONENT < ends.exponent[1]
        covered += ends.floor[0] < FLOOR < ends.floor[1]
    assert covered / 60 > 0.8


def test_the_interval_grows_with_the_noise_and_repeats():
    narrow = scaling.interval_of(points(0.0002, seeds=5), resamples=200).exponent
    wide = scaling.interval_of(points(0.002, seeds=5), resamples=200).exponent
    assert 3 * (narrow[1] - narrow[0]) < wide[1] - wide[0]
    assert scaling.interval_of(points(0.001, seeds=3), 50) == scaling.interval_of(points(0.001, seeds=3), 50)


def test_one_seed_has_no_interval():
    assert scaling.interval_of(points(0.001, seeds=1)) is None


def test_where_laws_cross():
    steep = scaling.Fit(floor=0.5, scale=0.5, exponent=0.2, unit=1e17)
    flat = scaling.Fit(floor=0.5, scale=0.5 / 10**0.2, exponent=0.1, unit=1e16)
    # With C = 10^x: -0.2 (x - 17) = -0.2 - 0.1 (x - 16), so x = 20.
    at = scaling.crossing(steep, flat, 1e15, 1e23)
    assert at == pytest.approx(1e20, rel=1e-12)  # measured: 7.5e-15
    assert steep.loss(at) == pytest.approx(flat.loss(at))
    assert scaling.crossing(flat, steep, 1e15, 1e22) == pytest.approx(1e20, rel=1e-12)  # measured: 1.1e-15
    assert scaling.crossing(steep, flat, 1e15, 1e19) is None
    assert scaling.crossing(steep, steep._replace(floor=0.6), 1e15, 1e23) is None


# ---- curves from logs ----------------------------------------------------------------------------


def test_a_curve_and_its_law_are_written_to_the_page(root, capsys):
    add_curve(root, noise=0.0005)
    assert run(root, "scaling") == 0
    page = (root / "docs" / "scaling.md").read_text()
    assert page.startswith("# Scaling\n") and page.endswith("\nlast line\n") and "old" not in page
    (curve,) = scaling.find_curves(root / "records")
    assert [point.depth for point in curve.points] == list(FLOPS)
    assert [len(point.losses) for point in curve.points] == [3] * 5
    assert re.search(r"^\| base \| h100x1 \| 12 \| 1,728 \| 20,736 \| 7e\+17 \| 0\.8.* \(3\) \|$", page, re.M)
    fitted = re.search(r"^\| base \| h100x1 \| (\S+) \((\S+) to (\S+)\) \| .* (\S+) \((\S+) to ", page, re.M)
    assert float(fitted[1]) == pytest.approx(FLOOR, abs=0.03)  # measured: 0.003
    assert float(fitted[2]) < float(fitted[1]) < float(fitted[3])
    assert float(fitted[4]) == pytest.approx(EXPONENT, abs=0.02)  # measured: 0.001
    assert (root / "docs" / "pictures" / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    assert "base" in capsys.readouterr().out


def test_two_rows_are_two_curves_and_their_crossing_is_named(root):
    add_curve(root)
    add_curve(root, row="late", floor=0.5, scale=7.0, exponent=0.07)
    curves = scaling.find_curves(root / "records")
    assert [curve.name for curve in curves] == ["base", "late"]
    (line,) = scaling.crossing_lines(curves)
    fits = [scaling.fit_of(curve) for curve in curves]
    at = scaling.crossing(*fits, 3e14, 3e21)
    assert f"base (h100x1) and late (h100x1): they cross at {at:.3g} FLOPs" in line
    assert law(at) == pytest.approx(law(at, 0.5, 7.0, 0.07), abs=1e-7)  # measured: 2.8e-9


def test_laws_of_two_texts_are_not_compared(root):
    add_curve(root)
    add_curve(root, row="late", floor=0.5)
    for log in (root / "records").rglob("late_*.txt"):
        log.write_text(log.read_text().replace(f"val_bytes:{fx.VAL_BYTES}", "val_bytes:99"))
    assert scaling.crossing_lines(scaling.find_curves(root / "records")) == []


def test_the_best_rate_of_each_depth_counts(root):
    for depth in (2, 4):
        add_log(root, depth, 1.5, matrix_lr=0.1)
        add_log(root, depth, 1.4, matrix_lr=0.2 * depth)
    (curve,) = scaling.find_curves(root / "records")
    assert [point.losses for point in curve.points] == [[1.4], [1.4]]


def test_a_rate_that_only_older_scripts_have_does_not_split_a_curve(root):
    for depth in (2, 4):
        add_log(root, depth, 1.5, copy_lr=0.001 * depth)
    (curve,) = scaling.find_curves(root / "records")
    assert [point.depth for point in curve.points] == [2, 4]


@pytest.mark.parametrize(
    "old,new",
    [
        ("depth: 4", "depth: 0"),  # the preset's own model
        (" flops:3.0", " of:3.0"),  # a resumed run with a loop
        ("final_ema ", "final_emu "),  # it did not finish
        ("skip_gates: True", "skip_gates: False"),  # another configuration
        ("NVIDIA H100 80GB HBM3", "NVIDIA H200"),
        ("val_bytes:", "val_bytes:1"),
    ],
)
def test_a_run_that_is_no_part_of_a_curve(root, old, new):
    add_log(root, 2, 1.5, skip_gates=True)
    log = add_log(root, 4, 1.4, skip_gates=True)
    assert len(scaling.find_curves(root / "records")) == 1
    text = log.read_text()
    assert old in text
    log.write_text(text.replace(old, new))
    assert scaling.find_curves(root / "records") == []


def test_the_number_of_devices_does_not_split_a_curve(root):
    add_log(root, 2, 1.5)
    log = add_log(root, 4, 1.4)
    log.write_text(log.read_text().replace("world_size:1", "world_size:8"))
    assert len(scaling.find_curves(root / "records")) == 1


def test_an_empty_ledger_says_so(root):
    assert run(root, "scaling") == 0
    page = (root / "docs" / "scaling.md").read_text()
    assert "No configuration has been trained at two depths yet." in page
    assert not (root / "docs" / "pictures" / "scaling.png").exists()


def test_a_page_without_markers_is_refused(root, capsys):
    (root / "docs" / "scaling.md").write_text("# Scaling\n")
    assert run(root, "scaling") == 2
    assert "scaling.md: needs the line <!-- scaling:start -->" in capsys.readouterr().err


def test_the_page_is_that_of_the_ledger():
    page = (ROOT / "docs" / "scaling.md").read_text()
    lines = scaling.lines_of(scaling.find_curves(ROOT / "records"))
    assert f"{scaling.BLOCK.start}\n" + "\n".join([*lines, scaling.BLOCK.end]) in page
