"""Test-time training: each chunk is scored before it is learnt from, on every rank alike.

Afterwards the weights are restored. The auditor finds scores that learn otherwise, and the ledger reads them.
"""

import copy
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_windows import ONE_BYTE, SILENT

import fixtures_records as fx
import train_gpt as t
from audit_cases import audit_args, by_auditor, changed_script, honest  # noqa: F401
from helpers import (
    ROOT,
    as_arguments,
    english_args,
    english_dataset,
    group_of_one,
    noisy_model,
    random_tokens,
    run_ranks,
    stop_one_line,
    temporary_folder,
    tiny,
)
from ledger import record, tracks
from ledger.read import dialects, runlog, scores
from record_helpers import TRACK, edit, make, verdicts

LEARNS = dict(ttt_lr=0.3, ttt_chunk_tokens=64, ttt_passes=2)


pytestmark = pytest.mark.usefixtures("clean_environment")


def learning_run(h, model, m, **changes):
    """Return a ScoreRun that learns, as Run.score makes it."""
    learner = partial(t.learning, model, model.loss, h, m)
    run = t.ScoreRun(h.eval_seq_len, h.eval_stride, 4, "x", SILENT, chunk=h.ttt_chunk_tokens, learner=learner)
    return run._replace(**changes)


def weights_of(model):
    """Copy a model's weights."""
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    """Return whether two lists of tensors are equal, bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b))


# ---------------------------------------------------------------- the learner


class Naive:
    """The reference learner, with torch's optimizer.

    Each pass is a step along the gradient of the mean loss of the chunk's sequences, its norm clipped at 1.
    """

    def __init__(self, model, h):
        self.model = copy.deepcopy(model).requires_grad_(True)
        self.h = h
        self.norms = []  # of the gradients, before they are clipped
        self.sgd = torch.optim.SGD(self.model.parameters(), momentum=0.9)

    def learn(self, tokens, progress):
        T = self.h.eval_seq_len
        sequences = [tokens[i : i + T + 1].long() for i in range(0, len(tokens) - 1, T)]
        self.sgd.param_groups[0]["lr"] = self.h.ttt_lr * 0.5 * (1 + np.cos(np.pi * progress))
        for _ in range(self.h.ttt_passes):
            self.sgd.zero_grad()
            losses = [self.model.loss(sequence[None, :-1], sequence[None, 1:]) for sequence in sequences]
            (sum(losses) / len(losses)).backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.norms.append(norm.item())
            self.sgd.step()


def assert_close_to(naive, model):
    """Compare all parameters with the reference's."""
    for (name, p), expected in zip(model.named_parameters(), naive.model.parameters()):
        message = partial("{}: {}".format, name)
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-6, msg=message)


# All four sequences of a chunk at once, two batches of two, a batch of three and one of one.
@pytest.mark.parametrize("batch", [64, 32, 48])
@pytest.mark.parametrize("scale", [0.01, 0.3])
def test_a_step_is_that_of_a_naive_loop(batch, scale):
    h = tiny(eval_batch_tokens=batch, **LEARNS)
    model = noisy_model(h, scale=scale)
    chunks = random_tokens(h, (3, 65), 2).int()
    naive = Naive(model, h)
    before = weights_of(model)
    with group_of_one() as m, t.learning(model, model.loss, h, m) as learn:
        for i, tokens in enumerate(chunks):
            learn(tokens, i / 4)
            naive.learn(tokens, i / 4)
            assert_close_to(naive, model)
        assert all((a != b).any() for a, b in zip(weights_of(model), before) if a.dim() > 1)
    assert equal(weights_of(model), before)
    assert max(naive.norms) > 1, naive.norms
    assert (min(naive.norms) < 1) == (scale == 0.01), naive.norms  # some are clipped, or all


def test_a_rank_that_is_gone_ends_a_step_before_its_collective(monkeypatch):
    """The host network fails at once; a device collective would wait for the rank that is gone."""
    h = tiny(**LEARNS)
    model = noisy_model(h)
    before = weights_of(model)
    calls = []

    def gone(self, value, flag=0.0):
        raise RuntimeError("connection closed by peer")

    with group_of_one() as m, t.learning(model, model.loss, h, m) as learn:
        monkeypatch.setattr(t.dist, "all_reduce", lambda *args, **kwargs: calls.append(args))
        monkeypatch.setattr(t.Machine, "agree", gone)
        with pytest.raises(RuntimeError, match="closed by peer"):
            learn(random_tokens(h, (1, 65), 2)[0].int(), 0.0)
        monkeypatch.undo()
    assert not calls and equal(weights_of(model), before)


# ---------------------------------------------------------------- the order of scoring and learning


def naive_scores(model, tokens, h):
    """Return all scores, window by window, with a reference step after every chunk but the last."""
    naive = Naive(model, h)
    chunk = h.ttt_chunk_tokens
    total = len(tokens) - 1
    learnt = 0  # tokens
    out = []
    for start, end, score_from in t.score_windows(total, h.eval_seq_len, h.eval_stride):
        while score_from >= learnt + chunk:
            naive.learn(torch.from_numpy(tokens[learnt : learnt + chunk + 1]), learnt / total)
            learnt += chunk
        x = torch.from_numpy(tokens[start:end])
        y = torch.from_numpy(tokens[start + 1 : end + 1])
        with torch.no_grad():
            each = F.cross_entropy(naive.model.logits(x[None])[0], y, reduction="none")
        out += each[score_from - start :].tolist()
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("total, stride", [(200, 4), (256, 16), (193, 5), (129, 4)])
def test_scores_are_those_of_score_then_learn(total, stride):
    h = tiny(eval_stride=stride, **LEARNS)
    model = noisy_model(h)
    tokens = random_tokens(h, (total + 1,), 3).numpy()
    with group_of_one() as m:
        run = learning_run(h, model, m)
        nats, times_scored = t.score_targets(model.nats, tokens, run, m)
        still = run._replace(chunk=0, learner=nullcontext)
        without_learning, _ = t.score_targets(model.nats, tokens, still, m)
    assert (times_scored == 1).all()
    torch.testing.assert_close(nats, naive_scores(model, tokens, h), rtol=1e-4, atol=1e-5)
    gaps = (nats - without_learning).abs()
    assert not gaps[:64].any() and (gaps > 1e-4)[64 + stride :].float().mean() > 0.9


def sizes(count, seed):
    """Yield random (total, seq_len, stride, chunk): chunks are whole sequences, strides divide nothing."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        seq_len = int(rng.integers(1, 20))
        total = int(rng.integers(1, 200))
        yield total, seq_len, int(rng.integers(1, seq_len + 1)), seq_len * int(rng.integers(1, 6))


class Witness:
    """A scorer and learner that note the order of events. Tokens are their positions; no model runs."""

    def __init__(self, total, chunk):
        self.total = total
        self.chunk = chunk
        self.scored = set()  # padding scores `total`
        self.learnt = 0  # chunks

    def nats(self, x, y, last):
        self.scored.update(y[:, -last:].flatten().tolist())
        return torch.zeros(len(x), last)

    def learn(self, tokens, progress):
        """Check that the next chunk comes, and that all of it has been scored."""
        first = self.learnt * self.chunk
        end = first + self.chunk
        assert tokens.tolist() == list(range(first, end + 1))
        assert set(range(1, end + 1)) <= self.scored
        assert progress == first / self.total
        self.learnt += 1

    def learner(self):
        return nullcontext(self.learn)


EDGES = [(200, 16, 4, 64), (64, 16, 4, 64), (65, 16, 4, 64)]


def test_what_is_learnt_has_been_scored_and_nothing_is_learnt_from_the_last_chunk():
    with group_of_one() as m:
        for total, seq_len, stride, chunk in [*EDGES, *sizes(80, 1)]:
            witness = Witness(total, chunk)
            run = t.ScoreRun(seq_len, stride, 3, "x", SILENT, chunk=chunk, learner=witness.learner)
            _, times_scored = t.score_targets(witness.nats, np.arange(total + 1), run, m)
            assert (times_scored == 1).all()
            starts = t.score_windows(total, seq_len, stride)[:, 2]
            learnt = witness.learnt
            assert learnt == starts[-1] // chunk <= (total - 1) // chunk, (total, seq_len, stride, chunk)
            assert learnt == (total - 1) // chunk or total - learnt * chunk - chunk <= stride


def test_chunks_alone_change_no_bit():
    """Score windows that are grouped by chunk, without learning, score what they score ungrouped."""
    h = tiny()
    model = noisy_model(h)
    tokens = random_tokens(h, (301,), 4).numpy()
    run = t.ScoreRun(16, 4, 4, "x", SILENT)
    idle = run._replace(chunk=64, learner=lambda: nullcontext(lambda *_: None))
    with group_of_one() as m:
        plain = t.score_targets(model.nats, tokens, run, m)
        assert all(map(torch.equal, plain, t.score_targets(model.nats, tokens, idle, m)))


def test_no_score_depends_on_a_later_token():
    h = tiny(**LEARNS)
    model = noisy_model(h)
    tokens = random_tokens(h, (231,), 5).numpy()
    rng = np.random.default_rng(0)
    with group_of_one() as m:
        run = learning_run(h, model, m)

        def score(tokens):
            return t.score_targets(model.nats, tokens, run, m).nats

        before = score(tokens)
        assert torch.equal(score(tokens), before)
        for cut in (1, 30, 63, 64, 65, 66, 67, 100, 127, 128, 129, 130, 192, 193, 194, 230):
            changed = tokens.copy()
            if cut < 200:
                changed[cut:] = rng.permutation(tokens[cut:])
            else:
                changed[cut:] = (tokens[cut:] + 1) % h.vocab_size
            after = score(changed)
            assert torch.equal(after[: cut - 1], before[: cut - 1]), cut  # target cut - 2 is token cut - 1
            assert not torch.equal(after[cut - 1 :], before[cut - 1 :]), cut


# ---------------------------------------------------------------- ranks


def ranks_score(rank, knobs):
    """Score on one rank.

    Returns the loss, a digest of the weights after each step, and whether the weights were restored.
    """
    h = tiny(**knobs)
    model = noisy_model(h, scale=0.01)  # so that some steps are not clipped
    tokens = random_tokens(h, (230,), 6).numpy()
    before = weights_of(model)
    digests = []
    env = {key: os.environ[key] for key in ("RANK", "WORLD_SIZE") if key in os.environ}
    m = t.init_machine(h, env, trains=False)

    @contextmanager
    def watched():
        with t.learning(model, model.loss, h, m) as learn:

            def learn_and_digest(*args):
                learn(*args)
                weights = b"".join(p.numpy().tobytes() for p in weights_of(model))
                digests.append(hashlib.sha256(weights).hexdigest())

            yield learn_and_digest

    run = learning_run(h, model, m, learner=watched)
    score = t.evaluate(model.nats, tokens, ONE_BYTE, run, m)
    return score.loss, digests, equal(weights_of(model), before)


# With a chunk of one sequence, the other ranks have nothing of their own to learn from.
@pytest.mark.parametrize("chunk", [16, 64])
def test_the_score_does_not_depend_on_the_world_size(chunk):
    knobs = LEARNS | dict(ttt_chunk_tokens=chunk)
    ((loss, steps, _),) = run_ranks(ranks_score, 1, knobs)
    assert len(set(steps)) == len(steps) == 229 // chunk
    for world in (2, 3):
        ranks = run_ranks(ranks_score, world, knobs)
        assert all(rank == ranks[0] for rank in ranks)  # the same bits after every step
        loss_of_several, steps_of_several, restored = ranks[0]
        assert restored
        assert loss_of_several == pytest.approx(loss, rel=1e-6)
        assert len(steps_of_several) == len(steps)


# ---------------------------------------------------------------- knobs, the artifact's header


@pytest.mark.parametrize(
    "knobs, says",
    [
        (["ttt_lr=0.1", "ttt_chunk_tokens=100"], "eval_seq_len must divide ttt_chunk_tokens"),
        (["ttt_lr=0.1", "ttt_chunk_tokens=0"], "ttt_chunk_tokens: 0"),
        (["ttt_lr=-0.1"], "ttt_lr: -0.1"),
        (["ttt_lr=nan"], "ttt_lr: nan"),
        (["ttt_passes=0"], "ttt_passes: 0"),
        (["ttt_passes=x"], "'x' is not of type int"),
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
    assert set(header["config"]) == set(t.MODEL_FIELDS) and payload == same_payload
    assert config == header["config"] | LEARNS

    without_passes = {key: value for key, value in config.items() if key != "ttt_passes"}
    changes = (dict(ttt_lr=1), dict(ttt_passes=2.0), dict(ttt_more=1))
    for wrong in (without_passes, *(config | change for change in changes)):
        text = json.dumps(
            header_of_learner | {"config": wrong}, sort_keys=True, separators=(",", ":")
        ).encode()
        raw = b"".join([t.MAGIC, len(text).to_bytes(4, "little"), text, payload])
        with pytest.raises(ValueError, match="unexpected keys or a value of another type"):
            t.open_artifact(t.compress(raw))


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
    assert equal(of_learner.values(), of_plain.values())


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

            def watched_learn(tokens, progress):
                events.append((len(tokens), bool(tokens.any())))
                learn(tokens, progress)

            yield watched_learn

    def watched_evaluate(*args):
        events.append("clock")
        return evaluate(*args)

    monkeypatch.setattr(t, "learning", watched_learning)
    monkeypatch.setattr(t, "evaluate", watched_evaluate)
    scored(run, tmp_path / "out", *as_arguments(RUN))
    chunks = (len(english_dataset().val) - 2) // 512
    assert chunks > 1
    assert events == ["clock", "clock", (513, False), "clock", *[(513, True)] * chunks]


# ---------------------------------------------------------------- the auditor

AUDITED = ["ttt_lr=0.2", "ttt_chunk_tokens=64", "ttt_passes=1"]
# A cheat: the tests that must fail, the text of the trainer that is replaced, and the text that replaces it.
CHEATS = {
    "learnt before it is scored": (
        "T1 T3",
        "tokens[first : group.chunk * chunk + 1]",
        "tokens[(at := min(group.chunk * chunk, total - chunk)) : at + chunk + 1]",
    ),
    "one token too many": (
        "T3",
        "tokens[first : group.chunk * chunk + 1]",
        "tokens[first + 1 : group.chunk * chunk + 2]",
    ),
    "weights are not put back": ("T1 T3 T7", "torch._foreach_copy_(weights, saved)", "pass"),
    "nothing is learnt": ("T3", "alpha=-rate)", "alpha=-0.0)"),
    "a chunk is left out": ("T4", "np.split(windows, cuts[1:])", "np.split(windows, cuts[1:])[:2]"),
}


class Audited(NamedTuple):
    """The verdicts of the auditor on a script."""

    status: int
    fails: set[str]  # tests, T1 to T9
    lines: list[str]  # one for each test


def audited(honest, folder, script, capsys):  # noqa: F811
    """Audit the honest artifact, scored with learning by a script."""
    status = by_auditor([*audit_args(honest, folder), *AUDITED], str(script))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("audit T")]
    fails = {line.split()[1] for line in lines if "FAIL" in line}
    return Audited(status, fails, lines)


def test_the_audit_passes_an_honest_score_that_learns(honest, tmp_path, capsys):  # noqa: F811
    result = audited(honest, tmp_path, ROOT / "train_gpt.py", capsys)
    assert result.status == 0 and not result.fails, result.lines
    evidence = "2 after learning, 0 tokens learnt before they are scored, 0 earlier scores moved"
    assert evidence in result.lines[2]


@pytest.mark.parametrize("name", CHEATS)
def test_the_audit_catches_a_cheat(name, honest, tmp_path, capsys):  # noqa: F811
    expected, old, new = CHEATS[name]
    result = audited(honest, tmp_path, changed_script(tmp_path / "x", old, new), capsys)
    assert result.status == 1 and set(expected.split()) <= result.fails, result.lines
    assert not {"T2", "T5"} & result.fails, result.lines


def test_the_audit_needs_three_chunks(honest, tmp_path, capsys):  # noqa: F811
    args = [*audit_args(honest, tmp_path), "ttt_lr=0.2", "ttt_chunk_tokens=32768"]
    assert by_auditor(args, str(ROOT / "train_gpt.py")) == 2
    err = capsys.readouterr().err
    assert "ttt_chunk_tokens=32768: " in err and err.count("\n") == 1


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


def test_a_record_is_made_of_a_run_that_learnt(tmp_path):
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
