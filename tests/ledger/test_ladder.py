"""`record ladder`: effects at several budgets, made from the logs of sweeps and records."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ledger import stats
from ledger.make import ladder
from tests.helpers import ROOT
from tests.ledger.record_helpers import make, run

PAGE = "# Ladder\n\n<!-- ladder:start -->\nold\n<!-- ladder:end -->\n\nlast line\n"
SWEEP = "2026-11-27_EndOfRun"


def make_root(root: Path) -> Path:
    """Make a repository with an empty ledger and the page."""
    (root / "records").mkdir(parents=True)
    (root / "docs" / "pictures").mkdir(parents=True)
    (root / "docs" / "ladder.md").write_text(PAGE)
    (root / "requirements.txt").write_text("torch==2.13.0\nnumpy==2.2.6\nsentencepiece==0.2.3\n")
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    return make_root(tmp_path / "repo")


@pytest.fixture(scope="module")
def pristine_pairs(tmp_path_factory) -> Path:
    """Make a ledger in which one change was trained at two budgets, and halves its effect."""
    root = make_root(tmp_path_factory.mktemp("pairs") / "repo")
    add_pair(root, 60, losses=(2.12, 2.10))
    add_pair(root, 120, losses=(2.10, 2.09))
    return root


@pytest.fixture
def pairs(pristine_pairs, tmp_path) -> Path:
    shutil.copytree(pristine_pairs, tmp_path / "repo")
    return tmp_path / "repo"


def add_pair(root: Path, seconds: float, losses: tuple[float, float]) -> None:
    """Make a record of `seconds` and a child of it with one setting changed."""
    config = {"max_wallclock_seconds": seconds}
    base = make(root, meta={"name": f"Base{seconds}"}, config=config, loss=losses[0])
    meta = {"name": f"Idea{seconds}", "parent": f"{base.parent.name}/{base.name}"}
    make(root, meta=meta, config={**config, "matrix_lr": 0.04}, loss=losses[1])


def edit_logs(root: Path, record: str, old: str, new: str) -> None:
    """Replace a text, which must be there, in the logs of a record."""
    for log in (root / "records").rglob(f"*_{record}/logs/*.txt"):
        text = log.read_text()
        assert old in text
        log.write_text(text.replace(old, new))


def add_sweep(root: Path, seconds: int, name: str = "") -> None:
    """Copy a real sweep of 120 s, as if it had trained for `seconds`."""
    folder = root / "records" / "sweeps" / f"2026-11-28_Sweep{name or seconds}"
    shutil.copytree(ROOT / "records" / "sweeps" / SWEEP, folder)
    for log in (folder / "logs").glob("*.txt"):
        text = log.read_text().replace("max_wallclock_seconds: 120.0", f"max_wallclock_seconds: {seconds}.0")
        log.write_text(text)


def test_a_change_at_two_budgets_is_an_idea(pairs):
    (idea,) = ladder.find_ideas(pairs / "records")
    assert idea.changes == (ladder.Change("matrix_lr", "0.03", "0.04"),)
    assert idea.name == "Idea60" and idea.preset == "h100x1"
    assert list(idea.effects) == [60.0, 120.0]
    at_60, at_120 = (effect.mean for effect in idea.effects.values())
    assert at_60 == pytest.approx(2 * at_120, rel=1e-5)  # 0.02 nats and 0.01; measured: 8.4e-7
    assert all(len(effect.gaps) == 3 and effect.reach is not None for effect in idea.effects.values())


def test_a_change_at_one_budget_is_none(pairs):
    for record in (pairs / "records").rglob("*_*120"):
        shutil.rmtree(record)
    assert ladder.find_ideas(pairs / "records") == []


@pytest.mark.parametrize(
    "old, new",
    [
        ("attention:cudnn", "attention:flash4"),  # of the parent: another kernel
        ("NVIDIA H100 80GB HBM3", "NVIDIA H200"),
        ("matrix_lr: 0.04", "matrix_lr: 0.05"),  # another value is another idea
        ("max_wallclock_seconds: 120", "max_wallclock_seconds: 130"),  # the parent has another budget
    ],
)
def test_records_compare_only_under_the_conditions_of_their_parent(pairs, old, new):
    edit_logs(pairs, "Idea120", old, new)
    assert ladder.find_ideas(pairs / "records") == []


def test_settings_that_only_report_are_no_part_of_an_idea(pairs):
    before = ladder.find_ideas(pairs / "records")
    edit_logs(pairs, "Idea120", "eval_stride: 64", "eval_stride: 128")
    assert ladder.find_ideas(pairs / "records") == before != []


def test_sweeps_at_two_budgets_agree_with_themselves(root, capsys):
    add_sweep(root, 60)
    add_sweep(root, 300)
    ideas = ladder.find_ideas(root / "records")
    assert {idea.name for idea in ideas} >= {"floor10", "lr070", "warmdown85"} and len(ideas) == 9
    (agreement,) = ladder.agreements(ideas)
    assert agreement.same_sign == agreement.ideas == 9
    assert agreement.correlation.rho == pytest.approx(1.0)

    assert run(root, "ladder") == 0
    page = (root / "docs" / "ladder.md").read_text()
    assert "| floor20_ema10 | h100x1 | ema_frac=0.02>0.1, min_lr_frac=0.0>0.2 | -3.7 (1) | -3.7 (1) |" in page
    assert "| 60 s and 300 s | 9 | 9 of 9 | +1.00 |" in page
    assert page.startswith("# Ladder\n") and page.endswith("\nlast line\n") and "old" not in page
    assert (root / "docs" / "pictures" / "ladder.png").read_bytes()[:4] == b"\x89PNG"
    assert "floor20_ema10" in capsys.readouterr().out


def test_two_sweeps_at_one_budget_count_together(root):
    add_sweep(root, 60)
    add_sweep(root, 60, name="Again")
    add_sweep(root, 300)
    for idea in ladder.find_ideas(root / "records"):
        assert [len(effect.gaps) for effect in idea.effects.values()] == [2, 1]


def test_an_empty_ledger_says_so(root, capsys):
    assert run(root, "ladder") == 0
    assert "No idea has been trained at two budgets yet." in (root / "docs" / "ladder.md").read_text()
    assert not (root / "docs" / "pictures" / "ladder.png").exists()
    capsys.readouterr()


def test_a_page_without_markers_is_refused(root, capsys):
    (root / "docs" / "ladder.md").write_text("# Ladder\n")
    assert run(root, "ladder") == 2
    assert "ladder.md: needs the line <!-- ladder:start -->" in capsys.readouterr().err


def test_the_page_is_that_of_the_ledger():
    page = (ROOT / "docs" / "ladder.md").read_text()
    lines = ladder.lines_of(ladder.find_ideas(ROOT / "records"))
    assert f"{ladder.BLOCK.start}\n" + "\n".join([*lines, ladder.BLOCK.end]) in page


def test_spearman_is_scipys():
    a = [3.0, 1.0, 4.0, 1.5, 5.0, 9.0, 2.0, 6.0, 5.5, 3.5]
    b = [2.0, 7.0, 1.0, 8.0, 2.8, 1.8, 2.8, 4.0, 5.0, 9.0]
    found = stats.spearman(a, b)
    # From scipy 1.17.1, spearmanr(a, b); measured: 0.
    assert found.rho == pytest.approx(-0.40729671426564323, abs=1e-12)
    assert found.p == pytest.approx(0.2427102702994639, abs=1e-13)  # measured: 2.2e-16


def test_spearman_of_few_values_counts_all_orders():
    found = stats.spearman([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0])
    assert found.rho == pytest.approx(0.8)
    assert found.p == pytest.approx(8 / 24)  # 1 and 3 orders with rho of 1 and 0.8, as many with -1 and -0.8


def test_spearman_needs_three_values_that_vary():
    assert stats.spearman([1.0, 2.0], [1.0, 2.0]) is None
    assert stats.spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
