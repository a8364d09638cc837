"""Config: which source of a value wins, what is refused, and how a refusal looks."""

import dataclasses
import os
import subprocess
import sys

import pytest

import train_gpt as t
from helpers import ROOT, TINY, english_args, english_dataset, stop_one_line

FIELDS = {f.name: f for f in dataclasses.fields(t.Config)}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """No knob of the caller's environment reaches a test."""
    for name in (*FIELDS, "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name.upper(), raising=False)


def test_each_source_beats_the_one_before():
    assert t.load_config([], {}).train_log_every == FIELDS["train_log_every"].default
    assert t.load_config(["preset=cpu"], {}).train_log_every == t.PRESETS["cpu"]["train_log_every"] == 25
    env = {"TRAIN_LOG_EVERY": "7", "PRESET": "cpu"}
    h = t.load_config([], env)
    assert (h.train_log_every, h.preset, h.num_layers) == (7, "cpu", t.PRESETS["cpu"]["num_layers"])
    assert t.load_config(["train_log_every=3"], env).train_log_every == 3
    assert t.load_config(["train_log_every=3", "train_log_every=4"], env).train_log_every == 4
    assert t.load_config(["preset=record"], env).num_layers == FIELDS["num_layers"].default


def test_the_environment_counts_in_upper_case_only():
    assert t.load_config([], {"seed": "5", "Seed": "6"}) == t.Config()
    assert t.load_config([], {"SEED": "5", "PATH": "/bin", "NOT_A_KNOB": "x"}).seed == 5


def test_every_preset_is_valid_and_names_itself():
    for name, values in t.PRESETS.items():
        h = t.load_config([f"preset={name}"], {})
        assert h.preset == name and set(values) <= set(FIELDS)
        assert {k: getattr(h, k) for k in values} == values


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("source", ["argument", "environment"])
def test_every_field_is_settable_from_text(name, source, monkeypatch):
    """...takes the field's own type, and changes no other field."""
    monkeypatch.setattr(t, "check_ranges", lambda h: None)
    monkeypatch.setattr(t, "check_relations", lambda h: None)
    default = FIELDS[name].default
    text, value = {
        "preset": ("cpu", "cpu"), "fit_cap": ("false", False),
        "cautious_wd": ("true", True), "doc_mask": ("true", True), "deterministic": ("1", True),
        "fp8": ("0", False),
    }.get(name) or {int: ("977", 977), float: ("2.5e-3", 0.0025), str: ("a=b c", "a=b c")}[type(default)]  # fmt: skip
    h = (
        t.load_config([f"{name}={text}"], {})
        if source == "argument"
        else t.load_config([], {name.upper(): text})
    )
    got = getattr(h, name)
    assert got == value and type(got) is type(default) and got != default
    expected = dataclasses.asdict(t.Config()) | (t.PRESETS["cpu"] if name == "preset" else {}) | {name: value}
    assert dataclasses.asdict(h) == expected


@pytest.mark.parametrize(
    "text,value", [("1", True), ("true", True), ("True", True), ("0", False), ("FALSE", False)]
)
def test_spellings_of_a_flag(text, value):
    assert t.load_config([f"fit_cap={text}"], {}).fit_cap is value


@pytest.mark.parametrize(
    "arg,words",
    [
        ("momentum=0.9", ["'momentum'", "muon_momentum"]),  # part of a name
        ("muon_momentum_end=1", ["'muon_momentum_end'", "muon_momentum"]),  # longer than a name
        ("SEED=1", ["'SEED'", "seed"]),  # the environment's spelling
        ("--seed=1", ["'--seed'", "seed"]),
        ("zzz=1", ["'zzz'", "config"]),  # nothing close: where the names are
    ],
)
def test_an_unknown_key_is_named_with_a_hint(arg, words):
    with pytest.raises(t.InputError) as e:
        t.load_config([arg], {})
    message = str(e.value)
    key = words[0]
    assert "\n" not in message and key in message
    assert words[1] in message.replace(key, "", 1), message


@pytest.mark.parametrize(
    "arg,names",
    [
        ("seed=1.5", ["seed", "1.5", "int"]),
        ("seed=", ["seed", "int"]),
        ("matrix_lr=fast", ["matrix_lr", "fast", "float"]),
        ("fit_cap=2", ["fit_cap", "2", "bool"]),
        ("preset=laptop", ["preset", "laptop", "h100x1", "cpu"]),
        ("ortho=svd", ["ortho", "svd", "ns5"]),
        ("step_rule=sgd", ["step_rule", "sgd", "muon"]),
        ("artifact_weights=best", ["artifact_weights", "best", "ema", "live"]),
        ("seed", ["seed", "key=value"]),
        ("num_layers=0", ["num_layers"]),
        ("train_seq_len=-2048", ["train_seq_len"]),
        ("train_log_every=0", ["train_log_every"]),
        ("micro_batch_tokens=100000", ["micro_batch_tokens"]),
        ("train_seq_len=1000", ["train_seq_len"]),
        ("eval_batch_tokens=2049", ["eval_batch_tokens"]),
        ("eval_stride=4096", ["eval_stride"]),
        ("num_heads=7", ["num_heads"]),
        ("num_kv_heads=3", ["num_kv_heads"]),
        ("rope_dims=3", ["rope_dims"]),
        ("rope_dims=130", ["rope_dims"]),
        ("xsa_last_n=12", ["xsa_last_n"]),
        ("ve_last_n=0", ["ve_last_n"]),
        ("ve_last_n=12", ["ve_last_n"]),
        ("bigram_vocab_size=1", ["bigram_vocab_size"]),
        ("vocab_size=65537", ["vocab_size"]),
        ("ema_frac=0", ["ema_frac"]),
        ("warmdown_frac=0", ["warmdown_frac"]),
        ("warmdown_frac=1.5", ["warmdown_frac"]),
        ("attn_windows=512,0", ["attn_windows='512,0'", "512 512 0"]),
        ("attn_windows=512 -1", ["attn_windows='512 -1'", "whole numbers"]),
        ("attn_windows=1e3", ["attn_windows='1e3'"]),
        ("attn_windows=0 1000000000", ["attn_windows", "999999999"]),  # beyond the operator's int32
    ],
)
def test_a_bad_value_is_named(arg, names, capsys):
    with pytest.raises(t.InputError) as e:
        t.load_config([arg], {})
    assert all(n in str(e.value) for n in names) and "\n" not in str(e.value)
    err = stop_one_line(["config", arg], capsys)
    assert err == f"train_gpt.py: {e.value}\n"


# Values that no rule above names, and that would otherwise end in a traceback or in silent nonsense.
@pytest.mark.parametrize(
    "arg",
    [
        "eval_batch_tokens=0",  # no window fits into a batch
        "eval_batch_tokens=-2048",
        "seed=-1",  # numpy's generator takes none
        "rope_dims=-2",
        "mlp_mult=0",
        "mlp_mult=-1",
        "mlp_mult=nan",
        "logit_softcap=0",  # 0 * tanh(x / 0)
        "val_tokens=-5",  # would cut the end of the split off
        "warmup_steps=-1",
        "matrix_lr=nan",
        "max_wallclock_seconds=nan",
    ],
)
def test_values_that_cannot_work_are_refused(arg):
    with pytest.raises(t.InputError):
        t.load_config([arg], {})


@pytest.mark.parametrize("key", ["SEED", "PRESET", "ORTHO", "FIT_CAP"])
def test_a_bad_value_in_the_environment_is_refused_like_an_argument(key, monkeypatch, capsys):
    monkeypatch.setenv(key, "never")
    assert key.lower() in stop_one_line(["config"], capsys)


def test_config_command_prints_every_knob_as_resolved(capsys, monkeypatch):
    monkeypatch.setenv("NUM_LAYERS", "5")
    assert t.main(["config", "preset=cpu", "seed=3"]) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    h = t.load_config(["preset=cpu", "seed=3", "num_layers=5"], {})
    assert printed == {k: str(v) for k, v in dataclasses.asdict(h).items()}


@pytest.mark.parametrize("argv", [["-h"], ["--help"]])
def test_help_shows_the_docstring(argv, capsys):
    assert t.main(argv) == 0
    assert "Contents" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv,words",
    [
        (["frobnicate"], ["frobnicate", "usage"]),
        (["frobnicate", "seed=1"], ["frobnicate", "usage"]),
        (["eval"], ["eval", "ARTIFACT"]),
        (["eval", "seed=1"], ["eval", "ARTIFACT"]),
        (["train", "seed"], ["seed", "key=value"]),
        (["bench", "sead=1"], ["sead"]),
        (["no_such_knob=1"], ["no_such_knob"]),
        (["data_path=/nowhere/at/all"], ["/nowhere/at/all", "data_path"]),
        (["train", "preset=cpu", "data_path=/nowhere/at/all"], ["/nowhere/at/all"]),
        (["eval", "/nowhere/model.xz", "data_path=/nowhere/at/all"], ["/nowhere/model.xz"]),
        (["eval", "/nowhere/model.xz", "num_layers=3"], ["num_layers", "artifact"]),
    ],
)
def test_bad_commands_are_one_line_and_status_2(argv, words, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    err = stop_one_line(argv, capfd)
    assert all(w in err for w in words), err
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_world_size_must_cut_the_batch():
    with pytest.raises(t.InputError, match="WORLD_SIZE=3 .*train_batch_tokens"):
        t.init_machine(
            t.load_config([f"{k}={v}" for k, v in TINY.items()], {}), {"WORLD_SIZE": "3", "RANK": "0"}
        )
    assert not t.dist.is_initialized()


@pytest.mark.parametrize(
    "argv,word",
    [
        (["warp=9"], "warp"),
        (["eval", "/nowhere/model.xz", "data_path={data}"], "/nowhere/model.xz"),
        ([*english_args(), "out_dir={file}/below"], "below"),
    ],
    ids=["key", "artifact", "out_dir"],
)
def test_as_a_program(argv, word, tmp_path):
    """Status and stderr as a shell sees them."""
    file = tmp_path / "file"
    file.write_text("x")
    argv = [a.format(data=english_dataset().path, file=file) for a in argv]
    env = {k: v for k, v in os.environ.items() if k.lower() not in FIELDS}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py"), *argv],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("train_gpt.py: ") and done.stderr.count("\n") == 1 and word in done.stderr


@pytest.mark.parametrize("env", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two", "RANK": "0"}, {"WORLD_SIZE": "0", "RANK": "0"},
                                 {"LOCAL_WORLD_SIZE": "x"}, {"LOCAL_WORLD_SIZE": "0"}, {"LOCAL_RANK": "-"}], ids=str)  # fmt: skip
def test_half_a_torchrun_environment(env, monkeypatch, capsys, tmp_path):
    """A stray WORLD_SIZE without a RANK is one process, or one line; never a hang or a traceback."""
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    try:
        argv = english_args(iterations=1, warmup_steps=0, out_dir=tmp_path, run_id="x")
        status = t.main(argv)
    finally:
        if t.dist.is_initialized():
            t.dist.destroy_process_group()
    err = capsys.readouterr().err
    assert status == 0 or (status == 2 and err.count("\n") == 1), err
