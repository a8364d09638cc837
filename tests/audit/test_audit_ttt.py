"""The auditor passes an honest score that learns from the text, and finds those that learn otherwise."""

from typing import NamedTuple

import pytest

from tests.audit.audit_cases import audit_args, by_auditor, changed_script
from tests.helpers import ROOT

pytestmark = pytest.mark.usefixtures("clean_environment")


AUDITED = ["ttt_lr=0.2", "ttt_chunk_tokens=64", "ttt_passes=1"]
LESSON = "lesson = Windows(start=begin, end=begin + seq_len, score_from=begin)"


class Cheat(NamedTuple):
    """The tests that must fail, the text of the trainer that is replaced, and the text that replaces it."""

    must: set[str]
    old: str
    new: str


CHEATS = {
    "learned before it is scored": Cheat(
        {"T1", "T3"},
        LESSON,
        f"begin = begin + min(chunk_tokens * (len(begin) > 0), total - chunk_start); {LESSON}",
    ),
    "one token too many": Cheat({"T3"}, LESSON, f"begin = begin + (len(begin) > 0); {LESSON}"),
    "weights are not put back": Cheat({"T1", "T3", "T7"}, "torch._foreach_copy_(weights, saved)", "pass"),
    "nothing is learned": Cheat({"T3"}, "alpha=-rate)", "alpha=-0.0)"),
    "a chunk is left out": Cheat({"T4"}, "pairwise(bounds)", "[*pairwise(bounds)][:2]"),
}
AUDITED_LORA = ["ttt_form=lora", "ttt_lr=0.05", "ttt_chunk_tokens=16", "ttt_passes=1"]
LORA_LESSON = "all_lessons.put((later, slot), windows.part(slice(0, -1)))"
LORA_CHEATS = {
    "learned before it is scored": Cheat({"T1", "T3"}, LORA_LESSON, "all_lessons.put((span, slot), windows)"),
    "one token too many": Cheat(
        {"T3"},
        LORA_LESSON,
        "all_lessons.put((later, slot), [part[:-1] + (part is not windows.start) for part in windows])",
    ),
    "nothing is learned": Cheat({"T3"}, "factors.sub_(h.ttt_lr", "factors.sub_(0.0"),
    "the weights change and are not put back": Cheat(
        {"T1", "T3", "T7"},
        "return changed_nats_fn",
        "model.tok_emb.data.mul_(1.001); return changed_nats_fn",
    ),
    "a chunk is left out": Cheat(
        {"T4"},
        "all_windows.put((span, slot), windows)",
        "all_windows.put((slice(*span.indices(span.start + 2)), slot), windows.part(slice(0, 2)))",
    ),
    "a document's end decides where its windows begin": Cheat(
        {"T1"},
        "start = np.maximum(chunk_end - scoring.seq_len, begin)",
        "start = np.maximum(np.minimum(chunk_end, end) - scoring.seq_len, begin)",
    ),
}


class Audited(NamedTuple):
    """The verdicts of the auditor on a script."""

    status: int
    fails: set[str]  # tests, T1 to T9
    lines: list[str]  # one for each test


def audited(honest, folder, script, capsys, knobs=AUDITED):
    """Audit the honest artifact, scored with learning by a script."""
    status = by_auditor([*audit_args(honest, folder), *knobs], str(script))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("audit T")]
    fails = {line.split()[1] for line in lines if "FAIL" in line}
    return Audited(status, fails, lines)


@pytest.mark.parametrize("knobs", [AUDITED, AUDITED_LORA], ids=["sgd", "lora"])
def test_the_audit_passes_an_honest_score_that_learns(knobs, honest, tmp_path, capsys):
    result = audited(honest, tmp_path, ROOT / "train_gpt.py", capsys, knobs)
    assert result.status == 0 and not result.fails, result.lines
    evidence = "2 after learning, 0 tokens learned before they are scored, 0 earlier scores moved"
    assert evidence in result.lines[2]


@pytest.mark.parametrize("name", CHEATS)
def test_the_audit_catches_a_cheat(name, honest, tmp_path, capsys):
    cheat = CHEATS[name]
    script = changed_script(tmp_path / "x", cheat.old, cheat.new)
    result = audited(honest, tmp_path, script, capsys)
    assert result.status == 1 and cheat.must <= result.fails, result.lines
    assert not {"T2", "T5"} & result.fails, result.lines


FIRST_CHEAT, *MORE_CHEATS = LORA_CHEATS


@pytest.mark.parametrize(
    "name", [FIRST_CHEAT, *(pytest.param(n, marks=pytest.mark.long) for n in MORE_CHEATS)]
)
def test_the_audit_catches_a_cheat_with_documents(name, honest, tmp_path, capsys):
    cheat = LORA_CHEATS[name]
    script = changed_script(tmp_path / "x", cheat.old, cheat.new)
    result = audited(honest, tmp_path, script, capsys, AUDITED_LORA)
    assert result.status == 1 and cheat.must <= result.fails, result.lines
    assert not {"T2", "T5"} & result.fails, result.lines


@pytest.mark.parametrize(
    "knobs",
    [["ttt_chunk_tokens=32768"], ["ttt_form=lora", "eval_seq_len=256", "ttt_chunk_tokens=256"]],
    ids=["split", "document"],
)
def test_the_audit_needs_three_chunks(knobs, honest, tmp_path, capsys):
    args = [*audit_args(honest, tmp_path), "ttt_lr=0.2", *knobs]
    assert by_auditor(args, str(ROOT / "train_gpt.py")) == 2
    err = capsys.readouterr().err
    assert f"{knobs[-1]}: " in err and err.count("\n") == 1
