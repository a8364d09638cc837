"""The auditor passes an honest run."""

import dataclasses

import numpy as np

import train_gpt as t
from tests.audit.audit_cases import audited, config, fresh, trained
from tests.helpers import OTHER_PARTS
from tests.rank_cases import group_of_one


def test_the_run_has_learned(honest, group):
    """Otherwise, a fault in the scorer would change nothing."""
    start = t.GPT(honest.h)
    for name in ("tok_emb", "qo_bank", "mlp_down_bank", "bigram_emb", "smear_gate"):
        moved = getattr(honest.run.model, name) - getattr(start, name)
        assert moved.abs().max() > 1e-3, name
    score = fresh(honest.run).score("val", honest.h.eval_stride)
    assert score.loss < 0.85 * np.log(honest.h.vocab_size)  # measured: 0.29


def test_nine_tests_pass_on_an_honest_run(honest, group):
    m = dataclasses.replace(honest.run.m, signals=t.Signals())
    fails, verdicts = audited(dataclasses.replace(fresh(honest.run), m=m), honest.blob)
    assert m.signals == t.Signals()  # a signal during the auditor's own training leaves at once
    assert not fails, verdicts
    assert [v.test[:2] for v in verdicts] == [f"T{i}" for i in range(1, 10)]
    assert all(v.evidence for v in verdicts)
    assert "manifest agrees" in verdicts[3].evidence
    assert not verdicts[4].evidence.startswith("0 documents")
    assert " of 0 " not in verdicts[5].evidence and " 0 13-word" not in verdicts[5].evidence


def test_nine_tests_pass_on_a_model_with_every_optional_part(honest):
    run, blob = trained(
        config(honest.h.data_path, vocab_size=honest.h.vocab_size, iterations=6, **OTHER_PARTS)
    )
    with group_of_one():
        fails, verdicts = audited(run, blob)
    assert not fails, verdicts
