"""Runs whose score learns: their knobs, log and artifact, and what `eval` and the ledger make of them."""

import json
import re
import shutil
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest

import train_gpt as t
from ledger import record, tracks
from ledger.read import dialects, runlog, scores
from tests.helpers import (
    ROOT,
    all_equal,
    as_arguments,
    english_args,
    english_dataset,
    noisy_model,
    stop_one_line,
    temporary_folder,
    tiny,
)
from tests.ledger import fixtures_records as fx
from tests.ledger.record_helpers import TRACK, edit, make, verdicts
from tests.trainer.ttt_cases import LEARNS, LORA

pytestmark = pytest.mark.usefixtures("clean_environment")


# ---------------------------------------------------------------- knobs, the artifact's header


@pytest.mark.parametrize(
    "knobs, says",
    [
        (["ttt_lr=0.1", "ttt_chunk_tokens=100"], "eval_seq_len=64 must divide ttt_chunk_tokens=100"),
        (["ttt_lr=0.1", "ttt_chunk_tokens=0"], "ttt_chunk_tokens: 0"),
        (["ttt_lr=-0.1"], "ttt_lr: -0.1"),
        (["ttt_lr=nan"], "ttt_lr: nan"),
        (["ttt_passes=0"], "ttt_passes: 0"),
        (["ttt_passes=x"], "'x' is not of type int"),
        (["ttt_form=adam"], "ttt_form: 'adam' is not one of sgd, lora"),
        (
            ["ttt_lr=0.1", "ttt_form=lora", "ttt_chunk_tokens=65"],
            "ttt_form=lora: ttt_chunk_tokens=65 must not exceed eval_seq_len=64",
        ),
        (["ttt_rank=0"], "ttt_rank: 0"),
        (
            ["ttt_lr=1", "ttt_form=lora", "ttt_chunk_tokens=9", "ttt_rank=513"],
            "ttt_rank=513 must not exceed model_dim=512",
        ),
    ],
)
def test_knobs_are_refused_in_one_line(knobs, says, capsys):
    assert says in stop_one_line(["config", "eval_seq_len=64", *knobs], capsys)


def test_chunks_of_a_score_that_never_learns_may_be_anything():
    assert tiny(ttt_chunk_tokens=100, eval_seq_len=48, eval_batch_tokens=48).ttt_lr == 0


def test_the_header_has_the_knobs_only_of_a_score_that_learns():
    h = tiny()
    tensors = dict(noisy_model(h).named_parameters())
    header, payload = t.open_artifact(t.pack_artifact(tensors, h))
    header_of_learner, same_payload = t.open_artifact(t.pack_artifact(tensors, tiny(**LEARNS)))
    config = header_of_learner["config"]
    assert set(header["config"]) == set(t.STORED_KNOBS) and payload == same_payload
    assert config == header["config"] | LEARNS

    header_of_lora, _ = t.open_artifact(t.pack_artifact(tensors, tiny(**LORA)))
    assert header_of_lora["config"] == header["config"] | LORA
    without_rank = tiny(**LORA | dict(ttt_rank=t.Config.ttt_rank))  # only what is not the default is written
    header_of_default, _ = t.open_artifact(t.pack_artifact(tensors, without_rank))
    assert set(header_of_lora["config"]) - set(header_of_default["config"]) == {"ttt_rank"}

    without_passes = {key: value for key, value in config.items() if key != "ttt_passes"}
    changes = (dict(ttt_lr=1), dict(ttt_passes=2.0), dict(ttt_more=1))
    for wrong in (without_passes, *(config | change for change in changes)):
        text = json.dumps(
            header_of_learner | {"config": wrong}, sort_keys=True, separators=(",", ":")
        ).encode()
        raw = b"".join([t.MAGIC, len(text).to_bytes(4, "little"), text, payload])
        with pytest.raises(ValueError, match="config key 'ttt_.*' is missing, unknown or of another type"):
            t.open_artifact(t.pack_xz(raw))


# ---------------------------------------------------------------- whole runs

RUN = dict(ttt_lr=0.1, ttt_chunk_tokens=512)


@cache
def finished(**knobs):
    """Train on the English dataset. Returns the artifact's `path`, the `log` and its `lines`."""
    folder = temporary_folder() / "out"
    assert t.main(english_args(iterations=24, out_dir=folder, **knobs)) == 0
    log = folder / "run.txt"
    lines = log.read_text(encoding="utf-8").splitlines()
    return SimpleNamespace(path=folder / "run.int6.xz", log=log, lines=lines)


def exact(line):
    """Return the loss and bpb, to eight digits, in a line."""
    return re.search(r"val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}", line)[0]


def only(lines, label):
    """Return the one line that has this label."""
    (line,) = [line for line in lines if line.startswith(label + " ")]
    return line


def exact_of(lines, label):
    """Return the loss and bpb, to eight digits, in the one line that has this label."""
    return exact(only(lines, label))


def scored(run, folder, *knobs):
    """Run `eval` on a run's artifact, with the batches of its training. Returns the lines of the log."""
    fixed = dict(data_path=english_dataset().path, out_dir=folder, run_id="again", eval_batch_tokens=512)
    assert t.main(["eval", str(run.path), *as_arguments(fixed), *knobs]) == 0
    lines = (folder / "again.txt").read_text(encoding="utf-8").splitlines()
    shutil.rmtree(folder)
    return lines


def eval_time(line):
    return int(re.search(r"eval_time:(\d+)ms", line)[1])


def test_a_run_that_learns_says_so():
    lines = finished(**RUN).lines
    shown = r"final_int6_ttt val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} stride:8 eval_time:\d+ms"
    assert re.fullmatch(shown, only(lines, "final_int6_ttt"))
    assert lines[-1].startswith("final_score metric:int6_lzma_ttt ")
    assert exact(lines[-1]) == exact_of(lines, "final_int6_ttt_exact")
    assert exact_of(lines, "final_int6_ttt_exact") < exact_of(lines, "final_int6_sliding_window_exact")
    times = [eval_time(line) for line in lines if line.startswith("final_int6") and "eval_time" in line]
    assert len(times) == 3 and abs(sum(times) - eval_time(lines[-1])) <= 3


def test_learning_moves_no_other_score_and_no_weight():
    learns = finished(**RUN)
    plain = finished()
    labels = [line.split(" ")[0] for line in plain.lines if line.startswith("final")]
    assert not any("ttt" in label for label in labels)
    assert plain.lines[-1].startswith("final_score metric:int6_lzma_sliding ")
    for label in ("final_live", "final_ema", "final_int6_roundtrip_exact", "final_int6_sliding_window_exact"):
        assert exact_of(learns.lines, label) == exact_of(plain.lines, label)
    of_learner = t.unpack_artifact(learns.path.read_bytes())
    of_plain = t.unpack_artifact(plain.path.read_bytes())
    assert all_equal(of_learner.values(), of_plain.values())


def test_eval_scores_as_the_artifact_was_scored(tmp_path):
    """Knobs override the artifact's header; an artifact without a rate takes the rate of a knob."""
    learns = finished(**RUN)
    plain = finished()
    with_learning = exact_of(learns.lines, "final_int6_ttt_exact")
    without = exact_of(plain.lines, "final_int6_sliding_window_exact")
    rate = as_arguments(RUN)
    for run, knobs, score, metric in (
        (learns, [], with_learning, "ttt"),
        (plain, rate, with_learning, "ttt"),
        (plain, [], without, "sliding"),
        (learns, ["ttt_lr=0"], without, "sliding"),
    ):
        lines = scored(run, tmp_path / "out", *knobs)
        assert lines[-1].startswith(f"eval_score metric:int6_lzma_{metric} ")
        assert exact(lines[-1]) == score

    one_pass = scored(plain, tmp_path / "out", *rate, "ttt_passes=1")
    assert exact(one_pass[-1]) not in (with_learning, without)
    chunked = scored(learns, tmp_path / "out", "eval_stride=32")  # learning on the chunked score
    assert " stride:" not in only(chunked, "final_int6_ttt")
    assert exact(chunked[-1]) not in (with_learning, without)


def test_eval_scores_documents_as_the_artifact_was_scored(tmp_path):
    rates = dict(ttt_form="lora", ttt_lr=0.01, ttt_chunk_tokens=8, ttt_passes=1, ttt_rank=4)
    learns = finished(**rates)
    with_learning = exact_of(learns.lines, "final_int6_ttt_exact")
    assert " stride:8 " in only(learns.lines, "final_int6_ttt")
    assert with_learning < exact_of(learns.lines, "final_int6_sliding_window_exact")
    assert exact(scored(learns, tmp_path / "out")[-1]) == with_learning
    assert exact(scored(finished(), tmp_path / "out", *as_arguments(rates))[-1]) == with_learning
    other_rank = scored(learns, tmp_path / "out", "ttt_rank=5")  # knobs override the header
    assert exact(other_rank[-1]) != with_learning


def test_a_split_of_one_chunk_is_scored_as_it_is(tmp_path, monkeypatch):
    run = finished()
    total = len(english_dataset().val) - 1
    chunk = -(-total // 32) * 32
    monkeypatch.setattr(t, "learning", None)
    lines = scored(run, tmp_path / "out", "ttt_lr=0.1", f"ttt_chunk_tokens={chunk}")
    assert exact(lines[-1]) == exact_of(run.lines, "final_int6_sliding_window_exact")
    lines = scored(run, tmp_path / "out", "ttt_lr=0.1", f"ttt_chunk_tokens={32 * 10**14}")
    assert lines[-1].startswith("eval_score metric:int6_lzma_ttt ")


def test_the_pass_is_compiled_before_the_clock_and_on_no_token_of_the_split(tmp_path, monkeypatch):
    run = finished()  # trained before anything is watched
    events = []
    learning = t.learning
    evaluate = t.evaluate

    @contextmanager
    def watched_learning(*args):
        with learning(*args) as learn:

            def watched_learn(tokens, windows, begins):
                blank = bool((tokens == tokens[0]).all())
                events.append((int((windows.end - windows.score_from).sum()), blank))
                return learn(tokens, windows, begins)

            yield watched_learn

    def watched_evaluate(*args):
        events.append("clock")
        return evaluate(*args)

    monkeypatch.setattr(t, "learning", watched_learning)
    monkeypatch.setattr(t, "evaluate", watched_evaluate)
    scored(run, tmp_path / "out", *as_arguments(RUN))
    chunks = (len(english_dataset().val) - 2) // 512
    assert chunks > 1
    assert events == ["clock", "clock", (512, True), "clock", *[(512, False)] * chunks]


# ---------------------------------------------------------------- the ledger


def with_ttt(text):
    """Add a score with test-time training to a made-up log, 0.01 nats below sliding, as its final score."""
    loss = float(re.search(r"^final_int6_sliding_window_exact val_loss:(\S+)", text, re.M)[1]) - 0.01
    score = f"val_loss:{loss:.8f} val_bpb:{fx.bpb(loss):.8f}"
    lines = f"final_int6_ttt {score} stride:64 eval_time:99000ms\nfinal_int6_ttt_exact {score}\n"
    source, rule, rest = text.rpartition(fx.SEPARATOR)
    rest = re.sub(r"^(final_int6_sliding_window_exact .*\n)", rf"\g<1>{lines}", rest, flags=re.M)
    old = r"^final_score metric:\S+ val_loss:\S+ val_bpb:\S+"
    return source + rule + re.sub(old, f"final_score metric:int6_lzma_ttt {score}", rest, flags=re.M)


def test_a_record_that_learns(tmp_path, monkeypatch):
    real = fx.log_text
    monkeypatch.setattr(fx, "log_text", lambda *args, **kwargs: with_ttt(real(*args, **kwargs)))
    (tmp_path / "requirements.txt").write_text("numpy==2.2.6\n")
    folder = make(tmp_path)
    claims = verdicts(folder)
    assert not [claim for claim, (status, _) in claims.items() if status == "fail"], claims
    assert "int6_lzma_ttt" in claims["score"][1]
    page = (folder / "README.md").read_text()
    assert "| int6 sliding | int6 ttt |" in page
    assert "metric `int6_lzma_ttt`, stride 64" in page
    edit(folder / "logs" / "seed42.txt", r"^(final_int6_ttt_exact .*val_bpb:)1", r"\g<1>0")
    assert verdicts(folder)["score"][0] == "fail"


def test_a_record_is_made_of_a_run_that_learned(tmp_path):
    """`record new` and `record verify` take the log of a real run; its page reproduces it with its rates."""
    root = tmp_path / "repo"
    (root / "records").mkdir(parents=True)
    log = str(finished(**RUN).log)
    argv = ["--root", str(root), "new", "Learns", "--logs", log, "--track", "track_cpu", "--non-record"]
    assert record.main(argv) == 0
    (folder,) = (root / "records" / "track_cpu").iterdir()
    page = (folder / "README.md").read_text()
    assert " ttt_chunk_tokens=512 ttt_lr=0.1 " in page and "| int6 ttt |" in page
    assert record.main(["--root", str(root), "verify", str(folder)]) == 0
    assert TRACK in tracks.TRACKS


def test_the_ledger_has_a_row_for_every_score_of_a_log():
    run = runlog.parse_log(finished(**RUN).log)
    logged = {line.removesuffix("_exact") for line in run.facts if line.startswith("final_")}
    rows = {score.line_of(run).removesuffix("_exact") for score in scores.SCORES}
    assert logged - {"final_score"} == rows


def test_the_published_scripts_label_is_read(tmp_path):
    """Their logs end in a line `legal_ttt_exact`, which is the score that counts."""
    log = next((ROOT / "tests" / "fixtures" / "challenge").glob("*_EarlyDialect/train_seed*.log"))
    lines = (
        "legal_ttt val_loss:1.8900 val_bpb:1.1194 eval_time:409000ms\n"
        "legal_ttt_exact val_loss:1.89000001 val_bpb:1.11940002\n"
    )
    (tmp_path / log.name).write_text(log.read_text(encoding="utf-8") + lines, encoding="utf-8")
    final = dialects.parse_published_log(tmp_path / log.name).facts["final_score"]
    assert (final["metric"], final["val_bpb"]) == ("legal_ttt_exact", "1.11940002")
