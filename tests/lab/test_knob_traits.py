"""The traits of a knob: one line in section 2 of train_gpt.py, and every tool treats the knob rightly."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from commands import words
from lab import encodings
from lab.training import planning
from ledger.make import ladder, scaling, sweep_table
from ledger.make.submission import common_config
from ledger.prove import sweep_claims
from ledger.prove.claims import Wrong
from ledger.read import knobs, probe
from ledger.read.runlog import RunLog
from script import TRAINER, BadInput
from tests.helpers import ROOT

LAST_KNOB = "\n    @property\n    def head_dim"  # what stands behind the last knob


@pytest.fixture
def give(monkeypatch, tmp_path):
    """Return a function that adds a knob `extra` with some traits to the trainer that the tools read."""

    def add(*traits: str) -> None:
        line = f"    extra: float = knob({', '.join(['0.5', *traits])})"
        source = TRAINER.read_text(encoding="utf-8")
        assert source.count(LAST_KNOB) == 1
        trainer = tmp_path / "train_gpt.py"
        trainer.write_text(source.replace(LAST_KNOB, f"{line}\n{LAST_KNOB}"), encoding="utf-8")
        monkeypatch.setattr(knobs, "TRAINER", trainer)
        knobs.read_knobs.cache_clear()

    yield add
    knobs.read_knobs.cache_clear()


def run_with(value: str) -> RunLog:
    """Return a run in whose log the knob has a value."""
    config = {"preset": "cpu", "seed": value[-1], "depth": "4", "extra": value}
    return RunLog(path=ROOT / "logs" / "x.txt", source="", config=config)


def is_path() -> bool:
    """Whether run.sh reads the knob's value as the caller's path."""
    return words.read_knob("extra=a") == "extra=caller/a"


def may_differ_in_a_record() -> bool:
    """Whether the runs of a record may differ in the knob."""
    try:
        common_config([run_with("1"), run_with("2")])
        return True
    except BadInput:
        return False


def is_named_by_a_record() -> bool:
    """Whether a record's config has the knob."""
    return "extra" in common_config([run_with("1")])


def is_typed_to_reproduce() -> bool:
    """Whether the command that repeats a run sets the knob."""
    return "extra=1" in probe.overrides(run_with("1"), {"config": {}, "preset": []})


def is_refused_in_a_row() -> bool:
    """Whether no row of a sweep may set the knob."""
    try:
        planning.row_settings("row a", {"extra": 1})
        return False
    except BadInput:
        return True


def is_refused_in_the_base() -> bool:
    """Whether no plan may set the knob."""
    base = SimpleNamespace(eval_seq_len=64, target_loss=0.0)
    t = SimpleNamespace(InputError=BadInput, load_config=lambda argv, env: base)
    try:
        planning.make_base(t, {"extra": 1}, "plan", sliding=False)
        return False
    except BadInput:
        return True


def is_a_stride() -> bool:
    """Whether a sweep scores without overlap by this knob as well."""
    return "extra" in sweep_table.stride_knobs()


def compiles() -> bool:
    """Whether a worker of a sweep compiles again for another value."""
    return "extra" in sweep_table.model_knobs()


def is_a_column_of_encodings() -> bool:
    """Whether a row of `record encodings` may set the knob."""
    try:
        encodings.check_knobs(["extra=1"], "CODES")
        return True
    except BadInput:
        return False


def is_an_input_of_encodings() -> bool:
    """Whether all rows of `record encodings` may set the knob."""
    try:
        encodings.config_of(None, None, ["extra=1"])
    except BadInput:
        return False
    except AttributeError:  # from the trainer that is none: the knob has passed
        return True


def is_an_idea() -> bool:
    """Whether `record ladder` takes another value for another idea."""
    return "extra" in ladder.settings_of(run_with("1"))


def splits_a_curve() -> bool:
    """Whether `record scaling` takes another value for another curve."""
    scored = run_with("1")
    scored.facts = {"data": {"val_bytes": "1"}, "sweep": {}}
    return "extra" in dict(scaling.key_of(scored).settings)


ASKED = (
    *(is_path, may_differ_in_a_record, is_named_by_a_record, is_typed_to_reproduce, is_refused_in_a_row),
    *(is_refused_in_the_base, is_a_stride, compiles, is_a_column_of_encodings, is_an_input_of_encodings),
    *(is_an_idea, splits_a_curve),
)
WITHOUT = {is_named_by_a_record, is_typed_to_reproduce, is_an_idea, splits_a_curve}  # no trait
RESULTS = {  # what a trait changes
    "PATH": {is_path},
    "DATA": {
        *(may_differ_in_a_record, is_named_by_a_record, is_typed_to_reproduce),
        *(is_an_input_of_encodings, is_an_idea, splits_a_curve),
    },
    "OWN": {
        *(may_differ_in_a_record, is_named_by_a_record, is_typed_to_reproduce),
        *(is_refused_in_a_row, is_refused_in_the_base, is_an_idea, splits_a_curve),
    },
    "BACKUP": {may_differ_in_a_record, is_refused_in_a_row, is_refused_in_the_base},
    "SHARED": {is_refused_in_a_row},
    "SCORES": {is_refused_in_a_row, is_an_idea, splits_a_curve},
    "STRIDE": {is_a_stride, is_refused_in_the_base},
    "COMPILES": {compiles},
    "STORED": {compiles},
    "CODES": {is_a_column_of_encodings, is_an_input_of_encodings},
    "INPUT": {is_an_input_of_encodings},
    "BUDGET": {is_an_idea, splits_a_curve},
    "REPORT": {is_an_idea, splits_a_curve},
    "FREE": {is_an_idea, splits_a_curve},
    "BY_DEPTH": {splits_a_curve},
}


@pytest.mark.parametrize("trait", ["", *RESULTS])
def test_one_line_tells_every_tool_what_a_new_knob_is_for(trait, give, monkeypatch):
    """A trait changes the answers of its row of RESULTS, and no others."""
    monkeypatch.setattr(words, "from_caller", lambda path: f"caller/{path}")
    give(*filter(None, [trait]))
    assert knobs.known_knobs()["extra"] == knobs.Knob("float", frozenset(filter(None, [trait])))
    said = {question for question in ASKED if question()}
    assert said == WITHOUT ^ RESULTS.get(trait, set())


def test_a_sweep_that_goes_on_elsewhere_is_the_same_sweep():
    """Its paths may differ, and of the settings of its configurations no others."""
    assert knobs.with_trait("PATH") == ("out_dir", "data_path", "tokenizer_path", "resume")


def test_two_runs_of_a_sweep_are_one_configuration_whatever_they_are_called():
    """In what each run has of its own, only the seed counts."""

    def claim(**change: str) -> str:
        config = {"seed": "1", "run_id": "a", "out_dir": "logs", "matrix_lr": "0.1"}
        runs = [SimpleNamespace(config=config), SimpleNamespace(config=config | change)]
        return sweep_claims.claim_unique(SimpleNamespace(complete_runs=runs))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sweep_claims, "demand_own_name", lambda run: None)
        assert claim(seed="2") == claim(matrix_lr="0.2") == "2 different configurations"
        with pytest.raises(Wrong, match="b and a are one configuration"):
            claim(run_id="b", out_dir="elsewhere")


def test_a_trait_that_the_trainer_does_not_have_is_an_error():
    with pytest.raises(KeyError, match="SPELT"):
        knobs.with_trait("PATH", "SPELT")


def test_no_tool_keeps_a_list_of_knobs():
    """In tools/, no row of names holds more than three knobs."""
    names = set(knobs.known_knobs())
    for path in sorted((ROOT / "tools").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for row in re.findall(r'"\w+"(?:,\s+"\w+")+', text):
            found = [name for name in re.findall(r'"(\w+)"', row) if name in names]
            assert len(found) <= 3, f"{path}: {', '.join(found)}: give them a trait"
