"""The auditor's command: its verdicts, its progress, whose code it runs, several ranks."""

import dataclasses
import hashlib
import io
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import audit
import train_gpt as t
from auditor.subject import Verdict, make_audit
from progress import Progress
from tests.audit.audit_cases import audit_args, by_auditor, changed_script, fresh, write_dataset
from tests.helpers import ROOT, stop_one_line
from tests.rank_cases import run_ranks


def test_the_command_passes_an_honest_artifact(honest, tmp_path, capfd):
    assert t.main(audit_args(honest, tmp_path)) == 0
    out = capfd.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("audit ")]
    assert len(lines) == 10 and lines[-1] == "audit 9 of 9 tests passed"
    assert "FAIL" not in out
    assert all(line.startswith(f"audit T{i} ") for i, line in enumerate(lines[:9], 1))
    log = (tmp_path / "logs" / "audited.txt").read_text().splitlines()
    assert lines == [line for line in log if line in lines]


PLAIN = dict(ttt_lr=0.0)
SGD = dict(ttt_lr=0.2, ttt_chunk_tokens=64, ttt_passes=1)
LORA = dict(ttt_lr=0.05, ttt_chunk_tokens=16, ttt_passes=1, ttt_form="lora")


@pytest.mark.parametrize("knobs", [PLAIN, SGD, LORA], ids=["plain", "sgd", "lora"])
def test_every_test_knows_its_work(knobs, honest, group):
    """Each expects as many scores, passes, ... as it does, or its ETA would be wrong."""
    h = dataclasses.replace(honest.h, **knobs)
    subject = make_audit(t, fresh(honest.run, h=h), honest.blob)
    stages = []

    class Counting(Progress):
        def expect(self, total, unit):
            if stages:
                stages[-1] = (*stages[-1][:3], self.counted)
            stages.append((self.work, total, unit, 0))
            self.counted = 0
            super().expect(total, unit)

        def advance(self, count=1):
            self.counted += count
            super().advance(count)

    progress = Counting("auditing")
    subject = dataclasses.replace(subject, progress=progress)
    for number, test in enumerate(audit.AUDIT, 1):
        progress.begin(f"T{number}")
        test(subject)
    progress.expect(0, "")
    known = [stage for stage in stages if stage[1]]
    assert {test for test, *_ in known} == {f"T{number}" for number in range(1, 10)}
    for test, total, unit, done in known:
        rounded = unit == "targets"  # windows are padded
        assert done == total or (rounded and total <= done < 2 * total), (test, total, unit, done)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("live", [False, True], ids=["pipe", "terminal"])
def test_a_long_test_says_how_far_it_is(live, honest, tmp_path, monkeypatch, capsys):
    """Before its first part is done it tells the seconds, then also an ETA."""

    def slow(subject):
        subject.progress.expect(4, "parts")
        for _ in range(3):
            time.sleep(0.15)
            subject.progress.advance()
        return Verdict("T1 slow", True, "done")

    monkeypatch.setattr(audit, "AUDIT", (slow,))
    monkeypatch.setattr("progress.TICK_SECONDS", 0.01)
    monkeypatch.setattr("progress.LINE_SECONDS", 0.0)
    screen = Terminal() if live else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    assert by_auditor(audit_args(honest, tmp_path), t.__file__) == 0
    out = capsys.readouterr().out
    told = screen.getvalue() if live else out
    for done, eta in ((0, ""), (1, ", ETA 0 s"), (2, ", ETA 0 s")):
        assert f"auditing T1: 0 s, {done}/4 parts{eta}" in told, told
    assert ("auditing T1" in out) == (not live)
    assert "audit T1 slow: ok (done) [" in out


def test_the_command_names_a_leak(honest, tmp_path, capfd):
    train = [[honest.val[3], *honest.train[0]], honest.train[1]]
    data = write_dataset(tmp_path / "data", honest.model, train, honest.val)
    assert t.main(audit_args(honest, tmp_path, data)) == 1
    out = capfd.readouterr().out
    assert "audit T6 leak: FAIL (1 of " in out and "audit 8 of 9 tests passed" in out
    assert out.count("FAIL") == 1


@pytest.mark.parametrize("old", ["text that is not in the trainer", "import torch"])
def test_a_fault_is_planted_once_or_refused(old, tmp_path):
    with pytest.raises(AssertionError, match=r"occurs \d+ times in train_gpt.py, not once"):
        changed_script(tmp_path, old, "pass")


# Text of the trainer, and the same with a fault before it: an embedding that holds some of the next token's.
LOOKS_AHEAD = (
    "\n# 24. Commands",
    """
real_embed = GPT.embed
GPT.embed = lambda self, x: real_embed(self, x) + 0.1 * F.embedding(F.pad(x[:, 1:], (0, 1)), self.tok_emb)
# 23. Commands""",
)


def test_the_audited_code_is_the_code_that_scores(honest, tmp_path, capsys):
    """A fault in the script's GPT is found, though the repository's own GPT has none."""
    script = changed_script(tmp_path, *LOOKS_AHEAD)
    assert by_auditor(audit_args(honest, tmp_path), script) == 1
    out = capsys.readouterr().out
    assert "audit T1 causality: FAIL" in out and out.count("FAIL") <= 2
    digest = hashlib.sha256(Path(script).read_bytes()).hexdigest()
    assert f"auditing {script} sha256:{digest[:16]} with " in out


def test_a_record_folder_audits_its_own_script(honest, tmp_path, capsys):
    """So does the auditor, for an artifact inside the folder, and so does the script's audit command."""
    folder = tmp_path / "records" / "track_cpu" / "2026-01-01_Ahead"
    script = changed_script(folder, *LOOKS_AHEAD)
    (folder / "submission.json").write_text("{}")
    (folder / "logs").mkdir()
    args = audit_args(honest, folder / "logs")
    assert str(audit.default_script(args[1])) == script
    assert audit.default_script(tmp_path / "x.int6.xz") == ROOT / "train_gpt.py"
    assert audit.main(args[1:]) == 1
    assert "audit T1 causality: FAIL" in capsys.readouterr().out
    tools = tmp_path / "tools"  # the repository's, above the folder
    tools.mkdir()
    for name in ("audit.py", "older_scripts.py", "progress.py", "script.py"):
        shutil.copy(ROOT / "tools" / name, tools / name)
    shutil.copytree(ROOT / "tools" / "auditor", tools / "auditor")
    command = [sys.executable, script, *audit_args(honest, tmp_path)]  # of an artifact that lies elsewhere
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 1 and done.stderr == "", done
    assert "audit T1 causality: FAIL" in done.stdout and "of 9 tests passed" in done.stdout
    assert f"auditing {script} " in done.stdout
    deciding = [*sorted((tools / "auditor").glob("*.py")), tools / "older_scripts.py"]
    assert f" with {audit.fingerprint(str(tools / 'audit.py'), deciding)}\n" in done.stdout


def test_a_script_without_the_auditor_says_where_it_is(honest, tmp_path):
    script = shutil.copy(t.__file__, tmp_path / "train_gpt.py")
    args = audit_args(honest, tmp_path)
    done = subprocess.run(
        [sys.executable, script, *args], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done
    assert f"./run.sh audit {args[1]} --script {script} KEY=VALUE" in done.stderr
    assert not (tmp_path / "logs").exists()


def audit_rank(rank, args):
    return t.main(args)


def test_two_ranks_audit_together(honest, tmp_path):
    assert run_ranks(audit_rank, 2, audit_args(honest, tmp_path)) == [0, 0]
    lines = (tmp_path / "logs" / "audited.txt").read_text().splitlines()
    verdicts = [line for line in lines if line.startswith("audit ")]
    assert verdicts[-1] == "audit 9 of 9 tests passed" and len(verdicts) == 10


def test_the_status_of_the_command_is_the_auditors(tmp_path, capfd):
    err = stop_one_line(["audit", str(tmp_path / "missing.xz")], capfd)
    assert err.startswith("audit.py: ") and "missing.xz" in err
    argv = list(sys.argv)
    assert t.main(["audit", "--help"]) == 0 and sys.argv == argv
    assert "tools/audit.py ARTIFACT [--script PATH]" in capfd.readouterr().out
