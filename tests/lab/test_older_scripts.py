"""What older scripts lack: each bridge suits the script that it is given, and no tool has another way."""

import ast
import contextlib
from types import SimpleNamespace

import pytest
import torch

import older_scripts
import train_gpt as t
from tests.helpers import ROOT, tiny

TOOLS = ROOT / "tools"


def names(**values):
    """Return an object with these names, as an older script or one of its objects."""
    return SimpleNamespace(**values)


def test_a_setting_that_a_config_lacks_is_off():
    assert older_scripts.setting(tiny(attn_gate_dims=4), "attn_gate_dims") == 4
    assert older_scripts.setting(names(), "attn_gate_dims") == 0
    for key in older_scripts.BEFORE_KNOBS:
        assert hasattr(tiny(), key), key
    with pytest.raises(KeyError):
        older_scripts.setting(names(), "num_layers")


@pytest.mark.parametrize("stored_as, is_matrix", [("int6", True), ("f16", False)])
def test_a_matrix_is_known_by_its_codes_where_a_script_has_no_list(stored_as, is_matrix):
    assert older_scripts.is_matrix(names(), names(stored_as=stored_as)) == is_matrix
    assert older_scripts.is_matrix(names(), names(kind=stored_as)) == is_matrix
    script = names(MULTIPLIED=("a",))
    found = [older_scripts.is_matrix(script, names(name=name, stored_as=stored_as)) for name in "ab"]
    assert found == [True, False]
    specs = [names(stored_as=stored_as, multiplies=multiplies) for multiplies in (True, False)]
    assert [older_scripts.is_matrix(names(), spec) for spec in specs] == [True, False]


def test_a_shape_is_found_in_rows_of_both_kinds():
    table = t.parameter_table(tiny())
    plain = {name: tuple(row) for name, row in table.items()}
    for name, row in table.items():
        assert older_scripts.shape_of(table, name) == older_scripts.shape_of(plain, name) == row.shape


def test_a_layer_is_serial_unless_its_form_says_otherwise():
    specs = [names(), names(form="serial"), names(form="one_stream")]
    assert [older_scripts.is_serial(spec) for spec in specs] == [True, True, False]


def test_the_layer_of_an_older_script_is_the_serial_one():
    """With the same parts, both ways of running a layer give the same numbers."""
    draw = torch.Generator().manual_seed(0)
    x, x0 = (torch.randn(2, 3, 8, generator=draw) for _ in range(2))
    fields = dict.fromkeys(t.LayerWeights._fields)
    fields |= dict(
        resid_mix=torch.randn(2, 8, generator=draw),
        up=torch.randn(16, 8, generator=draw),
        down=torch.randn(8, 16, generator=draw),
    )
    w = t.LayerWeights(**fields)
    older = names(residual_mix=t.residual_mix, rms_norm=t.rms_norm)

    def attention(x, w):
        return x.roll(1, dims=1)

    spec = names(form="serial")
    (stream,) = older_scripts.run_layer(t, spec, x, x0, w, attention, t.Ops())
    torch.testing.assert_close(older_scripts.run_layer(older, spec, x, x0, w, attention, t.Ops()), stream)
    assert not torch.equal(stream, x)


def test_the_reference_of_qk_is_known_where_a_script_has_one():
    assert older_scripts.is_reference_qk(t, t.qk_heads)
    assert not older_scripts.is_reference_qk(t, len)
    assert not older_scripts.is_reference_qk(names(), t.qk_heads)


def test_a_batch_is_cut_by_scripts_of_both_kinds():
    h = tiny()
    ours = older_scripts.micro_batches_of(t, h, 1)
    cut = t.cut_batch(h, 1)
    assert ours == (cut.accum, cut.sequences)
    older = names(cut_batch=lambda h, world_size: (cut.accum, cut.sequences))
    assert older_scripts.micro_batches_of(older, h, 1) == ours


def test_a_pass_takes_the_number_of_micro_batches_and_hides_it_from_an_older_script():
    ours = names(capture_pass=lambda loss_fn, optimizer: (lambda sequences, count: (sequences, count), ""))
    backward, failure = older_scripts.capture_pass(ours, None, None)
    assert (backward("tokens", 2), failure) == (("tokens", 2), "")

    older = names(capture_pass=lambda loss_fn, optimizer: (lambda sequences: sequences, "why"))
    backward, failure = older_scripts.capture_pass(older, None, None)
    assert (backward("tokens", 2), failure) == ("tokens", "why")
    assert backward("tokens") == "tokens"  # as its own train_step calls it


def test_the_shape_of_a_rules_state_is_in_its_row_or_in_a_table_apart():
    with_state = next(rule for rule, row in t.STEP_RULES.items() if row.state_shape is not None)
    assert older_scripts.state_shape_of(t, with_state) is t.STEP_RULES[with_state].state_shape
    assert older_scripts.state_shape_of(t, "muon") is None
    apart = names(STEP_RULES={"a": len, "b": len}, RULE_STATE={"a": max})
    assert [older_scripts.state_shape_of(apart, rule) for rule in "ab"] == [max, None]
    assert older_scripts.state_shape_of(names(STEP_RULES={"a": len}), "a") is None


def test_an_update_gets_its_matrices_one_by_one_where_a_script_wants_that():
    inputs = dict(W=1, g=2, momentum=3)

    def one_by_one(W, g, momentum, s, h, second=None): ...

    older = names(matrix_update=one_by_one, OwnedMatrices=None)  # some have the class and do not pass it
    assert older_scripts.matrices_of_update(older, inputs, 4) == inputs | {"second": 4}
    assert older_scripts.matrices_of_update(t, inputs, 4) == {"matrices": t.OwnedMatrices(1, 2, 3, 4)}


def test_bridges_of_a_run_and_its_machine():
    assert older_scripts.phase_timer(names(time_phase=1, timed=2)) == 1
    assert older_scripts.phase_timer(names(timed=2)) == 2

    log = names(on_terminal=True, live=True)
    older_scripts.silence_status(log)
    assert not log.on_terminal and not log.live

    script = names(meet=None)
    older_scripts.wait_for_no_rank(script)
    assert script.meet("ranks", {}) == {}
    script = names()
    older_scripts.wait_for_no_rank(script)
    assert not vars(script)

    assert older_scripts.saved_parts(names(parts=[({"a": 1}, {})])) == [({"a": 1}, {})]
    assert older_scripts.linger_seconds(t) == t.LINGER_S > older_scripts.linger_seconds(names()) == 0
    assert isinstance(older_scripts.guarded(names(), None), contextlib.nullcontext)


def test_a_score_of_documents_apart_is_known_by_its_groups_its_layout_or_its_bos_id():
    def scoring(**settings):
        return t.ScoreSettings(16, 4, 4, "x", None, **settings)

    apart = [scoring(groups=t.document_groups), names(layout="documents"), names(bos_id=0)]
    stream = [scoring(bos_id=0), names(layout="stream", bos_id=0), names(bos_id=-1), names()]
    assert all(older_scripts.learns_apart(t, settings) for settings in apart)
    assert not any(older_scripts.learns_apart(t, settings) for settings in stream)


# What may be absent for another reason: FILE: the object that is asked.
ELSEWHERE = {
    ("audit.py", "sys.flags"),
    ("lab/model/candidates.py", "module"),
    ("lab/shared/collectives.py", "dist"),
    ("lab/step/smi.py", "torch.cuda.get_device_properties(s.m.device)"),
    ("lab/training/planning.py", "resolve(trainer, where, {**base, **settings})"),
    ("use/transformers_files.py", "node"),
}


def test_no_tool_asks_a_script_by_itself_whether_it_has_something():
    """Neither by hasattr nor by a getattr with a default, in what loads scripts."""
    paths = [TOOLS / "audit.py"]
    for folder in ("auditor", "lab", "use"):
        paths += (TOOLS / folder).rglob("*.py")
    found = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3):
                    found.add((path.relative_to(TOOLS).as_posix(), ast.unparse(node.args[0])))
    assert found == ELSEWHERE
