"""The model's sections: their work, by hand and counted by torch; floors; every section runs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as t
from lab.model import floors, sections
from lab.model.floors import Rates
from lab.model.sections import BothWork, Section, Work
from tests.helpers import OTHER_PARTS
from tests.lab.lab_helpers import SECTIONS, a_session, sections_by_name

pytestmark = pytest.mark.usefixtures("quick_bench")


# ---- work ----------------------------------------------------------------------------------------


OPTIONAL = OTHER_PARTS | dict(loop_layers="1 2", parallel_last_n=2)


@pytest.mark.parametrize("knobs", [{}, OPTIONAL, OPTIONAL | dict(parallel_form="one_stream")], ids=str)
def test_the_sections_make_the_models_products(knobs):
    """Together they have the products of a forward, counted by torch, and twice as many in backward."""
    s = a_session(**knobs)

    def identity(q, k, v, window, documents):
        return q

    model = t.GPT(s.h, t.Ops(attend=identity))
    tokens = torch.zeros(2, s.h.train_seq_len, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        loss = model.loss(tokens, tokens)
    with FlopCounterMode(display=False) as backward:
        loss.backward()

    rows = [section for section in sections_by_name(s).values() if section.name != "attention"]
    assert sum(row.count * row.work.forward.flops for row in rows) == forward.get_total_flops()
    assert sum(row.count * row.work.backward.flops for row in rows) == backward.get_total_flops()


def test_work_by_hand():
    s = a_session()
    h = s.h
    N = 2 * h.train_seq_len
    found = sections_by_name(s)
    assert [section.name for section in found.values() if section.count] == SECTIONS
    assert [section.name for section in found.values() if not section.count] == ["attention block", "layer"]

    D = h.model_dim
    kv = h.kv_dim
    F = h.mlp_dim
    products = (N, D, F), (N, F, D)
    mlp = found["MLP"]
    assert mlp.work.forward == Work(
        4 * 2 * (N * D + D * F + N * F), tuple((2 * N * D * F, p) for p in products)
    )
    assert mlp.work.backward.moved == 4 * (3 * N * (D + F) + 4 * D * F)
    assert found["O product"].work.backward.moved == 4 * (3 * N * D + 2 * D * D)

    qk = found["QK norm + rope + gain"]
    both = N * (D + kv)
    assert qk.work.forward.moved == 4 * 2 * both
    assert qk.work.backward.moved == 4 * (3 * both + 2 * N * kv)  # v is a view, its gradient is copied
    assert found["XSA"].work.forward.moved == 4 * (2 * N * D + N * kv)
    assert found["XSA"].count == h.xsa_last_n

    pairs = h.train_seq_len**2 / 2  # of a query and a key that it sees
    attention = found["attention"]
    assert attention.work.forward.flops == 2 * (2 * 2 * h.num_heads * pairs * h.head_dim)
    assert attention.work.backward.flops == 2.5 * attention.work.forward.flops
    parts = ("QKV product", "attention", "O product", "MLP")
    assert found["layer"].work.forward.flops == sum(found[part].work.forward.flops for part in parts)
    assert found["skip adds"].count == h.num_layers // 2
    assert found["bank casts"].work.forward.moved == 0  # float32 to float32


def test_a_layer_is_counted_as_often_as_it_is_visited():
    found = sections_by_name(a_session(**OPTIONAL))
    visits = 8
    for name in ("QKV product", "O product", "MLP", "attention", "head gates"):
        assert found[name].count == visits, name
    assert found["skip adds"].count == visits // 2
    # Of layers 0 1 2 1 2 1 2 3 the last two are parallel: their streams are mixed at each of four visits.
    assert found["stream mix"].count == found["residual add + norm"].count == 4
    assert (
        found["bank casts"].work.backward.moved
        == sections_by_name(a_session())["bank casts"].work.backward.moved
    )
    assert not {"value embedding", "embedding + bigram + smear"} & found.keys()


def test_masked_attention_is_counted_by_window():
    """4 layers; documents of a quarter of 16 tokens; the first tokens see fewer keys than the window."""

    def pairs(**knobs):
        return {
            name.removeprefix("attention"): (section.count, section.work.forward.flops / (4 * 2 * 32))
            for name, section in sections_by_name(a_session(**knobs)).items()
            if name.startswith("attention") and section.count
        }

    assert pairs() == {"": (4, 128)}
    assert pairs(attn_windows="4 0 4") == {"": (1, 128), ", window 4": (3, 4 * 12 + 4 * 4 / 2)}
    assert pairs(doc_mask=1) == {"": (4, 4 * 4 * 4 / 2)}
    assert pairs(doc_mask=1, attn_windows="2") == {", window 2": (4, 4 * (2 * 2 + 2 * 2 / 2))}


@pytest.mark.parametrize("knobs", [{}, dict(attn_windows="4 0", doc_mask=1), OPTIONAL], ids=str)
def test_every_section_runs_forward_and_backward(knobs):
    s = a_session(**knobs)
    for section in sections_by_name(s).values():
        assert len(sections.time_section(s, section)) == 2
        leaves = sections.leaves_of(section, section.inputs())
        assert leaves or section.back, section.name


def test_every_compiled_section_compiles_whole():
    """In one graph, as on a GPU, with the masks of windows and documents."""
    torch.compiler.reset()  # one function may be recompiled only a few times
    s = a_session(attn_windows="4 0", doc_mask=1)
    found = [section for section in sections_by_name(s).values() if section.compiled]
    assert {"attention, window 4", "QK norm + rope + gain", "layer"} <= {section.name for section in found}
    for section in found:
        compiled = torch.compile(section.fn, backend="eager", dynamic=False, fullgraph=True)
        args = section.inputs()
        for ours, plain in zip(sections.as_list(compiled(*args)), sections.as_list(section.fn(*args))):
            torch.testing.assert_close(ours, plain)


# ---- floors --------------------------------------------------------------------------------------


def test_a_floor_is_the_larger_of_copy_and_products():
    rates = Rates(1000.0, {None: 10.0, (2, 3, 4): 5.0})
    assert floors.floor_of(Work(3e9), rates) == (3.0, "copy")
    work = Work(1e9, ((1e10, (2, 3, 4)), (2e10, None)))
    ms, bound = floors.floor_of(work, rates)
    assert bound == "product"
    assert math.isclose(ms, 1e10 / 5e12 * 1e3 + 2e10 / 10e12 * 1e3)

    section = Section("s", 4, None, None, work=BothWork(work, Work(1e9)))
    row = floors.section_row(section, "forward", 8.0, rates)
    assert (row["percent_of_floor"], row["total_ms"], row["floor_total_ms"]) == (50, 32, 16)
    assert (row["gbps"], row["tflops"], row["mb"], row["gflop"]) == (125, 3.75, 1000, 30)
    assert floors.section_row(section, "backward", 2.0, rates)["percent_of_floor"] == 50
