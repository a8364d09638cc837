"""record site: one page with the whole ledger, the same bytes each time, that asks for nothing outside."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ledger import record, stats
from ledger.folders import sweep_folders
from ledger.show import site
from ledger.show.web import facts, library
from progress import Progress
from script import BadInput
from tests.ledger.page_cases import HOSTILE, MISSING, RECORDS, SWEEP, add_rung, small_ledger, with_packages
from tests.ledger.record_helpers import NAME, SEEDS, TRACK, edit_log, run

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "link", "input", "img", "br", "hr"}  # elements without an end


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    return small_ledger(tmp_path_factory.mktemp("site") / "repo")


@pytest.fixture(scope="module")
def page(ledger) -> str:
    """The page of the small ledger, all claims proved."""
    assert run(ledger, "site", "--out", ledger / "page") == 0
    return (ledger / "page" / "index.html").read_text(encoding="utf-8")


def read(ledger, examine=None) -> facts.Ledger:
    return facts.read_ledger(ledger, examine, Progress("site"))


class Outline(HTMLParser):
    """Checks that elements are closed in order, and keeps ids, inner links and what scripts hold."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in given:
            self.ids.append(given["id"])
        if given.get("href", "").startswith("#"):
            self.links.append(given["href"][1:])
        self.addresses += [given[key] for key in ("src", "href") if key in given]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts[-1] += data


def payload_of(page: str) -> dict:
    """Return what the programs of the page read."""
    return json.loads(next(text for text in Outline(page).scripts if text.startswith('{"histories"')))


# ---- facts, without the packages -----------------------------------------------------------------


def test_the_hash_is_that_of_sha256sum_and_tells_any_change(ledger):
    command = "find * -type f -not -path '*/.*' -not -path '*__pycache__*' | LC_ALL=C sort | xargs sha256sum"
    listed = subprocess.run(
        f"{command} | sha256sum", shell=True, cwd=ledger / "records", capture_output=True, text=True
    )
    before = facts.ledger_hash(ledger / "records")
    assert listed.stdout.split()[0] == before

    note = ledger / "records" / "scaling" / "2026-12-01_Sizes" / "README.md"
    text = note.read_text()
    note.write_text(text + "\n")
    (ledger / "records" / ".hidden").write_text("not of the ledger")
    assert facts.ledger_hash(ledger / "records") != before
    note.write_text(text)
    assert facts.ledger_hash(ledger / "records") == before


def test_effects_are_those_of_the_table_with_the_interval_of_its_paired_test():
    table = json.loads((RECORDS / "sweeps" / SWEEP / "table.json").read_text())
    by_name = {row["name"]: row for row in table["rows"]}
    found = {effect["name"]: effect for effect in facts.effects(table)}
    assert set(found) == set(by_name) - {"dense"}
    for name, effect in found.items():
        assert effect["diff"] == by_name[name]["versus"]["diff"]
        assert effect["paired_p"] == by_name[name]["versus"]["paired_p"]
        assert effect["low"] < effect["diff"] < effect["high"]
    # From scipy.stats.ttest_rel of the two rows: confidence_interval(0.95).
    ends = (found["windows"]["low"], found["windows"]["high"])
    assert ends == pytest.approx((-0.012158, -0.009903), abs=5e-7)  # measured: 0
    # An interval leaves out zero just where p < 0.05.
    for folder in sweep_folders(RECORDS):
        for effect in facts.effects(json.loads((folder / "table.json").read_text())):
            if effect["low"] is not None:
                assert (effect["paired_p"] < 0.05) == (effect["low"] > 0 or effect["high"] < 0)


def test_only_what_was_scored_on_the_same_text_is_tested(ledger):
    entries = read(ledger).entries
    pairs = facts.welch_pairs(entries)
    base, following = f"{TRACK}/{NAME}", f"{TRACK}/2026-11-24_Next"
    assert set(pairs) == {
        f"{base} {following}",
        f"{following} {base}",
    }  # the third has one seed, a race no score
    scores = {entry.key: facts.scores(entry) for entry in entries}
    test = stats.welch(scores[base], scores[following])
    assert pairs[f"{base} {following}"]["diff"] == pytest.approx(test.diff, abs=1e-6)  # measured: 4.2e-7

    other = next(entry for entry in entries if entry.key == following)
    other.sub["data_manifest_sha256"] = "c" * 64  # another vocabulary of the same text
    assert len(facts.welch_pairs(entries)) == 2
    other.sub["val_bytes"] -= 1
    assert facts.welch_pairs(entries) == {}


def test_a_history_has_the_figure_that_decides_its_track(ledger):
    whole = read(ledger)
    scored = site.history(whole, TRACK)
    assert [(row["name"], row["record"]) for row in scored["rows"]] == [
        ("Base", True),
        ("Next", True),
        ("Tried", False),
    ]
    assert scored["unit"] == "bits per byte" and scored["rows"][2]["std"] is None
    race = site.history(whole, "track_optimizer_race")
    assert race["unit"] == "steps" and race["rows"][0]["value"] == 3250


def test_verdicts_of_the_auditor_are_read_from_the_record(ledger):
    by_name = {entry.sub["name"]: entry for entry in read(ledger).entries}
    found = [(audit.test, audit.result, audit.evidence) for audit in by_name["Next"].audits]
    assert found == [
        ("T1", "ok", "12 flips (of 12)"),
        ("T9", "FAIL", "2 network calls, the first is socket.connect"),
    ]
    assert by_name["Base"].audits == []


def test_a_verified_record_is_a_record_whose_claims_were_proved(ledger):
    def examine(folder):
        return record.examine(folder, ledger / "records")

    marks = {entry.sub["name"]: site.mark_of(entry).text for entry in read(ledger, examine).entries}
    assert marks["Base"] == "verified record" and marks["Tried"] == "non-record"
    assert {site.mark_of(entry).text for entry in read(ledger).entries} == {
        "record, not verified here",
        "non-record",
    }


def test_data_in_a_script_cannot_end_it():
    written = library.json_for_script({HOSTILE: [HOSTILE]})
    assert "<" not in written and json.loads(written) == {HOSTILE: [HOSTILE]}


# ---- the page ------------------------------------------------------------------------------------


@with_packages
def test_the_same_ledger_gives_the_same_bytes(ledger, page, capsys):
    code = "import sys; from ledger import record; sys.exit(record.main(sys.argv[1:]))"
    again = ledger / "again"
    argv = [sys.executable, "-c", code, "--root", str(ledger), "site", "--out", str(again)]
    done = subprocess.run(
        argv, env={"PYTHONPATH": str(ROOT / "tools"), "TZ": "Asia/Tokyo"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (again / "index.html").read_bytes() == page.encode("utf-8")
    assert re.fullmatch(r"\S*again/index.html: [\d,]+ bytes in [\d.]+ s\n", done.stdout)
    assert list((ledger / "page").iterdir()) == [ledger / "page" / "index.html"]


@with_packages
def test_the_page_is_whole_html_and_leads_nowhere_outside(page):
    outline = Outline(page)
    assert len(outline.ids) == len(set(outline.ids))
    assert set(outline.links) <= set(outline.ids)
    outside = [address for address in outline.addresses if not address.startswith(("#", "data:"))]
    assert outside == ["https://example.org/p"]  # of a note, followed only if it is clicked
    assert "default-src 'none'" in page


@with_packages
def test_text_of_the_ledger_is_never_markup(page):
    assert HOSTILE not in page and "<script>alert" not in page
    scripts = Outline(page).scripts
    assert not any("alert(1)" in text for text in scripts if not text.lstrip().startswith("{"))
    found = payload_of(page)
    assert found["entries"][f"{TRACK}/{NAME}"]["figures"]["seeds"] == len(SEEDS)


@with_packages
def test_the_page_shows_all_of_the_ledger(page):
    for said in (
        "3 records,\n      1 non-records, 1 sweep",
        f'id="{TRACK}-2026-11-24_Next"',
        "<b>3.2720</b> <small>nats per token</small>",
        "Faster by <strong>a tenth</strong>",
        "<code>matrix_lr</code></th><td><code>0.03</code></td><td><code>0.04</code>",
        "source: +1 -1 lines",
        "The script is its parent's.",
        'T9 network</th><td class="verdict-fail">FAIL</td>',
        "claims: 21 hold or cannot be checked, 0 fail",
        f"<h3>{SWEEP}</h3>",
        "-0.0122 to -0.0099",
        '<h2 id="kind-timelines-title">Timelines of a step</h2>',
        '<h2 id="kind-scaling-title">Scaling</h2>',
        "<p>Four sizes of <em>one</em> model.</p>",
    ):
        assert said in page, said
    assert page.count("verified record</span>") == 3
    assert "Directions and step rules" not in page  # this ledger has none
    assert 'id="ladder"' not in page


@with_packages
def test_a_ladder_appears_with_its_second_rung(tmp_path):
    root = small_ledger(tmp_path / "repo")
    add_rung(root)
    assert run(root, "site", "--out", tmp_path / "page", "--no-verify") == 0
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert '<h2 id="ladder-title">The ladder</h2>' in page and "60 s and 120 s" in page
    ideas = {idea["name"]: idea for idea in payload_of(page)["ideas"]}
    assert ideas["fp8"]["budget"] == [60, 120] and ideas["fp8"]["seeds"] == [3, 3]
    assert ideas["fp8"]["mean"][0] == ideas["fp8"]["mean"][1] < 0 < ideas["fp8"]["reach"][0]


@with_packages
def test_packed_diffs_are_those_of_record_diff(page):
    scripts = Outline(page).scripts
    packed = scripts[scripts.index(next(text for text in scripts if text.startswith('{"histories"'))) + 1]
    diffs = json.loads(zlib.decompress(base64.b64decode(packed)))
    (sections,) = diffs.values()
    assert "+    return lzma.compress(b'' + source.encode())" in [
        line for lines in sections for line in lines
    ]


@with_packages
def test_a_record_that_fails_is_named_and_an_unproved_one_is_not_verified(tmp_path, page, capsys):
    root = small_ledger(tmp_path / "repo")
    edit_log(
        root / "records" / TRACK / NAME / "logs" / "seed42.txt",
        r"val_bpb:1\.\d+ bytes_total",
        "val_bpb:1.0 bytes_total",
    )
    assert run(root, "site", "--out", tmp_path / "a") == 0
    failing = (tmp_path / "a" / "index.html").read_text(encoding="utf-8")
    assert re.search(r'class="mark bad">\d+ claims fail</span>', failing)
    assert failing.count("verified record</span>") == 2
    assert run(root, "site", "--out", tmp_path / "b", "--no-verify") == 0
    unproved = (tmp_path / "b" / "index.html").read_text(encoding="utf-8")
    assert "verified record</span>" not in unproved and "No claim was examined" in unproved


def test_bad_input_is_one_line_and_leaves_nothing(ledger, tmp_path, capsys, monkeypatch):
    def refusal(root, out) -> str:
        capsys.readouterr()
        assert run(root, "site", "--out", out, "--no-verify") == 2
        printed = capsys.readouterr()
        (reason,) = printed.err.splitlines()
        assert printed.out == ""
        assert not (tmp_path / "page").exists()
        return reason

    if not MISSING:
        (tmp_path / "file").write_text("")
        assert "is a file; name a folder" in refusal(ledger, tmp_path / "file")
        (tmp_path / "empty").mkdir()
        assert "no record and no sweep to show" in refusal(tmp_path / "empty", tmp_path / "page")
        broken = small_ledger(tmp_path / "broken")
        (broken / "records" / TRACK / NAME / "config.json").write_text("{")
        assert f"{NAME}/config.json: not JSON" in refusal(broken, tmp_path / "page")
    monkeypatch.setitem(sys.modules, "plotly", None)
    told = refusal(ledger, tmp_path / "page")
    assert "need the package plotly: .venv/bin/pip install -r requirements-page.txt" in told


@with_packages
@pytest.mark.parametrize("module", library.PACKAGES)
def test_a_missing_package_is_named_as_pip_knows_it(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BadInput, match=f"the package {library.PACKAGES[module]}: "):
        library.require_packages()
    pins = (ROOT / "requirements-page.txt").read_text(encoding="utf-8")
    assert re.search(rf"^{library.PACKAGES[module]}==[\d.]+$", pins, re.M)
