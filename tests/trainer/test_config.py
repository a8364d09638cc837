"""Config: the order of its sources, the values it refuses, and the one line of a refusal."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest

import train_gpt as t
from tests.helpers import ROOT, TINY, as_arguments, english_args, english_dataset, stop_one_line

FIELDS = {f.name: f for f in dataclasses.fields(t.Config)}
SP1024 = "preset=record_sp1024"  # it has no loop, which would bound other knobs
KINDS = t.kinds_of_knobs()
SHARES = [key for key, kind in KINDS.items() if kind.most == 1]
DECAYS = [key for key, kind in KINDS.items() if kind.below == 1]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """Keep every knob of the caller's environment, and torchrun's variables, from a test."""
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
    assert t.load_config([], {"seed": "5", "Seed": "6"}) == t.load_config([], {})
    assert t.load_config([], {"SEED": "5", "PATH": "/bin", "NOT_A_KNOB": "x"}).seed == 5


def test_the_defaults_are_the_record():
    """Only knobs that the headers of older artifacts leave out may have another default than `record`."""
    record = t.load_config([], {})
    changed = {key for key, f in FIELDS.items() if getattr(record, key) != f.default}
    assert changed == set(t.PRESETS["record"]) <= set(t.CHANGED_KNOBS)


def test_every_preset_is_valid_and_names_itself():
    for name, values in t.PRESETS.items():
        h = t.load_config([f"preset={name}"], {})
        assert h.preset == name and set(values) <= set(FIELDS)
        assert {key: getattr(h, key) for key in values} == values


# A text for each knob and the value it stands for; never the default.
VALUES_BY_TYPE = {int: ("977", 977), float: ("2.5e-3", 0.0025), str: ("a=b c", "a=b c")}
VALUES_BY_NAME = {
    "preset": ("cpu", "cpu"),
    "fit_cap": ("false", False),
    "cautious_wd": ("true", True),
    "decay_follows_rate": ("1", True),
    "equalize_rows": ("0", False),
    "skip_gates": ("1", True),
    "norm_gains": ("1", True),
    "doc_mask": ("true", True),
    "deterministic": ("1", True),
    "bind_by_time": ("1", True),
    "gptq_embed": ("0", False),
    "column_steps": ("0", False),
    "row_steps": ("0", False),
    "trellis": ("1", True),
    "fp8": ("0", False),
    "depth": ("12", 12),
    "tokens_per_param": ("3", 3.0),
}
# The knobs that these values change in the defaults, besides themselves; None: test_depth.py has them.
CHANGED_WITH = {
    "preset": t.PRESETS["cpu"],
    "target_loss": {"max_wallclock_seconds": 0.0},
    "tokens_per_param": {"max_wallclock_seconds": 0.0, "iterations": 137},
    "depth": None,
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("source", ["argument", "environment"])
def test_every_field_is_settable_from_text(name, source, monkeypatch):
    """The value has the field's type; only CHANGED_WITH's change other fields, too."""
    for check in ("check_ranges", "check_choices", "check_relations"):
        monkeypatch.setattr(t, check, lambda h: None)
    monkeypatch.setitem(t.PRESETS, "bare", {})
    default = FIELDS[name].default
    text, value = VALUES_BY_NAME.get(name) or VALUES_BY_TYPE[type(default)]
    if source == "argument":
        h = t.load_config([f"{name}={text}"], {"PRESET": "bare"})
    else:
        h = t.load_config(["preset=bare"] if name != "preset" else [], {name.upper(): text})

    found = getattr(h, name)
    assert found == value
    assert type(found) is type(default)
    assert found != default
    others = CHANGED_WITH.get(name, {})
    if others is not None:
        unset = {"preset": "bare"}
        assert dataclasses.asdict(h) == dataclasses.asdict(t.Config()) | unset | others | {name: value}


@pytest.mark.parametrize(
    "text,value", [("1", True), ("true", True), ("True", True), ("0", False), ("FALSE", False)]
)
def test_spellings_of_a_flag(text, value):
    assert t.load_config([f"fit_cap={text}"], {}).fit_cap is value


@pytest.mark.parametrize(
    "argument,key,hint",
    [
        ("momentum=0.9", "'momentum'", "muon_momentum"),  # part of a name
        ("muon_momentum_end=1", "'muon_momentum_end'", "muon_momentum"),  # longer than a name
        ("SEED=1", "'SEED'", "seed"),  # the environment's spelling
        ("--seed=1", "'--seed'", "seed"),
        ("embd_lr=1", "'embd_lr'", "did you mean embed_lr"),  # a letter is missing
        ("num_layer=1", "'num_layer'", "did you mean num_layers"),
        ("lr=1", "'lr'", "matrix_lr, embed_lr"),  # the end of several names
        ("zzz=1", "'zzz'", "config"),  # no name is close: the command that lists them
        ("=5", "''", "config"),
    ],
)
def test_an_unknown_key_is_named_with_a_hint(argument, key, hint):
    with pytest.raises(t.InputError) as e:
        t.load_config([argument], {})
    message = str(e.value)
    assert "\n" not in message and key in message
    assert hint in message.replace(key, "", 1), message


@pytest.mark.parametrize(
    "argument,words",
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
        ("micro_batch_tokens=100000", ["micro_batch_tokens=100000", "train_batch_tokens=786432"]),
        ("train_seq_len=1000", ["train_seq_len=1000", "micro_batch_tokens=98304"]),
        ("eval_batch_tokens=2049", ["eval_seq_len=2048", "eval_batch_tokens=2049"]),
        ("eval_stride=4096", ["eval_stride=4096", "eval_seq_len=2048"]),
        ("num_heads=7", ["num_heads=7", "model_dim=512"]),
        ("num_kv_heads=3", ["num_kv_heads=3", "num_heads=4"]),
        ("rope_dims=3", ["rope_dims=3", "even"]),
        ("rope_dims=130", ["rope_dims=130", "128", "num_heads"]),
        ("xsa_last_n=12", ["xsa_last_n=12", "num_layers=11"]),
        ("ve_last_n=-1", ["ve_last_n"]),
        ("ve_last_n=12", ["ve_last_n=12", "num_layers=11"]),
        ("bigram_vocab_size=1", ["bigram_vocab_size=1 ", "at least 2"]),
        ("loop_frac=1.5", ["loop_frac", "at most 1"]),
        ("loop_layers=4 6", ["loop_layers='4 6'", "neighbours"]),
        ("loop_layers=5 4", ["loop_layers='5 4'"]),
        ("loop_layers=9 10 11", ["loop_layers='9 10 11'", "11 layers"]),
        ("loop_layers=4,5", ["loop_layers='4,5'"]),
        ("loop_layers=-1 0", ["loop_layers='-1 0'"]),
        ("loop_times=1", ["loop_times=1", "loop_layers"]),
        ("parallel_last_n=12", ["parallel_last_n=12", "num_layers=11"]),
        ("parallel_form=three", ["parallel_form", "three", "two_streams"]),
        ("attn_gate_dims=513", ["attn_gate_dims=513", "model_dim=512"]),
        ("vocab_size=65537", ["vocab_size=65537", "65536"]),
        ("depth=27", ["depth", "27", "2 to 26"]),
        ("tokens_per_param=2e6", ["tokens_per_param", "1e6"]),
        ("ema_frac=0", ["ema_frac=0", "above 0"]),
        ("warmdown_frac=0", ["warmdown_frac=0", "above 0"]),
        ("warmdown_frac=1.5", ["warmdown_frac"]),
        ("out_scale_init=0", ["out_scale_init=0", "proj_init_std above 0"]),
        ("norm_gain_lr=26", ["norm_gain_lr=26 * scalar_wd=0.04", "at most 1"]),
        *((f"{key}={value}", [key, "below 1"]) for key in DECAYS for value in (1, 1.0, 5)),
        *((f"{key}=1.01", [key, "at most 1"]) for key in SHARES),
        ("adam_eps=0", ["adam_eps=0 ", "1e-37"]),
        ("adam_eps=1e-60", ["adam_eps=1e-60"]),
        ("rope_base=0.9", ["rope_base=0.9", "at least 1"]),
        (f"eval_batch_tokens={2**50}", [f"eval_batch_tokens={2**50}", "9.01e+06 GB"]),
        (f"train_batch_tokens={98_304 * 2**30}", ["train_batch_tokens=105553116266496", "GB"]),
        ("muon_wd=21", ["matrix_lr=0.05 * muon_wd=21", "at most 1"]),
        ("embed_clip_sd=128", ["embed_clip_sd=128", "127"]),
        ("matrix_clip_sd=32", ["matrix_clip_sd=32", "31"]),
        ("mlp_mult=1e-9", ["mlp_mult=1e-09", "model_dim=512"]),
        ("scalar_lr=26", ["scalar_lr=26 * scalar_wd=0.04", "at most 1"]),
        ("embed_lr=26", ["embed_lr=26 * embed_wd=0.04", "at most 1"]),
        ("bos_id=1024", ["bos_id=1024", "vocab_size=1024"]),
        ("model_dim=1000000", ["model_dim=1000000", "9.9e+13 parameters", "1.98e+06 GB"]),
        ("mlp_mult=1e12", ["mlp_mult=1e+12", "parameters", "GB"]),
        ("num_layers=1000000", ["num_layers=1000000", "parameters", "GB"]),
        ("bigram_vocab_size=99999999999", ["bigram_vocab_size=99999999999", "parameters", "GB"]),
        ("attn_windows=512,0", ["attn_windows='512,0'", "512 512 0"]),
        ("attn_windows=512 -1", ["attn_windows='512 -1'", "whole numbers"]),
        ("attn_windows=1e3", ["attn_windows='1e3'"]),
        ("attn_windows=0 1000000000", ["attn_windows", "999999999"]),  # beyond the operator's int32
    ],
)
def test_a_bad_value_is_named(argument, words, capsys):
    arguments = [SP1024, argument]
    with pytest.raises(t.InputError) as e:
        t.load_config(arguments, {})
    message = str(e.value)
    assert all(word in message for word in words) and "\n" not in message
    assert stop_one_line(["config", *arguments], capsys) == f"train_gpt.py: {message}\n"


# Values that would otherwise end in a traceback or a silently wrong run.
@pytest.mark.parametrize(
    "argument",
    [
        "eval_batch_tokens=0",  # no window fits into a batch
        "eval_batch_tokens=-2048",
        "seed=-1",  # numpy's generator takes none
        "rope_dims=-2",
        "mlp_mult=0",
        "mlp_mult=-1",
        "mlp_mult=nan",
        "logit_softcap=0",  # 0 * tanh(x / 0)
        "val_tokens=-5",  # it would cut off the end of the split
        "warmup_steps=-1",
        "matrix_lr=nan",
        "max_wallclock_seconds=nan",
    ],
)
def test_values_that_cannot_work_are_refused(argument):
    with pytest.raises(t.InputError):
        t.load_config([argument], {})


@pytest.mark.parametrize("key", ["SEED", "PRESET", "ORTHO", "FIT_CAP"])
def test_a_bad_value_in_the_environment_is_refused_like_an_argument(key, monkeypatch, capsys):
    monkeypatch.setenv(key, "never")
    assert key.lower() in stop_one_line(["config"], capsys)


def test_config_command_prints_every_knob_as_resolved(capsys, monkeypatch):
    monkeypatch.setenv("NUM_LAYERS", "5")
    assert t.main(["config", "preset=cpu", "seed=3"]) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    h = t.load_config(["preset=cpu", "seed=3", "num_layers=5"], {})
    assert printed == {key: str(value) for key, value in dataclasses.asdict(h).items()}


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
    assert all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == []  # no run was begun


def test_world_size_must_cut_the_batch():
    h = t.load_config(as_arguments(TINY), {})
    with pytest.raises(t.InputError, match="WORLD_SIZE=3 .*train_batch_tokens"):
        t.init_machine(h, {"WORLD_SIZE": "3", "RANK": "0"})
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
def test_a_shell_sees_status_2_and_one_line(argv, word, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    argv = [argument.format(data=english_dataset().path, file=file) for argument in argv]
    env = {key: value for key, value in os.environ.items() if key.lower() not in FIELDS}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py"), *argv],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("train_gpt.py: ")
    assert done.stderr.count("\n") == 1
    assert word in done.stderr


@pytest.mark.parametrize(
    "env",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "two", "RANK": "0"},
        {"WORLD_SIZE": "0", "RANK": "0"},
        {"LOCAL_WORLD_SIZE": "x"},
        {"LOCAL_WORLD_SIZE": "0"},
        {"LOCAL_RANK": "-"},
        {"WORLD_SIZE": "\u00b2", "RANK": "0"},  # a digit, but no number
        {"WORLD_SIZE": "1", "RANK": "0"},  # no address
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
    ],
    ids=str,
)
def test_half_a_torchrun_environment(env, monkeypatch, capsys, tmp_path):
    """The run is of one process or is refused with one line; it never hangs or ends in a traceback."""
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    try:
        status = t.main(english_args(iterations=1, warmup_steps=0, out_dir=tmp_path, run_id="x"))
    finally:
        if t.dist.is_initialized():
            t.dist.destroy_process_group()
    err = capsys.readouterr().err
    assert status == 0 or (status == 2 and err.count("\n") == 1), err


def test_the_hidden_size_is_rounded():
    """4.1 * 960 is 3935.9999999999995 in floating point."""
    assert t.Config(mlp_mult=4.1, model_dim=960).mlp_dim == 3936
    assert t.Config(mlp_mult=2.675, model_dim=1000).mlp_dim == 2675
    sizes = {name: t.Config(**knobs).mlp_dim for name, knobs in t.PRESETS.items()}
    large = dict.fromkeys(("record", "sp8192", "h100x1", "h100x2"), 2048)
    gpt2 = dict.fromkeys(("gpt2_124m", "gpt2_124m_h100x1", "optimizer_race"), 3072)
    small = {
        "record_sp1024": 1536,
        "muonh": 1536,
        "h100x1_sp1024": 1536,
        "optimizer_race_small": 1536,
        "cpu": 384,
        "cpu_sp8192": 512,
    }
    assert sizes == small | large | gpt2


NUMBERS = [name for name, kind in KINDS.items() if kind.type in ("int", "float")]

# Knobs for which no value is too large: times, counts of work, sizes that the data limits, and scales that
# only training can show to be too large. A new knob is bounded, or belongs here.
UNLIMITED = {
    *("seed", "checkpoint_every", "max_wallclock_seconds", "iterations", "warmup_steps", "size_cap"),
    "memory_limit_gib",  # the card is its limit
    *("val_loss_every", "train_log_every", "val_tokens", "mix_tokens", "gptq_batches", "ttt_passes"),
    *(
        "ttt_lr",
        "ttt_chunk_tokens",
        "ttt_rank",
        "rope_base",
        "logit_softcap",
        "qk_gain_init",
        "out_scale_init",
        "proj_init_std",
    ),
    *("tied_embed_init_std", "adam_eps", "grad_clip", "ema_frac"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_bounds(name):
    """No knob takes less than zero or what is no number, and one without a limit is known to have none."""
    beyond = ["-1", str(2**53)] if KINDS[name].type == "int" else ["-1e-9", "nan", "inf", "-inf", "1e300"]
    for value in beyond:
        with pytest.raises(t.InputError, match=rf"\b{name}\b"):
            t.load_config([SP1024, f"{name}={value}"], {})

    largest = f"{name}={2**53 - 1}"
    if name in UNLIMITED:
        t.load_config([SP1024, largest], {})
    else:
        with pytest.raises(t.InputError, match=rf"\b{name}\b"):
            t.load_config([SP1024, largest], {})


def test_every_fraction_has_a_bound():
    """A knob with a beta, a momentum or a fraction in its name is bounded, or is known to have no bound."""
    names = [key for key in FIELDS if re.search("beta|momentum|_frac$", key)]
    assert set(names) - {"ema_frac", "momentum_spread"} <= {*DECAYS, *SHARES}
    for key in SHARES:
        t.load_config([f"{key}=1"], {})
    for key in DECAYS:
        t.load_config([f"{key}=0.999"], {})


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\x1b[2J", "a\u2028b", "\n"], ids=ascii)
def test_control_characters_are_refused(text):
    """A log has one line for each knob."""
    with pytest.raises(t.InputError, match="config key out_dir: '.*' has control characters"):
        t.load_config([f"out_dir={text}"], {})


@pytest.mark.parametrize("argument", ["seed={}", "ortho={}", "attn_windows={}", "{}", "{}=1", "out_dir=xx{}"])
@pytest.mark.parametrize("length", [3999, 5000])
def test_a_refusal_shows_the_beginning_of_a_long_word(argument, length):
    with pytest.raises(t.InputError) as e:
        t.load_config([argument.format("x" * length)], {})
    assert len(str(e.value)) < 300
