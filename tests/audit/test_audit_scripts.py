"""The scripts that the auditor takes: what it needs of them, and every record's own."""

import ast
import py_compile
import subprocess
import sys
from importlib.util import cache_from_source
from pathlib import Path
from types import SimpleNamespace

import pytest

import audit
import older_scripts
import train_gpt as t
from auditor.subject import plan_scores
from older_scripts import missing_names
from tests.audit.audit_cases import KNOBS, audit_args, by_auditor, changed_script
from tests.helpers import ROOT, as_arguments


def refused(capsys, *args):
    """Return the one line with which the auditor refuses these arguments; status 2."""
    capsys.readouterr()
    assert audit.main([str(argument) for argument in args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("audit.py: "), (out, err)
    return err


@pytest.mark.parametrize("name", ["score_targets", "load_run", "learning"])
def test_a_script_that_lacks_a_name_is_refused_in_one_line(name, honest, tmp_path, capsys):
    script = changed_script(tmp_path, f"\ndef {name}(", f"\ndef old_{name}(")
    args = audit_args(honest, tmp_path)
    err = refused(capsys, args[1], "--script", script, *args[2:])
    assert f"{script}: this script has no {name}, which audit needs" in err
    assert not (tmp_path / "logs").exists()


def test_the_stride_of_the_score_that_counts_is_audited(honest, monkeypatch):
    """Not that of eval_stride, if a script has a second sliding score."""
    rows = [t.Metric("chunked", "roundtrip", honest.h.eval_seq_len), t.Metric("finer", "finer", 3)]
    monkeypatch.setattr(t, "metrics_of", lambda h: rows)
    assert honest.h.eval_stride != 3
    assert plan_scores(t, honest.run, 0).stride == 3


def without_member(kind, member):
    """Return an object that has the names of a class but for one method or dataclass field."""
    all_fields = vars(kind).get("__dataclass_fields__", {})
    members = {name: None for name in [*vars(kind), *all_fields] if name != member}
    fields = {name: field for name, field in all_fields.items() if name != member}
    return SimpleNamespace(**(members | {"__dataclass_fields__": fields}))


def test_every_need_is_checked():
    """A script that lacks one function, method or field, or one class with its members, lacks just that."""
    needs = audit.NEEDS + audit.TTT_NEEDS
    assert missing_names(t, needs) == []
    owners = {name: name.partition(".")[0] for name in needs}
    complete = {owner: getattr(t, owner) for owner in owners.values()}
    for name in needs:
        owner, _, member = name.partition(".")
        if member:
            script = complete | {owner: without_member(complete[owner], member)}
            lacking = [name]
        else:
            script = {other: value for other, value in complete.items() if other != owner}
            lacking = [other for other in needs if owners[other] == owner]
        assert missing_names(SimpleNamespace(**script), needs) == lacking


def imports_from(module, tree):
    """Return what a program imports from a module: the aliases of the syntax tree."""
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [alias for node in statements if node.module == module for alias in node.names]


def test_needs_are_what_the_auditor_reaches():
    """They are every script.NAME in the auditor's files, and every CLASS.NAME of the objects used there."""
    tools = Path(audit.__file__).parent
    texts = [
        path.read_text(encoding="utf-8") for path in [tools / "audit.py", *(tools / "auditor").glob("*.py")]
    ]
    tree = ast.parse("\n".join(text.replace("from __future__ import annotations", "") for text in texts))
    bridges = ast.parse(Path(older_scripts.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for alias in imports_from("older_scripts", tree)}
    tree.body += [node for node in bridges.body if getattr(node, "name", "") in imported]
    reached = set()
    class_of = {"run": "Run", "dataset": "Dataset", "counts": "ByteCounts", "model": "GPT", "small": "GPT"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", None)
        if owner == "script" and not node.attr.startswith("__"):
            reached.add(node.attr)
        if owner in class_of:
            reached.add(f"{class_of[owner]}.{node.attr}")
    optional = {
        *older_scripts.SCORING_NEEDS,
        *older_scripts.CODEC_NEEDS,
        *older_scripts.METRIC_NEEDS,
        *older_scripts.WINDOW_NEEDS,
        "document_groups",  # asked for only if a score has groups
    }
    assert reached == {*audit.NEEDS, *audit.TTT_NEEDS, *optional}


def test_other_scripts_are_refused_in_one_line(honest, tmp_path, capsys):
    artifact = audit_args(honest, tmp_path)[1]
    reasons = {
        "import no_such_module\n": "no_such_module",
        "x = (\n": "SyntaxError",
        "raise SystemExit(3)\n": "SystemExit",
        "x = 1\n": "has no InputError, Log",
    }
    for text, reason in reasons.items():
        (tmp_path / "other.py").write_text(text)
        assert reason in refused(capsys, artifact, "--script", tmp_path / "other.py"), text
    for path in (tmp_path, tmp_path / "missing.py"):
        assert f"{path}: cannot read the script" in refused(capsys, artifact, "--script", path)
    for args in ([], ["--script", t.__file__], ["data_path=x"], [artifact, "--script"]):
        assert "usage: audit.py ARTIFACT [--script PATH] [key=value ...]" in refused(capsys, *args)


def test_bytecode_beside_the_script_is_not_trusted(tmp_path):
    """The text that the log shows is what runs, and not a planted .pyc that python would run."""
    script = changed_script(tmp_path, 'MAGIC = b"GPT6"', 'MAGIC = b"TEXT"')
    evil = tmp_path / "evil.py"
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    evil.write_text(Path(script).read_text().replace('b"TEXT"', 'b"EVIL"'))
    py_compile.compile(str(evil), cfile=cache_from_source(script), invalidation_mode=mode)
    command = [sys.executable, "-c", "import train_gpt; print(train_gpt.MAGIC)"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "EVIL" in found.stdout, "the planted file has no effect"
    assert audit.load_audited(Path(script)).MAGIC == b"TEXT"


RECORDS = sorted((ROOT / "records").glob("track_*/*/train_gpt.py"))
OF_SCRIPT = {path.read_bytes(): path for path in reversed(RECORDS)}  # many records share one script
NEWEST, *OLDER, OLDEST = sorted(OF_SCRIPT.values(), key=lambda path: path.parent.name, reverse=True)
SCRIPTS = [NEWEST, *(pytest.param(path, marks=pytest.mark.long) for path in OLDER), OLDEST]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.parent.name)
def test_every_record_can_be_audited(script, honest, tmp_path, capsys):
    """Train an artifact with the record's script, and audit it with that script."""
    before = sorted(script.parent.rglob("*"))
    knobs = KNOBS | dict(
        data_path=honest.h.data_path, vocab_size=honest.h.vocab_size, out_dir=tmp_path, run_id="own"
    )
    known = script.read_text(encoding="utf-8")  # a knob or a preset may be younger than the record
    knobs = {key: value for key, value in knobs.items() if f"\n    {key}: " in known}
    if knobs["preset"] not in known:
        del knobs["preset"]
    assert audit.load_audited(script).main(["train", *as_arguments(knobs)]) == 0
    own = SimpleNamespace(blob=(tmp_path / "own.int6.xz").read_bytes(), h=honest.h)
    assert by_auditor(audit_args(own, tmp_path), str(script)) == 0
    assert "audit 9 of 9 tests passed" in capsys.readouterr().out
    assert sorted(script.parent.rglob("*")) == before, "the audit left something in the record's folder"
