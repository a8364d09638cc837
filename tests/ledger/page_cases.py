"""A small ledger with something of every kind that the page shows, and a browser for the tests of pages."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from ledger.show.web.library import PACKAGES
from tests.ledger import fixtures_records as fx
from tests.ledger.chromium import NAMES, Chromium, find_chromium
from tests.ledger.record_helpers import MARKERS, NAME, TRACK, make, run

RECORDS = Path(__file__).resolve().parents[2] / "records"
SWEEP = "2026-11-22_Attention"  # of this repository: five rows of three seeds
TIMELINE = "2026-11-23_2xH200"
MISSING = [pip for module, pip in PACKAGES.items() if importlib.util.find_spec(module) is None]
with_packages = pytest.mark.skipif(bool(MISSING), reason=f"requirements-page.txt: no {', '.join(MISSING)}")

HOSTILE = "<script>alert(1)</script> & </script> \"quoted\" 'too'"
NOTES = f"""
Faster by **a tenth**: see [the log](../../../docs/LOG.md) and [a paper](https://example.org/p).

| | before | now |
|---|---:|---:|
| ms | 200 | 180 |

- {HOSTILE}
"""
AUDIT = """auditing x sha256:0 with y sha256:1
audit T1 causality: ok (12 flips (of 12)) [1.2 s]
audit T9 network: FAIL (2 network calls, the first is socket.connect) [0.1 s]
audit 8 of 9 tests passed
"""


def small_ledger(root: Path) -> Path:
    """Make a repository with records, a non-record, a race, a sweep, timelines and another picture."""
    (root / "records").mkdir(parents=True)
    (root / "requirements.txt").write_text("torch==2.13.0\nnumpy==2.2.6\nsentencepiece==0.2.3\n")
    (root / "README.md").write_text(MARKERS)
    (root / "records" / "README.md").write_text(MARKERS)
    make(root)
    child = {"name": "Next", "date": "2026-11-24", "parent": f"{TRACK}/{NAME}", "blurb": HOSTILE}
    source = fx.SCRIPT.replace(
        "return lzma.compress(source.encode())", "return lzma.compress(b'' + source.encode())"
    )
    folder = make(root, meta=child, loss=2.05, step_ms=180, config={"matrix_lr": 0.04}, source=source)
    page = folder / "README.md"
    page.write_text(page.read_text().removesuffix("what changed\n") + NOTES)
    (folder / "audit.txt").write_text(AUDIT)
    make(
        root,
        seeds=(42,),
        meta={"name": "Tried", "date": "2026-11-25", "record": False, "parent": f"{TRACK}/{NAME}"},
    )

    logs = root / "race_logs"
    logs.mkdir()
    for seed in (1, 2, 3):
        (logs / f"race{seed}.txt").write_text(fx.race_log_text(seed, 3.27 + 0.001 * seed))
    race = ["--track", "track_optimizer_race", "--date", "2026-11-26"]
    assert run(root, "new", "Race", *race, "--logs", *sorted(logs.iterdir())) == 0

    shutil.copytree(RECORDS / "sweeps" / SWEEP, root / "records" / "sweeps" / SWEEP)
    shutil.copytree(RECORDS / "timelines" / TIMELINE, root / "records" / "timelines" / TIMELINE)
    sizes = root / "records" / "scaling" / "2026-12-01_Sizes"
    sizes.mkdir(parents=True)
    shutil.copy(RECORDS / "timelines" / TIMELINE / "record.png", sizes / "sizes.png")
    (sizes / "README.md").write_text("# Sizes\n\nFour sizes of *one* model.\n")
    return root


def add_rung(root: Path) -> None:
    """Add the sweep once more, as if it had had 60 s, so that its ideas make a ladder."""
    folder = root / "records" / "sweeps" / f"{SWEEP}60"
    shutil.copytree(RECORDS / "sweeps" / SWEEP, folder)
    for log in (folder / "logs").iterdir():
        text = log.read_text(encoding="utf-8")
        log.write_text(
            text.replace("max_wallclock_seconds: 120.0", "max_wallclock_seconds: 60.0"), encoding="utf-8"
        )


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium; tests are skipped if this machine has none."""
    program = find_chromium()
    if program is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    opened = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()
