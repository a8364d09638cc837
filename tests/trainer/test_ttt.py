"""Test-time training: each chunk is scored before it is learnt from, all ranks learn alike, weights are put back."""

import copy
import dataclasses
import hashlib
import re
import shutil
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_audit import audit_args, by_auditor, changed_script, honest  # noqa: F401
from test_windows import ONE_BYTE, SILENT

import fixtures_records as fx  # noqa: E402
import train_gpt as t
from helpers import (
    ROOT,
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
from ledger import (  # noqa: E402
    dialects,
    record,  # noqa: E402
    tracks,
)
from record_helpers import TRACK, edit, make, verdict  # noqa: E402

LEARNS = dict(ttt_lr=0.3, ttt_chunk_tokens=64, ttt_passes=2)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for f in dataclasses.fields(t.Config):
        monkeypatch.delenv(f.name.upper(), raising=False)


def how(h, model, m, **changes):
    """A ScoreRun that learns, as Run.score makes it."""
    learner = partial(t.learning, model, model.loss, h, m)
    plain = t.ScoreRun(h.eval_seq_len, h.eval_stride, 4, "x", SILENT, h.ttt_chunk_tokens, learner)
    return plain._replace(**changes)


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


# ---------------------------------------------------------------- the learner


class Naive:
    """The same by torch's own optimizer: a step a pass, mean loss of the chunk's rows, norm clipped at 1."""

    def __init__(self, model, h):
        self.model, self.h, self.norms = copy.deepcopy(model).requires_grad_(True), h, []
        self.sgd = torch.optim.SGD(self.model.parameters(), momentum=0.9)

    def learn(self, tokens, progress):
        self.sgd.param_groups[0]["lr"] = self.h.ttt_lr * 0.5 * (1 + np.cos(np.pi * progress))
        T = self.h.eval_seq_len
        rows = [tokens[i : i + T + 1].long() for i in range(0, len(tokens) - 1, T)]
        for _ in range(self.h.ttt_passes):
            self.sgd.zero_grad()
            sum(self.model.loss(row[None, :-1], row[None, 1:]) for row in rows).div(len(rows)).backward()
            self.norms.append(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item())
            self.sgd.step()


@pytest.mark.parametrize("batch", [64, 32, 48])  # all rows at once, two batches of two, of three and one
@pytest.mark.parametrize("scale", [0.01, 0.3])
def test_a_step_is_that_of_a_naive_loop(batch, scale):
    h = tiny(eval_batch_tokens=batch, **LEARNS)
    model, chunks = noisy_model(h, scale=scale), random_tokens(h, (3, 65), 2).int()
    naive, before = Naive(model, h), weights_of(model)
    with group_of_one() as m, t.learning(model, model.loss, h, m) as learn:
        for i, tokens in enumerate(chunks):
            learn(tokens, i / 4)
            naive.learn(tokens, i / 4)
            for (name, a), b in zip(model.named_parameters(), naive.model.parameters()):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda text: f"{name}: {text}")
        assert all((a != b).any() for a, b in zip(weights_of(model), before) if a.dim() > 1)
    assert equal(weights_of(model), before)
    assert max(naive.norms) > 1 and (min(naive.norms) < 1) == (scale == 0.01), (
        naive.norms
    )  # some are clipped, or all


def test_a_rank_that_is_gone_ends_a_step_before_its_collective(monkeypatch):
    """The host network says so at once; a device collective would wait for the one that does not come."""
    h = tiny(**LEARNS)
    model, before, calls = noisy_model(h), [], []

    def gone(self, value, flag=0.0):
        raise RuntimeError("connection closed by peer")

    with group_of_one() as m, t.learning(model, model.loss, h, m) as learn:
        before = weights_of(model)
        monkeypatch.setattr(t.dist, "all_reduce", lambda *args, **kwargs: calls.append(args))
        monkeypatch.setattr(t.Machine, "agree", gone)
        with pytest.raises(RuntimeError, match="closed by peer"):
            learn(random_tokens(h, (1, 65), 2)[0].int(), 0.0)
        monkeypatch.undo()
    assert not calls and equal(weights_of(model), before)


# ---------------------------------------------------------------- the order of scoring and learning


def naive_scores(model, tokens, h):
    """Each chunk's windows one by one with the weights of then; after every chunk but the last a naive step."""
    naive, out, total, learnt = Naive(model, h), [], len(tokens) - 1, 0
    for start, end, score_from in t.score_windows(total, h.eval_seq_len, h.eval_stride):
        while score_from >= (learnt + 1) * h.ttt_chunk_tokens:
            C = h.ttt_chunk_tokens
            naive.learn(torch.from_numpy(tokens[learnt * C : (learnt + 1) * C + 1]), learnt * C / total)
            learnt += 1
        x, y = (torch.from_numpy(tokens[start + d : end + d]) for d in (0, 1))
        with torch.no_grad():
            each = torch.nn.functional.cross_entropy(naive.model.logits(x[None])[0], y, reduction="none")
        out += each[score_from - start :].tolist()
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("total, stride", [(200, 4), (256, 16), (193, 5), (129, 4)])
def test_scores_are_those_of_score_then_learn(total, stride):
    h = tiny(eval_stride=stride, **LEARNS)
    model, tokens = noisy_model(h), random_tokens(h, (total + 1,), 3).numpy()
    with group_of_one() as m:
        got = t.score_targets(model.nats, tokens, how(h, model, m), m)
        still = t.score_targets(model.nats, tokens, how(h, model, m, chunk=0, learner=nullcontext), m)
    assert (got[1] == 1).all()
    torch.testing.assert_close(got[0], naive_scores(model, tokens, h), rtol=1e-4, atol=1e-5)
    moved = (got[0] - still[0]).abs() > 1e-4
    assert not (got[0] - still[0])[:64].any() and moved[64 + stride :].float().mean() > 0.9


def sizes(count, seed):
    """(total, seq_len, stride, chunk): chunks are whole sequences, strides divide nothing."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        seq_len, total = int(rng.integers(1, 20)), int(rng.integers(1, 200))
        yield total, seq_len, int(rng.integers(1, seq_len + 1)), seq_len * int(rng.integers(1, 6))


def test_what_is_learnt_has_been_scored_and_nothing_is_learnt_from_the_last_chunk():
    with group_of_one() as m:
        for total, seq_len, stride, chunk in [
            (200, 16, 4, 64),
            (64, 16, 4, 64),
            (65, 16, 4, 64),
            *sizes(80, 1),
        ]:
            scored, learnt = set(), []

            def nats_fn(x, y, last):
                scored.update(
                    y[:, -last:].flatten().tolist()
                )  # tokens are their positions; padding scores total
                return torch.zeros(len(x), last)

            def learn(tokens, progress):
                done = (len(learnt) + 1) * chunk
                assert tokens.tolist() == list(range(done - chunk, done + 1))
                assert set(range(1, done + 1)) <= scored, (total, seq_len, stride, chunk)
                assert progress == len(learnt) * chunk / total
                learnt.append(1)

            run = t.ScoreRun(seq_len, stride, 3, "x", SILENT, chunk, lambda: nullcontext(learn))
            assert (t.score_targets(nats_fn, np.arange(total + 1), run, m)[1] == 1).all()
            starts = t.score_windows(total, seq_len, stride)[:, 2]
            assert len(learnt) == starts[-1] // chunk <= (total - 1) // chunk
            assert len(learnt) == (total - 1) // chunk or total - len(learnt) * chunk - chunk <= stride


def test_chunks_alone_change_no_bit():
    """The windows of a score without learning, grouped or not."""
    h = tiny()
    model, tokens = noisy_model(h), random_tokens(h, (301,), 4).numpy()
    with group_of_one() as m:
        plain = t.score_targets(model.nats, tokens, t.ScoreRun(16, 4, 4, "x", SILENT), m)
        idle = t.ScoreRun(16, 4, 4, "x", SILENT, 64, lambda: nullcontext(lambda *_: None))
        assert torch.equal(plain, t.score_targets(model.nats, tokens, idle, m))


def test_no_score_depends_on_a_later_token():
    h = tiny(**LEARNS)
    model, tokens, rng = noisy_model(h), random_tokens(h, (231,), 5).numpy(), np.random.default_rng(0)
    with group_of_one() as m:
        score = lambda x: t.score_targets(model.nats, x, how(h, model, m), m)[0]
        before = score(tokens)
        assert torch.equal(score(tokens), before)
        for cut in (1, 30, 63, 64, 65, 66, 67, 100, 127, 128, 129, 130, 192, 193, 194, 230):
            changed = tokens.copy()
            changed[cut:] = rng.permutation(tokens[cut:]) if cut < 200 else (tokens[cut:] + 1) % h.vocab_size
            after = score(changed)
            assert torch.equal(after[: cut - 1], before[: cut - 1]), cut  # target cut - 2 is token cut - 1
            assert not torch.equal(after[cut - 1 :], before[cut - 1 :]), cut


# ---------------------------------------------------------------- ranks


def ranks_score(rank, knobs):
    h = tiny(**knobs)
    model, tokens = (
        noisy_model(h, scale=0.01),
        random_tokens(h, (230,), 6).numpy(),
    )  # some steps are not clipped
    before, digests = weights_of(model), []
    with t.torch.no_grad():
        m = t.init_machine(
            h, {k: v for k, v in t.os.environ.items() if k in ("RANK", "WORLD_SIZE")}, trains=False
        )

    @contextmanager
    def watched():
        with t.learning(model, model.loss, h, m) as learn:

            def both(*args):
                learn(*args)
                digests.append(
                    hashlib.sha256(b"".join(p.numpy().tobytes() for p in weights_of(model))).hexdigest()
                )

            yield both

    score = t.evaluate(model.nats, tokens, ONE_BYTE, how(h, model, m, learner=watched), m)
    return score.loss, digests, equal(weights_of(model), before)


@pytest.mark.parametrize(
    "chunk", [16, 64]
)  # of one row: the other ranks have nothing to learn from themselves
def test_the_score_does_not_depend_on_the_world_size(chunk):
    knobs = LEARNS | dict(ttt_chunk_tokens=chunk)
    ((loss, steps, _),) = run_ranks(ranks_score, 1, knobs)
    assert len(set(steps)) == len(steps) == 229 // chunk
    for world in (2, 3):
        ranks = run_ranks(ranks_score, world, knobs)
        assert all(rank == ranks[0] for rank in ranks) and ranks[0][2]  # the same bits after every step
        assert ranks[0][0] == pytest.approx(loss, rel=1e-6)
        assert len(ranks[0][1]) == len(steps)


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
    h, learns = tiny(), tiny(**LEARNS)
    tensors = dict(noisy_model(h).named_parameters())
    plain, taught = (t.open_artifact(t.pack_artifact(tensors, x)) for x in (h, learns))
    assert set(plain[0]["config"]) == set(t.MODEL_FIELDS) and plain[1] == taught[1]
    assert taught[0]["config"] == plain[0]["config"] | LEARNS
    for change in (dict(ttt_lr=1), dict(ttt_passes=2.0), dict(ttt_passes=None), dict(ttt_more=1)):
        header = taught[0] | {"config": taught[0]["config"] | change}
        if change.get("ttt_passes", 0) is None:
            del header["config"]["ttt_passes"]
        text = t.json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        with pytest.raises(ValueError, match="unexpected keys or a value of another type"):
            t.open_artifact(t.compress(b"".join([t.MAGIC, len(text).to_bytes(4, "little"), text, taught[1]])))


# ---------------------------------------------------------------- whole runs

RUN = dict(ttt_lr=0.1, ttt_chunk_tokens=512)


@cache
def finished(**knobs):
    folder = temporary_folder() / "out"
    assert t.main(english_args(iterations=24, out_dir=folder, **knobs)) == 0
    lines = (folder / "run.txt").read_text(encoding="utf-8").splitlines()
    return SimpleNamespace(path=folder / "run.int6.xz", log=folder / "run.txt", lines=lines,
                           blob=(folder / "run.int6.xz").read_bytes())  # fmt: skip


def exact(line):
    return re.search(r"val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}", line)[0]


def value(lines, start):
    (line,) = [x for x in lines if x.startswith(start + " ")]
    return exact(line) if "exact" in start or "score" in start else line


def scored(run, folder, *knobs):
    """The log of `eval` of a run's artifact, with the batches of training."""
    argv = ["eval", str(run.path), f"data_path={english_dataset().path}", f"out_dir={folder}", "run_id=again"]
    assert t.main([*argv, "eval_batch_tokens=512", *knobs]) == 0
    lines = (folder / "again.txt").read_text(encoding="utf-8").splitlines()
    shutil.rmtree(folder)
    return lines


def test_a_run_that_learns_says_so():
    run = finished(**RUN)
    line = value(run.lines, "final_int6_ttt")
    assert re.fullmatch(
        r"final_int6_ttt val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} stride:8 eval_time:\d+ms", line
    )
    assert run.lines[-1].startswith("final_score metric:int6_lzma_ttt ")
    assert exact(run.lines[-1]) == value(run.lines, "final_int6_ttt_exact")
    assert value(run.lines, "final_int6_ttt_exact") < value(run.lines, "final_int6_sliding_window_exact")
    times = [
        int(re.search(r"eval_time:(\d+)ms", x)[1])
        for x in run.lines
        if x.startswith("final_int6") and "eval_time" in x
    ]
    total = int(re.search(r"eval_time:(\d+)ms", run.lines[-1])[1])
    assert len(times) == 3 and abs(sum(times) - total) <= 3


def test_learning_moves_no_other_score_and_no_weight():
    learns, plain = finished(**RUN), finished()
    assert not any("ttt" in x.split(" ")[0] for x in plain.lines if x.startswith("final"))
    assert plain.lines[-1].startswith("final_score metric:int6_lzma_sliding ")
    for start in ("final_live", "final_ema", "final_int6_roundtrip_exact", "final_int6_sliding_window_exact"):
        assert exact(value(learns.lines, start)) == exact(value(plain.lines, start))
    a, b = (t.unpack_artifact(run.blob) for run in (learns, plain))
    assert equal(a.values(), b.values())


def test_eval_scores_as_the_artifact_was_scored(tmp_path):
    """Whatever the artifact says, knobs have the last word; an artifact without a rate takes one."""
    learns, plain = finished(**RUN), finished()
    want, still = (
        value(learns.lines, "final_int6_ttt_exact"),
        value(plain.lines, "final_int6_sliding_window_exact"),
    )
    rate = [f"{k}={v}" for k, v in RUN.items()]
    for run, knobs, score, metric in (
        (learns, [], want, "ttt"),
        (plain, rate, want, "ttt"),
        (plain, [], still, "sliding"),
        (learns, ["ttt_lr=0"], still, "sliding"),
    ):
        lines = scored(run, tmp_path / "out", *knobs)
        assert lines[-1].startswith(f"eval_score metric:int6_lzma_{metric} ") and exact(lines[-1]) == score
    assert exact(scored(plain, tmp_path / "out", *rate, "ttt_passes=1")[-1]) not in (want, still)
    chunked = scored(learns, tmp_path / "out", "eval_stride=32")  # learning on the chunked score
    assert " stride:" not in value(chunked, "final_int6_ttt") and exact(chunked[-1]) not in (want, still)


def test_a_split_of_one_chunk_is_scored_as_it_is(tmp_path, monkeypatch):
    run, total = finished(), len(english_dataset().val) - 1
    chunk = -(-total // 32) * 32
    monkeypatch.setattr(t, "learning", None)
    lines = scored(run, tmp_path / "out", "ttt_lr=0.1", f"ttt_chunk_tokens={chunk}")
    assert exact(lines[-1]) == value(run.lines, "final_int6_sliding_window_exact")
    lines = scored(run, tmp_path / "out", "ttt_lr=0.1", f"ttt_chunk_tokens={32 * 10**14}")
    assert lines[-1].startswith("eval_score metric:int6_lzma_ttt ")


def test_the_pass_is_compiled_ahead_of_the_clock_and_on_no_token_of_the_split(tmp_path, monkeypatch):
    run, events, learning, evaluate = (
        finished(),
        [],
        t.learning,
        t.evaluate,
    )  # trained before anything is watched

    @contextmanager
    def watched(*args):
        with learning(*args) as learn:
            yield lambda tokens, progress: (
                events.append((len(tokens), bool(tokens.any()))),
                learn(tokens, progress),
            )

    monkeypatch.setattr(t, "learning", watched)
    monkeypatch.setattr(t, "evaluate", lambda *args: (events.append("clock"), evaluate(*args))[1])
    scored(run, tmp_path / "out", *(f"{k}={v}" for k, v in RUN.items()))
    chunks = (len(english_dataset().val) - 2) // 512
    assert chunks > 1 and events == ["clock", "clock", (513, False), "clock", *[(513, True)] * chunks]


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


def audited(honest, folder, script, capsys):  # noqa: F811
    status = by_auditor([*audit_args(honest, folder), *AUDITED], str(script))
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("audit T")]
    return status, " ".join(x.split()[1] for x in lines if "FAIL" in x), lines


def test_the_audit_passes_an_honest_score_that_learns(honest, tmp_path, capsys):  # noqa: F811
    status, fails, lines = audited(honest, tmp_path, ROOT / "train_gpt.py", capsys)
    assert (
        status == 0
        and not fails
        and "2 after learning, 0 tokens learnt before they are scored, 0 earlier scores moved" in lines[2]
    ), lines


@pytest.mark.parametrize("name", CHEATS)
def test_the_audit_catches_a_cheat(name, honest, tmp_path, capsys):  # noqa: F811
    expected, old, new = CHEATS[name]
    status, fails, lines = audited(honest, tmp_path, changed_script(tmp_path / "x", old, new), capsys)
    assert status == 1 and set(expected.split()) <= set(fails.split()), lines
    assert "T2" not in fails and "T5" not in fails, lines


def test_the_audit_needs_three_chunks(honest, tmp_path, capsys):  # noqa: F811
    args = [*audit_args(honest, tmp_path), "ttt_lr=0.2", "ttt_chunk_tokens=32768"]
    assert by_auditor(args, str(ROOT / "train_gpt.py")) == 2
    assert "ttt_chunk_tokens=32768: " in (said := capsys.readouterr().err) and said.count("\n") == 1


# ---------------------------------------------------------------- the ledger


def with_ttt(text):
    """A made-up log whose run was scored with test-time training last, 0.01 nats below sliding."""
    loss = float(re.search(r"^final_int6_sliding_window_exact val_loss:(\S+)", text, re.M)[1]) - 0.01
    score = f"val_loss:{loss:.8f} val_bpb:{fx.bpb(loss):.8f}"
    lines = f"final_int6_ttt {score} stride:64 eval_time:99000ms\nfinal_int6_ttt_exact {score}\n"
    source, rule, rest = text.rpartition(fx.SEPARATOR)
    rest = re.sub(r"^(final_int6_sliding_window_exact .*\n)", rf"\g<1>{lines}", rest, flags=re.M)
    old = r"^final_score metric:\S+ val_loss:\S+ val_bpb:\S+"
    return source + rule + re.sub(old, f"final_score metric:int6_lzma_ttt {score}", rest, flags=re.M)


def test_a_record_that_learns(tmp_path, monkeypatch):
    real = fx.log_text
    monkeypatch.setattr(fx, "log_text", lambda *a, **k: with_ttt(real(*a, **k)))
    (tmp_path / "requirements.txt").write_text("numpy==2.2.6\n")
    folder = make(tmp_path)
    claims = verdict(folder)
    assert not [c for c, (status, _) in claims.items() if status == "fail"], claims
    assert "int6_lzma_ttt" in claims["score"][1]
    page = (folder / "README.md").read_text()
    assert "| int6 sliding | int6 ttt |" in page and "metric `int6_lzma_ttt`, stride 64" in page
    edit(folder / "logs" / "seed42.txt", r"^(final_int6_ttt_exact .*val_bpb:)1", r"\g<1>0")
    assert verdict(folder)["score"][0] == "fail"


def test_a_record_is_made_of_a_run_that_learnt(tmp_path):
    """`record new` and `verify` on the log of a real run; it is reproduced with the same rates."""
    root = tmp_path / "repo"
    (root / "records").mkdir(parents=True)
    argv = [
        "--root",
        str(root),
        "new",
        "Learns",
        "--logs",
        str(finished(**RUN).log),
        "--track",
        "track_cpu",
        "--non-record",
    ]
    assert record.main(argv) == 0
    (folder,) = (root / "records" / "track_cpu").iterdir()
    page = (folder / "README.md").read_text()
    assert " ttt_chunk_tokens=512 ttt_lr=0.1 " in page and "| int6 ttt |" in page
    assert record.main(["--root", str(root), "verify", str(folder)]) == 0
    assert TRACK in tracks.TRACKS


def test_the_published_scripts_label_is_read(tmp_path):
    """Their logs end in a line `legal_ttt_exact`: it is the score that counts."""
    log = next((ROOT / "tests" / "fixtures" / "challenge").glob("*_EarlyDialect/train_seed*.log"))
    lines = "legal_ttt val_loss:1.8900 val_bpb:1.1194 eval_time:409000ms\nlegal_ttt_exact val_loss:1.89000001 val_bpb:1.11940002\n"
    (tmp_path / log.name).write_text(log.read_text(encoding="utf-8") + lines, encoding="utf-8")
    final = dialects.parse_published_log(tmp_path / log.name).facts["final_score"]
    assert (final["metric"], final["val_bpb"]) == ("legal_ttt_exact", "1.11940002")
