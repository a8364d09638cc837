"""The auditor: is an artifact's score legal? Nine tests, T1-T9, of the artifact and the code that scores it.

    ./run.sh audit ARTIFACT [--script PATH] [key=value ...]
    python tools/audit.py ARTIFACT [--script PATH] [key=value ...]

PATH is the train_gpt.py to audit. Without it, an artifact inside a record folder is audited with that
folder's script, any other with the repository's. `key=value` are its knobs, above all data_path=DIR.

The auditor is separate from the script that it audits: a submission may edit train_gpt.py but not its own
audit, and all records face the same tests. It loads the script by path, from its text, and calls what that
script scores and trains with (NEEDS). It finds mistakes; it is not a sandbox. The script runs in this
process, so audit only code that you would run yourself.

The tests answer the challenge's conditions (parameter-golf #1017: causal, normalized, scored before any
update, one pass) and the ways in which published numbers went wrong. tests/audit plants a fault for each.

If ttt_lr is above zero, in the artifact or as a knob, T1 to T4, T7 and T9 examine the score with test-time
training. The piece of text that they score then has three chunks, so that its tokens are learned from twice.
They compare bits, and a GPU's gradients repeat only with deterministic=1.

A test that takes longer says how far it is and when it ends: live on a terminal, else a line every 15 s.

The exit status is 0 if all tests pass, 1 if one fails, and 2 for bad input, which one line names.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the script's `guarded`, Ctrl-C shows no traceback

if __name__ == "__main__" and getattr(sys.flags, "safe_path", False):  # PYTHONSAFEPATH leaves this folder out
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from script import explain_imports

if __name__ == "__main__":
    explain_imports("audit.py")

import dataclasses
import hashlib
import json
import math
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from audit_older import (
    can_learn,
    chunk_of,
    compressor,
    counted_stride,
    gives_windows,
    guarded,
    learns_apart,
    passes_of,
    plan_older_scores,
    targets_of,
    with_own_signals,
)
from audit_script import ByteCounts, Config, Log, Nats, Run, Scoring
from script import (
    TRAINER,
    BadInput,
    guard_console,
    known_fault,
    leave_if_lost,
    load_script,
    one_layer,
    print_help,
    refuse,
    require_names,
)

USAGE = "usage: audit.py ARTIFACT [--script PATH] [key=value ...]"
TOOL = "audit.py"  # begins its errors
MODULE = "audited_script"  # the script's name in sys.modules

# The names of the script that the tests use; CLASS.NAME is a method or field of its objects. The scripts of
# old records are judged by the same names, so change one only with those records in mind.
NEEDS = (
    *("InputError", "Log", "load_shard", "split_files", "GPT", "MAGIC", "XZ", "open_artifact"),
    *("ScoreSettings", "score_targets", "evaluate", "train", "load_run"),
    *("GPT.embed", "GPT.loss", "GPT.nats"),
    *("Run.h", "Run.m", "Run.log", "Run.dataset", "Run.model", "Run.nats_fn", "Run.held_out"),
    *("Dataset.counts", "Dataset.manifest", "ByteCounts.base", "ByteCounts.space", "ByteCounts.of"),
)
TTT_NEEDS = ("learning", "Run.loss_fn")  # of a script that can train at test time


# ---- the script ----------------------------------------------------------------------------------


def default_script(artifact: str) -> Path:
    """Return the train_gpt.py of the record folder around the artifact, or else the repository's."""
    for folder in Path(os.path.abspath(artifact)).parents:
        if (folder / "submission.json").is_file() and (folder / "train_gpt.py").is_file():
            return folder / "train_gpt.py"
    return TRAINER


def load_audited(path: Path) -> ModuleType:
    """Load the script to audit. Raises BadInput if it lacks a name that the tests use."""
    script = load_script(path, MODULE, NEEDS, "audit")
    if can_learn(script):
        require_names(script, path, TTT_NEEDS, "audit")
    return script


# ---- progress ------------------------------------------------------------------------------------

TICK_SECONDS = 1.0  # between two live lines on a terminal
LINE_SECONDS = 15.0  # between two lines elsewhere


class Progress:
    """Tells how far the running test is, from a thread: one pass of a large model may take minutes.

    A test works in stages, each of a number of scores, passes, documents, ... that are to be done.
    """

    def __init__(self, log: Log) -> None:
        self.log = log  # of the script
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.tell_all, daemon=True)
        self.begin("")

    def begin(self, test: str) -> None:
        """Begin a test, of which no stage is known yet."""
        self.test = test
        self.started = time.perf_counter()
        self.expect(0, "")

    def expect(self, total: int, unit: str) -> None:
        """Begin a stage of this many units."""
        self.unit = unit
        self.total = total
        self.done = 0
        self.stage_started = time.perf_counter()

    def advance(self, count: int = 1) -> None:
        """Count units that are done."""
        self.done = min(self.done + count, self.total)

    def text(self) -> str:
        """Return the line about this moment."""
        now = time.perf_counter()
        line = f"auditing {self.test}: {now - self.started:.0f} s"
        if self.total:
            line += f", {self.done}/{self.total} {self.unit}"
        if self.done:
            eta = (now - self.stage_started) / self.done * (self.total - self.done)
            line += f", ETA {eta:.0f} s"
        return line

    def tell_all(self) -> None:
        """Thread body: report progress until the audit ends."""
        told = 0.0
        while not self.ended.wait(TICK_SECONDS):
            if sys.stderr.isatty():
                self.log.status(self.text())
            elif time.perf_counter() - max(told, self.started) >= LINE_SECONDS:
                told = time.perf_counter()
                self.log(self.text())

    def __enter__(self) -> Progress:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        self.thread.join()


# ---- the subject of the tests --------------------------------------------------------------------


class Verdict(NamedTuple):
    """The outcome of one test, with its evidence of one line."""

    test: str
    ok: bool
    evidence: str


@dataclass(frozen=True)
class Audit:
    """The subject of the tests: the script, a run with the artifact's weights, and how it is scored."""

    script: ModuleType
    run: Run  # its model holds the artifact's weights
    blob: bytes  # the artifact
    piece: np.ndarray  # (N,) tokens from the middle of the validation split, document starts among them
    scoring: Scoring  # sliding, as in the final score, and learning if that learns
    chunk: int  # targets that are scored before they are learned from; 0: nothing is learned
    progress: Progress

    def nats(self, tokens: np.ndarray, scoring: Scoring | None = None) -> Tensor:
        """Score every target as the final score does, or as another ScoreSettings says: (N - 1,) float64."""
        out = self.script.score_targets(self.run.nats_fn, tokens, scoring or self.scoring, self.run.m)[0]
        dist.all_reduce(out)
        self.progress.advance()
        return out

    @contextmanager
    def learned(self) -> Iterator[Nats]:
        """Yield what scores the piece's second chunk; inside the block the model has the weights for it.

        A script whose `learn` returns nothing keeps all that it has learned in the model.
        """
        if not self.chunk:
            yield self.run.nats_fn
            return
        tokens = torch.from_numpy(self.piece.astype(np.int32)).to(self.run.m.device)
        with self.scoring.learner() as learn:
            if gives_windows(self.script):
                changed = learn(tokens, self.first_lesson())
            else:
                changed = learn(tokens[: self.chunk + 1], 0.0)
            yield changed or self.run.nats_fn

    def first_lesson(self) -> Tensor:
        """Return the windows of the first chunk: its sequences, or itself for every sequence of a batch."""
        if learns_apart(self.scoring):
            slots = self.scoring.batch * self.run.m.world_size
            return torch.tensor([[0, self.chunk, 0]]).expand(slots, 3)
        starts = torch.arange(0, self.chunk, self.scoring.seq_len)
        return torch.stack([starts, starts + self.scoring.seq_len, starts], 1)


def make_audit(script: ModuleType, run: Run, blob: bytes) -> Audit:
    """Make the Audit of a run whose model holds the weights of the artifact `blob`.

    Raises the script's InputError if test-time training would not repeat to the bit, or has less than three
    chunks of text.
    """
    h = run.h
    chunk = chunk_of(h)
    if chunk and run.m.device.type == "cuda" and not h.deterministic:
        raise script.InputError(
            "ttt_lr on a GPU: gradients do not repeat to the bit, which T1 and T3 compare; "
            "add deterministic=1, or leave it out of the audit with ttt_lr=0"
        )
    tokens = run.held_out("val")
    if chunk and len(tokens) <= 2 * chunk + 1:
        raise script.InputError(
            f"ttt_chunk_tokens={chunk}: {len(tokens)} tokens of val make fewer than three chunks; "
            "audit on more text or with smaller chunks"
        )

    scoring = plan_scores(script, run, chunk)
    if learns_apart(scoring):
        piece = choose_document(script, tokens, h, chunk)
    else:
        piece = choose_piece(tokens, h, chunk)
    return Audit(script, run, blob, piece, scoring, chunk, Progress(run.log))


def plan_scores(script: ModuleType, run: Run, chunk: int) -> Scoring:
    """Return the script's ScoreSettings of the final score, with a log that tells nothing: Progress does."""
    silent = script.Log("", None)
    if gives_windows(script):
        return run.scoring("audit", counted_stride(script, run.h), learns=chunk > 0)._replace(log=silent)
    return plan_older_scores(script, run, chunk, silent)


def size_of_piece(tokens: np.ndarray, h: Config, chunk: int) -> int:
    """Return the number of tokens in two chunks and a few score windows, at most all."""
    windows = 2 * h.eval_seq_len + 4 * h.eval_stride
    tail = h.eval_stride // 2 + 1  # the last window scores less than a stride
    return min(len(tokens), 2 * chunk + windows + tail)


def choose_piece(tokens: np.ndarray, h: Config, chunk: int) -> np.ndarray:
    """Return a piece of a split around a document start in the middle."""
    length = size_of_piece(tokens, h, chunk)
    starts = np.flatnonzero(tokens[: len(tokens) - length + 1] == h.bos_id)
    middle = int(starts[len(starts) // 2]) if len(starts) else 0
    begin = min(middle - h.eval_seq_len // 2, len(tokens) - length)
    begin = max(0, begin)
    return np.array(tokens[begin : begin + length])


def choose_document(script: ModuleType, tokens: np.ndarray, h: Config, chunk: int) -> np.ndarray:
    """Return the shortest document of three chunks and what follows it, so that others are in the piece.

    Raises the script's InputError if there is none.
    """
    starts = np.flatnonzero(tokens == h.bos_id)
    lengths = np.diff(np.append(starts, len(tokens)))
    long = np.flatnonzero(lengths > 2 * chunk + 1)
    if not len(long):
        raise script.InputError(
            f"ttt_chunk_tokens={chunk}: no document of val has three chunks; audit with smaller chunks"
        )
    begin = starts[long[lengths[long].argmin()]]
    return np.array(tokens[begin : begin + size_of_piece(tokens, h, chunk)])


# ---- T1, T2, T3: each score is a probability, and depends on earlier tokens only ------------------


class Moved(NamedTuple):
    """How many scores changed, and by how many nats at most."""

    scores: int
    nats: float

    def __str__(self) -> str:
        amount = f", by {self.nats:.2g} nats at most" if self.scores else ""
        return f"{self.scores} earlier scores moved{amount}"


def count_moved(gaps: Tensor) -> Moved:
    """Count the gaps that are not zero. A score that is not a number has moved, by infinitely much."""
    if gaps.numel() == 0:
        return Moved(0, 0.0)
    return Moved(int((gaps != 0).sum()), gaps.nan_to_num(nan=math.inf).max().item())


def total_moved(parts: list[Moved]) -> Moved:
    """Return all scores that moved, and the largest move."""
    return Moved(sum(part.scores for part in parts), max((part.nats for part in parts), default=0.0))


def replace_later_tokens(audit: Audit, cuts: list[int], seed: int) -> Moved:
    """Replace all tokens from each cut on, and count the earlier targets whose scores change.

    Target j is token j + 1: with tokens from `cut` on replaced, targets up to cut - 2 must keep their scores.
    """
    random = np.random.default_rng(seed)
    audit.progress.expect(1 + len(cuts), "scores")
    before = audit.nats(audit.piece)
    parts = []
    for cut in cuts:
        changed = audit.piece.copy()
        changed[cut:] = random.integers(0, audit.run.h.vocab_size, len(changed) - cut)
        gaps = (audit.nats(changed) - before).abs()
        parts.append(count_moved(gaps[: max(0, cut - 1)]))
    return total_moved(parts)


def replace_later_inputs(audit: Audit) -> Moved:
    """Replace a batch's inputs from a column on, keep all targets, and count scores that change before it.

    Replacing a token of the stream also replaces a target; only this finds a model that reads its target.
    """
    scoring = audit.scoring
    device = audit.run.m.device
    random = np.random.default_rng(4)
    piece = torch.from_numpy(audit.piece[: scoring.seq_len + 1].astype(np.int64))
    inputs = piece[:-1].expand(scoring.batch, -1).contiguous()
    targets = piece[1:].expand(scoring.batch, -1).contiguous().to(device)
    cuts = torch.from_numpy(random.integers(1, scoring.seq_len, scoring.batch))[:, None]
    other = torch.from_numpy(random.integers(0, audit.run.h.vocab_size, inputs.shape))
    keep = torch.arange(scoring.seq_len) < cuts
    changed = torch.where(keep, inputs, other)

    with audit.learned() as nats_fn, torch.no_grad():
        before = nats_fn(inputs.to(device), targets, scoring.seq_len)
        after = nats_fn(changed.to(device), targets, scoring.seq_len)
    return count_moved((after - before).abs().cpu()[keep])


def starts_that_see_back(audit: Audit) -> int:
    """Count document starts, of the first eight, whose embedding changes with the token before them."""
    h = audit.run.h
    starts = np.flatnonzero(audit.piece == h.bos_id)
    seeing = 0
    for start in starts[starts > 0][:8]:
        pair = torch.from_numpy(np.stack([audit.piece[start - 1 : start + 1]] * 2).astype(np.int64))
        pair[1, 0] = (pair[1, 0] + 1) % h.vocab_size
        with torch.no_grad():
            first, second = audit.run.model.embed(pair.to(audit.run.m.device))[:, 1]
        seeing += int((first != second).any())
    return seeing


def audit_causality(audit: Audit) -> Verdict:
    """T1: no score depends on a later token, and no embedding of a document start on the document before."""
    size = len(audit.piece)
    stride = audit.scoring.stride
    window = audit.scoring.seq_len
    starts = np.flatnonzero(audit.piece == audit.run.h.bos_id)
    random = np.random.default_rng(1)

    cuts = {2, stride, window, window + 1, window + stride, size - 1}
    cuts.update(random.integers(2, size, 4).tolist())
    cuts.update(int(start) + offset for start in starts[:2] for offset in (0, 1))
    if audit.chunk:  # at and after the first targets of the chunks that are scored after learning
        cuts.update(i * audit.chunk + offset for i in (1, 2) for offset in (0, 1, 2, stride + 1))
    cuts = sorted(cut for cut in cuts if 2 <= cut < size)

    moved = total_moved([replace_later_tokens(audit, cuts, 2), replace_later_inputs(audit)])
    seeing = starts_that_see_back(audit)
    return Verdict(
        "T1 causality",
        moved.scores == 0 and seeing == 0,
        f"{len(cuts)} cuts, {moved}; {seeing} document starts see the token before them",
    )


def audit_normalization(audit: Audit) -> Verdict:
    """T2: at every position exp(-nats) sums to 1 over the vocabulary, in full windows and in sliding ones."""
    h = audit.run.h
    device = audit.run.m.device
    scoring = audit.scoring
    piece = torch.from_numpy(audit.piece[: scoring.seq_len].astype(np.int64))
    x = piece.to(device).expand(scoring.batch, -1).contiguous()
    errors = []
    vocabulary = torch.arange(h.vocab_size, device=device).split(scoring.batch)
    audit.progress.expect(2 * len(vocabulary), "passes")
    with audit.learned() as nats_fn, torch.no_grad():
        for last in (scoring.seq_len, scoring.stride):
            total = torch.zeros(last, dtype=torch.float64, device=device)
            for ids in vocabulary:
                # each sequence of the batch has one token of the vocabulary as all its targets
                padded = F.pad(ids, (0, scoring.batch - len(ids)))
                y = padded[:, None].expand(scoring.batch, scoring.seq_len).contiguous()
                nats = nats_fn(x, y, last)[: len(ids)]
                total += (-nats.double()).exp().sum(0)
                audit.progress.advance()
            errors.append((total - 1).abs().max())
    error = torch.stack(errors).max().item()  # nan if one of them is; Python's max would drop it
    return Verdict(
        "T2 normalization",
        error < 1e-3,
        f"at {scoring.seq_len} + {scoring.stride} positions the largest |sum - 1| is {error:.1e}",
    )


class Learning(NamedTuple):
    """The effect of test-time training on the scores of the piece."""

    has_effect: bool  # on the scores after the first chunk, and only on them
    early: int  # tokens that are learned from before they are scored


def idle_learner() -> nullcontext:
    """Return the context of a learner that learns nothing."""
    return nullcontext(lambda *_: None)


def examine_learning(audit: Audit) -> Learning:
    """Score the piece with and without learning, and watch what the learner is given."""
    audit.progress.expect(2, "scores")
    without = audit.nats(audit.piece, audit.scoring._replace(learner=idle_learner))
    gaps = audit.nats(audit.piece) - without
    only_later = bool((gaps[: audit.chunk] == 0).all())
    has_effect = only_later and bool(gaps.any() and gaps.isfinite().all())
    return Learning(has_effect, tokens_learned_early(audit))


def tokens_learned_early(audit: Audit) -> int:
    """Count the tokens that the learner is given before they are scored. Tokens are positions; no model runs.

    T1's cuts cannot find this for the first target of a chunk: replacing its token also replaces the target.
    """
    m = audit.run.m
    scored = torch.zeros(len(audit.piece), device=m.device)
    early = 0

    def mark_scored(x: Tensor, y: Tensor, last: int) -> Tensor:
        scored[y[:, -last:]] = 1
        return torch.zeros(len(x), last, device=m.device)

    def learn(tokens: Tensor, lesson: Tensor | float, *_: object) -> None:
        nonlocal early
        dist.all_reduce(scored)
        early += int((scored[targets_of(tokens, lesson).long()] == 0).sum())

    scoring = audit.scoring._replace(learner=lambda: nullcontext(learn))
    audit.script.score_targets(mark_scored, np.arange(len(audit.piece)), scoring, m)
    return early


def audit_score_before_update(audit: Audit) -> Verdict:
    """T3: each chunk is first scored in a state that has seen nothing of the chunk."""
    stride = audit.scoring.stride
    size = len(audit.piece)
    cuts = {start + 1 for start in range(stride, size - 1, max(stride, size // 6))}
    evidence = f"{len(cuts)} chunk starts"
    ok = True
    if audit.chunk:
        # the first target of a chunk is replaced, or all after it
        cuts.update(i * audit.chunk + offset for i in (1, 2) for offset in (1, 2))
        learning = examine_learning(audit)
        ok = learning.has_effect and learning.early == 0
        evidence += " and 2 after learning"
        if not learning.has_effect:
            evidence += " that changes no score, or changes an earlier one"
        evidence += f", {learning.early} tokens learned before they are scored"

    moved = replace_later_tokens(audit, sorted(cuts), 3)
    return Verdict("T3 score before update", ok and moved.scores == 0, f"{evidence}, {moved}")


# ---- T4, T5: the sum has every target once, over the bytes of the text ----------------------------


class Totals(NamedTuple):
    """Whether a split's totals agree with the manifest, and the evidence."""

    agree: bool
    evidence: str


def compare_with_manifest(run: Run, tokens: np.ndarray, size: int) -> Totals:
    """Compare a split's tokens and bytes (size) with those of the manifest, where it has them."""
    split = run.dataset.manifest.get("splits", {}).get("val", {})
    if not split:
        return Totals(True, "no manifest to compare with")
    if run.h.val_tokens:
        return Totals(True, "a part of the split")
    if len(tokens) == split.get("tokens") and split.get("decoded_bytes") in (None, size):
        return Totals(True, "manifest agrees")
    return Totals(False, f"manifest says {split.get('tokens')} tokens, {split.get('decoded_bytes')} bytes")


def count_scores(audit: Audit, tokens: np.ndarray) -> Tensor:
    """Count how often each target is scored, (N - 1,) float64. No model runs and nothing is learned."""
    m = audit.run.m
    scoring = audit.scoring
    if audit.chunk:
        scoring = scoring._replace(learner=idle_learner)
    audit.progress.expect(-(-(len(tokens) - 1) // m.world_size), "targets")

    def one_nat_each(x: Tensor, y: Tensor, last: int) -> Tensor:
        fresh = audit.chunk if learns_apart(scoring) else last  # targets of a full window
        audit.progress.advance(x.size(0) * fresh)
        return torch.ones(x.size(0), last, device=x.device)

    counts_of_scores = audit.script.score_targets(one_nat_each, tokens, scoring, m)[1]
    dist.all_reduce(counts_of_scores)
    return counts_of_scores


def score_is_sum(audit: Audit) -> bool:
    """Return whether the script's evaluate gives the sums of its targets' scores and bytes."""
    counts = audit.run.dataset.counts
    audit.progress.expect(2, "scores")
    nats = audit.nats(audit.piece).sum().item()
    score = audit.script.evaluate(audit.run.nats_fn, audit.piece, counts, audit.scoring, audit.run.m)
    audit.progress.advance()
    targets = len(audit.piece) - 1
    bpb = nats / math.log(2) / int(counts.of(audit.piece).sum())
    pairs = ((score.loss, nats / targets), (score.bpb, bpb), (score.tokens, targets))
    return all(abs(given / wanted - 1) < 1e-9 for given, wanted in pairs)


def audit_coverage(audit: Audit) -> Verdict:
    """T4: every target of the split is scored exactly once, and the totals are the manifest's."""
    run = audit.run
    tokens = run.held_out("val")
    times_scored = count_scores(audit, tokens)
    wrong = int((times_scored != 1).sum())
    size = int(run.dataset.counts.of(tokens).sum())
    totals = compare_with_manifest(run, tokens, size)
    sums = score_is_sum(audit)
    return Verdict(
        "T4 coverage",
        wrong == 0 and totals.agree and sums,
        f"{times_scored.numel()} targets, {wrong} not scored exactly once; {size} bytes; {totals.evidence}; "
        f"the score is {'' if sums else 'not '}the sum over its targets",
    )


class Tokenizer(NamedTuple):
    """The tokenizer of a dataset itself, not what the audited script makes of it."""

    decode: Callable[[list[list[int]]], list[str]]  # documents' token ids -> texts
    unknown: int  # the piece for text that the vocabulary cannot spell; -1: none


def tokenizer_of(run: Run) -> Tokenizer:
    """Return the tokenizer of a run's dataset."""
    named = run.dataset.manifest.get("tokenizer", {})
    if named.get("encoding") and not run.h.tokenizer_path:
        import tiktoken

        return Tokenizer(tiktoken.get_encoding(named["encoding"]).decode_batch, -1)

    import sentencepiece

    path = run.h.tokenizer_path or os.path.join(run.h.data_path, named["file"])
    sp = sentencepiece.SentencePieceProcessor(model_file=path)
    space = "\u2581"
    # decode drops a document's first space if add_dummy_prefix or remove_extra_whitespaces is on. It keeps
    # one that is spelled in bytes, as where the vocabulary has no piece for a space: drop that here.
    byte = sp.piece_to_id("<0xE2>")
    in_bytes = sp.is_unknown(sp.piece_to_id(space)) and sp.is_byte(byte)
    plain = sp.encode("x")
    is_dropped = byte in plain or sp.encode(" x") == plain
    first = " " if in_bytes and is_dropped else ""

    def decode(documents: list[list[int]]) -> list[str]:
        return [text.replace(space, " ").removeprefix(first) for text in sp.decode(documents)]

    return Tokenizer(decode, sp.unk_id())


DECODED_AT_ONCE = 256  # documents


def audit_bytes(audit: Audit) -> Verdict:
    """T5: the denominator is the UTF-8 length of the decoded documents, one by one.

    An unknown piece stands for text that is lost, so that no denominator is right: none may be in the split.
    """
    run = audit.run
    tokenizer = tokenizer_of(run)
    tokens = run.held_out("val")[:2_000_000]
    starts = np.flatnonzero(tokens == run.h.bos_id)
    ends = np.append(starts[1:], len(tokens))
    bytes_before = np.concatenate([[0], np.cumsum(run.dataset.counts.of(tokens))])

    whole = max(len(starts) - 1, 0)  # the last document may be cut inside a character
    audit.progress.expect(whole, "documents")
    wrong = 0
    for first in range(0, whole, DECODED_AT_ONCE):
        some = slice(first, min(first + DECODED_AT_ONCE, whole))
        spans = list(zip(starts[some], ends[some]))
        texts = tokenizer.decode([tokens[start + 1 : end].tolist() for start, end in spans])
        for (start, end), text in zip(spans, texts):
            counted = bytes_before[end - 1] - bytes_before[start]
            wrong += int(counted != len(text.encode()))
        audit.progress.advance(len(spans))
    unknown = int((run.held_out("val") == tokenizer.unknown).sum())
    return Verdict(
        "T5 byte accounting",
        wrong == 0 and unknown == 0,
        f"{whole} documents decoded, {wrong} counted with another length; {unknown} unknown pieces",
    )


# ---- T6: training text ----------------------------------------------------------------------------


class Hashes(NamedTuple):
    """64-bit hashes of a token stream's text."""

    spans: np.ndarray  # of a number of words each
    documents: np.ndarray


def hash_text(tokens: np.ndarray, counts: ByteCounts, bos_id: int, n: int) -> Hashes:
    """Hash all spans of n words and all documents of a token stream.

    A word begins at a token with a leading space and after a document start. The hash of tokens a to b is
    polynomial modulo 2^64 in a random value per token: a difference of prefix sums times an inverse power.
    """
    base = 0x9E3779B97F4A7C15
    inverse = pow(base, -1, 1 << 64)
    values = np.random.default_rng(13).integers(0, 1 << 64, len(counts.base), dtype=np.uint64)
    power = np.cumprod(np.full(len(tokens), np.uint64(base)), dtype=np.uint64)
    undo = np.cumprod(np.full(len(tokens), np.uint64(inverse)), dtype=np.uint64)
    prefix = np.concatenate([[np.uint64(0)], np.cumsum(values[tokens] * power, dtype=np.uint64)])

    def hashes(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        return (prefix[end] - prefix[begin]) * undo[begin]

    starts = np.flatnonzero(tokens == bos_id)
    first = np.zeros(len(tokens), bool)
    first[np.minimum(starts + 1, len(tokens) - 1)] = True
    words = np.flatnonzero((counts.space[tokens] | first) & (tokens != bos_id))
    begin = words[:-n]
    end = words[n:]
    inside = np.searchsorted(starts, begin) == np.searchsorted(starts, end)  # of one document

    body = starts + 1
    body_end = np.append(starts[1:], len(tokens))
    full = body < body_end
    return Hashes(hashes(begin[inside], end[inside]), hashes(body[full], body_end[full]))


# Limits of T6, as fractions of the validation split.
LEAKED_DOCUMENTS = 0.001  # not zero: the web honestly repeats short documents
LEAKED_SPANS = 0.05  # clean text shares well under 1 % of its spans, a leaked split nearly all
SPAN_WORDS = 13


def audit_leak(audit: Audit) -> Verdict:
    """T6: few validation documents, and few of their 13-word spans, are in the training shards."""
    run = audit.run
    h = run.h
    val = hash_text(run.held_out("val"), run.dataset.counts, h.bos_id, SPAN_WORDS)
    spans = np.unique(val.spans)
    documents = np.unique(val.documents)
    span_found = np.zeros(len(spans), bool)
    document_found = np.zeros(len(documents), bool)
    files = audit.script.split_files(h.data_path, "train")
    audit.progress.expect(len(files), "training shards")
    for file in files:
        tokens = np.asarray(audit.script.load_shard(file, h.vocab_size))
        train = hash_text(tokens, run.dataset.counts, h.bos_id, SPAN_WORDS)
        span_found |= np.isin(spans, train.spans)
        document_found |= np.isin(documents, train.documents)
        audit.progress.advance()

    span_rate = span_found.sum() / max(1, len(spans))
    document_rate = document_found.sum() / max(1, len(documents))
    documents_found = f"{document_found.sum()} of {len(documents)} documents"
    spans_found = f"{100 * span_rate:.3f} % of {len(spans)} {SPAN_WORDS}-word spans"
    return Verdict(
        "T6 leak",
        bool(document_rate <= LEAKED_DOCUMENTS and span_rate < LEAKED_SPANS),
        f"{documents_found} (limit {100 * LEAKED_DOCUMENTS:.1f} %) and {spans_found} "
        f"(limit {100 * LEAKED_SPANS:.0f} %) are in {len(files)} training shards",
    )


# ---- T7, T8, T9: the same again, no held-out file, no network --------------------------------------


def audit_repeat(audit: Audit) -> Verdict:
    """T7: the artifact packs to the same bytes again, and scoring twice gives the same bits."""
    header, payload = audit.script.open_artifact(audit.blob)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    raw = b"".join([audit.script.MAGIC, struct.pack("<I", len(text)), text, payload])
    again = compressor(audit.script, audit.blob)(raw)
    packs_again = again == audit.blob
    audit.progress.expect(2, "scores")
    repeats = bool((audit.nats(audit.piece) == audit.nats(audit.piece)).all())
    return Verdict(
        "T7 size and determinism",
        packs_again and repeats,
        f"{len(audit.blob)} bytes, repacked to {len(again)}, {'equal' if packs_again else 'different'}; "
        f"the scores of a second pass are {'equal' if repeats else 'different'}",
    )


class Event(NamedTuple):
    """An audit event of the interpreter (sys.audit)."""

    name: str
    arguments: tuple

    def __str__(self) -> str:
        return f"{self.name}{self.arguments}"


@contextmanager
def watch(*names: str) -> Iterator[list[Event]]:
    """Collect the interpreter's audit events of these names that happen inside the block."""
    seen: list[Event] = []
    watching = True

    def hook(name: str, arguments: tuple) -> None:
        if watching and name in names:
            seen.append(Event(name, arguments))

    sys.addaudithook(hook)  # for good: the interpreter cannot remove it
    try:
        yield seen
    finally:
        watching = False


TRAINED_STEPS = 2  # by T8, after one step of warm-up


def log_of_steps(audit: Audit) -> Log:
    """Return a log that writes nothing and counts the lines of steps."""

    class StepLog(audit.script.Log):
        def __call__(self, line: str, *_: object, **__: object) -> None:
            audit.progress.advance(line.startswith(("warmup_step:", "step:")))

    return StepLog("", None)


def audit_files(audit: Audit) -> Verdict:
    """T8: training without validations opens no held-out file. Trains one layer for two steps."""
    run = audit.run
    script = audit.script
    h = dataclasses.replace(
        one_layer(run.h),
        iterations=TRAINED_STEPS,
        train_log_every=1,
        warmup_steps=1,
        max_wallclock_seconds=0.0,
        micro_batch_tokens=run.h.train_seq_len,
        train_batch_tokens=run.h.train_seq_len * run.m.world_size,
        val_loss_every=0,
    )
    splits = ["val", h.report_split] if h.report_split else ["val"]
    held_out = {os.path.realpath(file) for split in splits for file in script.split_files(h.data_path, split)}
    small = script.GPT(h, run.m.ops, run.m.dtype).to(run.m.device)
    small_run = dataclasses.replace(
        run,
        h=h,
        m=with_own_signals(run.m),
        model=small,
        **passes_of(run, small),
        nats_fn=small.nats,
        phases={},
        splits={},
        log=log_of_steps(audit),
    )
    audit.progress.expect(1 + TRAINED_STEPS, "steps")
    with watch("open") as events:
        script.train(small_run)

    names = [event.arguments[0] for event in events]
    opened = [os.path.realpath(os.fsdecode(name)) for name in names if isinstance(name, (str, bytes))]
    early = sorted(held_out.intersection(opened))
    evidence = f"{len(opened)} files opened while training, {len(early)} of them held out"
    if early:
        evidence += f": {early[0]}"
    return Verdict("T8 file access", bool(opened) and not early, evidence)


NETWORK_EVENTS = (
    *("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"),
    *("socket.sendto", "socket.sendmsg", "urllib.Request"),
    *("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "os.fork"),  # a child is not watched
)


def audit_network(audit: Audit) -> Verdict:
    """T9: scoring makes no network call and starts no other program."""
    audit.progress.expect(1, "scores")
    with watch(*NETWORK_EVENTS) as calls:
        audit.nats(audit.piece[: audit.scoring.seq_len + 1])
    evidence = f"{len(calls)} network calls"
    if calls:
        evidence += f", the first is {calls[0]}"
    return Verdict("T9 network", not calls, evidence)


AUDIT = (
    audit_causality,
    audit_normalization,
    audit_score_before_update,
    audit_coverage,
    audit_bytes,
    audit_leak,
    audit_repeat,
    audit_files,
    audit_network,
)


# ---- the command ---------------------------------------------------------------------------------


def fingerprint(path: str) -> str:
    """Return a path with the beginning of its file's hash."""
    return f"{path} sha256:{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"


def run_audit(script: ModuleType, artifact: str, knobs: list[str]) -> int:
    """Run all tests on an artifact and log a line for each. Returns the exit status, 1 if one fails."""
    run, blob = script.load_run(artifact, knobs, os.environ)
    with guarded(script, run):
        return run_tests(script, run, blob)


def run_tests(script: ModuleType, run: Run, blob: bytes) -> int:
    """Run all tests on a run with the weights of the artifact `blob`. Returns the exit status."""
    run.log(f"auditing {fingerprint(script.__file__)} with {fingerprint(__file__)}")
    audit = make_audit(script, run, blob)
    passed = 0
    with audit.progress as progress:
        for number, test in enumerate(AUDIT, 1):
            progress.begin(f"T{number}")
            verdict = test(audit)
            seconds = time.perf_counter() - progress.started
            passed += int(verdict.ok)
            result = "ok" if verdict.ok else "FAIL"
            run.log(f"audit {verdict.test}: {result} ({verdict.evidence}) [{seconds:.1f} s]")
    run.log(f"audit {passed} of {len(AUDIT)} tests passed")
    return 0 if passed == len(AUDIT) else 1


class Arguments(NamedTuple):
    """A command line, read."""

    artifact: str
    script: Path
    knobs: list[str]


def parse(argv: list[str]) -> Arguments:
    """Read a command line. Raises BadInput with the usage."""
    rest = list(argv)
    script = None
    while "--script" in rest[:-1]:
        at = rest.index("--script")
        script = Path(rest[at + 1])
        del rest[at : at + 2]
    if not rest or rest[0].startswith("-") or "=" in rest[0] or "--script" in rest:
        raise BadInput(USAGE)
    artifact, *knobs = rest
    return Arguments(artifact, script or default_script(artifact), knobs)


def main(argv: list[str]) -> int:
    """Audit an artifact and return the exit status. An error that the user can fix is one line."""
    guard_console()
    if argv[:1] in (["-h"], ["--help"]):
        return print_help(TOOL, __doc__ or USAGE)
    try:
        arguments = parse(argv)
        script = load_audited(arguments.script)
    except BadInput as error:
        return refuse(TOOL, error)

    try:
        return run_audit(script, arguments.artifact, arguments.knobs)
    except Exception as error:
        if fault := known_fault(script, error):
            return refuse(TOOL, fault)
        leave_if_lost(TOOL, script, error, "before the audit began")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
