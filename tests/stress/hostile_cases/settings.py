"""Settings: every knob beyond its bounds, knobs that contradict, odd spellings, huge sizes."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import train_gpt as t
from tests.stress.hostile_cases.case import Case, Group, config, lab, run_sh, shell, train
from tests.stress.hostile_cases.paths import OUTPUT


class Setting(NamedTuple):
    """A knob and its value, as the command line has them."""

    key: str
    value: str

    @property
    def word(self) -> str:
        return f"{self.key}={self.value}"


# Text of any kind is legal for these: paths and names.
FREE_TEXT = {"run_id", "out_dir", "data_path", "tokenizer_path", "report_split", "resume"}


def illegal_values(kind: t.Kind) -> Iterator[str]:
    """Yield the values beside the range of a kind of knob, and one of another type."""
    yield "no such value"
    if kind.type in ("int", "float"):
        yield str(kind.least - 1)
        if kind.below < math.inf:
            yield str(kind.below)
        if kind.most < math.inf:
            yield str(kind.most + 1)
    if kind.type == "float":
        yield "nan"
        yield "inf"
    if kind.type == "int":
        yield "1.5"


def illegal_settings() -> Iterator[Setting]:
    """Yield what no knob may be, by the ranges of train_gpt.py."""
    for key, kind in t.kinds_of_knobs().items():
        if key not in FREE_TEXT:
            for value in illegal_values(kind):
                yield Setting(key, value)


# Values of the right type that are beyond limits of their own.
BEYOND = (
    Setting("depth", "1"),
    Setting("depth", "1000000"),
    Setting("loop_layers", "5 4"),
    Setting("attn_windows", "256 -1"),
    Setting("embed_bits", "9"),
    Setting("int6_step", "1.01"),
    Setting("scalar_lr", "-inf"),
    Setting("deterministic", ""),
)

ILLEGAL = (*illegal_settings(), *BEYOND)

# Knobs that contradict each other, and what the error names.
CONTRADICTIONS = (
    (("micro_batch_tokens=100",), ("micro_batch_tokens=100 must divide train_batch_tokens=",)),
    (("train_seq_len=96",), ("train_seq_len=96 must divide micro_batch_tokens=",)),
    (("eval_seq_len=96",), ("eval_seq_len=96 must divide eval_batch_tokens=",)),
    (("num_heads=3",), ("num_heads=3 must divide model_dim=",)),
    (("num_kv_heads=3",), ("num_kv_heads=3 must divide num_heads=",)),
    (("eval_stride=64",), ("eval_stride=64 must not exceed eval_seq_len=",)),
    (("ttt_lr=0.1", "ttt_chunk_tokens=33"), ("must divide ttt_chunk_tokens=33",)),
    (("rope_dims=3",), ("rope_dims=3 must be even",)),
    (("rope_dims=64",), ("rope_dims=64", "at most")),
    (("xsa_last_n=5",), ("xsa_last_n=5 must not exceed num_layers=",)),
    (("bos_id=400",), ("bos_id=400 must be below vocab_size",)),
    (("mlp_mult=1e-9",), ("mlp_mult",)),
    (("bigram_vocab_size=1",), ("bigram_vocab_size=1 must be 0 or at least 2",)),
    (("vocab_size=65537",), ("vocab_size=65537", "65536")),
    (("ema_frac=0",), ("ema_frac=0 must be above 0",)),
    (("adam_eps=0",), ("adam_eps=0 must be at least",)),
    (("logit_softcap=0",), ("logit_softcap=0 must be above 0",)),
)

# Words that are no settings, or of odd spelling, and what the error names.
SPELLINGS = (
    (("nan",), ("key=value",)),
    (("=5",), ("key",)),
    (("Seed=5",), ("Seed", "did you mean seed")),
    (("sed=5",), ("sed",)),
    (("learning_rate=0.1",), ("learning_rate", "config")),
    (("--seed=5",), ("--seed",)),
    (("seed",), ("seed", "key=value")),
    (("seed=",), ("seed", "''")),
    (("seed=1e3",), ("seed", "'1e3'")),
    (("seed=0x10",), ("seed", "'0x10'")),
    (("seed=" + "9" * 5000,), ("seed",)),
    (("seed=9007199254740992",), ("seed", "below 2^53")),
    (("matrix_lr=1e400",), ("matrix_lr", "below 2^53")),
    (("matrix_lr=0.1=0.2",), ("matrix_lr", "'0.1=0.2'")),
    (("matrix_lr=1,5",), ("matrix_lr", "'1,5'")),
    (("seed=5\nseed=6",), ("seed",)),
    (("a\nb=1",), ("unknown config key",)),
)

# Sizes that no machine has: refused, or one line when the memory is refused.
HUGE = (
    (("model_dim=1073741824",), ("model_dim=1073741824", "make the model smaller")),
    (("num_layers=1073741824",), ("num_layers=1073741824", "make the model smaller")),
    (("mlp_mult=1e12",), ("mlp_mult=1e+12", "make the model smaller")),
    (("bigram_vocab_size=1099511627776",), ("make the model smaller",)),
    (("ve_dim=1099511627776",), ("make the model smaller",)),
    (("attn_windows=9999999999",), ("attn_windows", "999999999")),
    (("train_batch_tokens=1125899906842624",), ("train_batch_tokens=1125899906842624", "at most")),
    (("eval_batch_tokens=1125899906842624",), ("eval_batch_tokens=1125899906842624", "at most")),
    (
        ("train_seq_len=1073741824", "train_batch_tokens=1073741824", "micro_batch_tokens=1073741824"),
        ("train split has",),
    ),
    (("eval_seq_len=1073741824", "eval_batch_tokens=1073741824"), ("eval_seq_len",)),
    (("matrix_lr=1e15",), ("matrix_lr=1e+15 * muon_wd=", "at most 1")),
    (("embed_lr=1e15",), ("embed_lr=1e+15 * embed_wd=", "at most 1")),
)

# Values within their bounds with which training cannot go well: status 1 and one line.
DIVERGING = (
    ("matrix_lr=1e15 muon_wd=0", "diverged"),
    ("qk_gain_init=1e15", "iverged"),
    ("tied_embed_init_std=1e15", "train with lower rates"),
    ("logit_softcap=1e-300", "iverged"),
)


def cases() -> tuple[Case, ...]:
    """Return the cases of the tables above."""
    return (
        *(Case(setting.word, config(setting.word), (setting.key,)) for setting in ILLEGAL),
        *(Case(" ".join(given), train(*given), says) for given, says in CONTRADICTIONS),
        *(Case(f"spelling {words[0][:30]!r}", train(*words), says) for words, says in SPELLINGS),
        *(Case(" ".join(given)[:60], train(*given), says) for given, says in HUGE),
        *(
            Case(given, train(*given.split(), "iterations=8"), (says,), 1, leaves=("out", "out/run.txt"))
            for given, says in DIVERGING
        ),
    )


OTHERS = (
    Case("given twice, the last counts", config("seed=3", "seed=4"), ("seed: 4",), 0),
    Case("the command line wins over the environment", config("seed=4"), ("seed: 4",), 0, env={"SEED": "3"}),
    Case("a bad value in the environment", config(), ("seed", "'x'"), env={"SEED": "x"}),
    Case("an empty value in the environment", config(), ("iterations", "''"), env={"ITERATIONS": ""}),
    Case("ten thousand words", train(*["seed=5"] * 10_000), ("final_score",), 0, leaves=OUTPUT),
    Case("run.sh: an unknown knob", run_sh("config", "sed=5"), ("sed",)),
    Case("run.sh: a knob without a value", run_sh("train", "seed"), ("'seed'", "key=value")),
    Case("run.sh: an option", run_sh("train", "--seed", "5"), ("--seed",)),
    Case("run.sh: an unknown command", run_sh("fly"), ("'fly'", "--help")),
    Case("run.sh: a bad value", run_sh("train", "data_path=data", "seed=x"), ("seed", "'x'")),
    Case(
        "run.sh: run_id escapes", run_sh("train", "data_path=data", "run_id=../x"), ("run_id", "begin with")
    ),
    Case(
        "run.sh: a bench of a word of seconds",
        run_sh("bench", "--seconds", "x", "data_path=data"),
        ("--seconds",),
    ),
    Case("run.sh: an option without a value", run_sh("bench", "--json"), ("--json", "needs a value")),
    Case("an unknown command", (*config()[:2], "fly"), ("'fly'", "usage")),
    Case("eval without an artifact", (*config()[:2], "eval"), ("'eval'", "usage")),
    Case("a sweep of no rows", lab("sweep", "preset=cpu"), ("no rows", "--row")),
    Case("a sweep's rate is a word", lab("sweep", "--row", "a", "--rates", "fast"), ("--rates", "numbers")),
    Case("a sweep's rate is nan", lab("sweep", "--row", "a", "--rates", "nan", "preset=cpu"), ("matrix_lr",)),
    Case(
        "a sweep's seeds are equal",
        lab("sweep", "--row", "a", "--rates", "0.1", "--seeds", "1,1"),
        ("seeds", "different"),
    ),
    Case(
        "a sweep's worker count is zero",
        lab("sweep", "--row", "a", "--rates", "0.1", "--workers", "0"),
        ("--workers",),
    ),
    Case("a sweep's row escapes", lab("sweep", "--row", "../a", "--rates", "0.1", "preset=cpu"), ("../a",)),
    Case("a sweep's row has an unknown knob", lab("sweep", "--row", "a:sed=1", "--rates", "0.1"), ("sed",)),
    Case(
        "a sweep's base has an unknown knob", lab("sweep", "--row", "a", "--rates", "0.1", "sed=1"), ("sed",)
    ),
    Case("directions of a word of steps", lab("directions", "--steps", "x"), ("--steps",), lines=0),
    Case("wire of a word of ranks", lab("wire", "--ranks", "many"), ("many",), lines=0),
    Case(
        "a cap that nothing fits",
        train("size_cap=1"),
        ("artifact over the cap", "file kept"),
        status=1,
        lines=0,
        leaves=OUTPUT,
    ),
    Case(
        "a clock that calibration alone exceeds",
        train("max_wallclock_seconds=0.001", "gptq_batches=50"),
        ("max_wallclock_seconds", "held back", "raise it"),
        leaves=("out", "out/run.txt"),
    ),
    Case("a split of one target", train("val_tokens=1"), ("2 tokens of val", "eval_seq_len=32")),
    Case(
        "a model that no memory holds",
        shell('ulimit -v 1400000; exec "$@"', *train("model_dim=1024", "num_layers=12")),
        ("out of memory", "make the model smaller"),
        1,
        leaves=("out", "out/run.txt"),
    ),
)

GROUP = Group("settings", ("data",), (*cases(), *OTHERS))
