"""The auditor: is an artifact's score legal? Nine tests, T1-T9, of the artifact and the code that scores it.

    ./run.sh audit ARTIFACT [--script PATH] [key=value ...]
    python tools/audit.py ARTIFACT [--script PATH] [key=value ...]

PATH is the train_gpt.py that is audited; without it the one of the record folder that the artifact lies in,
else the repository's. `key=value` are that script's knobs: data_path=DIR first of all.

The auditor is no part of what it audits: a submission edits train_gpt.py and must not edit its examination
with it, and all records are held to the same tests. It loads the script by path, from its text, and calls
what that script scores and trains with (NEEDS). It finds mistakes and is no sandbox: the script runs in this
process, so audit only code that you would run.

The tests answer the challenge's conditions (parameter-golf #1017: causal, normalised, scored before any
update, one pass) and the ways in which published numbers went wrong. tests/test_audit.py plants a fault for
each.

With `ttt_lr` above zero, from the artifact or a knob, T1 to T4, T7 and T9 examine the score with test-time
training: the piece they score is three chunks long, so that its tokens are learnt from twice. They compare
bits, and a GPU's gradients repeat only with deterministic=1.

Exit status: 0 all tests pass; 1 one fails; 2 bad input (one line says it).
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
import math
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from script import BadInput, load_script, missing_names

USAGE = "usage: audit.py ARTIFACT [--script PATH] [key=value ...]"
MODULE = "audited_script"        # its name in sys.modules

# What the tests reach in the script. CLASS.NAME: a method or field of its objects.
NEEDS = ("InputError", "Log", "load_shard", "split_files", "GPT", "MAGIC", "XZ", "open_artifact", "ScoreRun",
         "score_targets", "evaluate", "train", "load_run", "GPT.embed", "GPT.loss", "GPT.nats", "Run.h",
         "Run.m", "Run.log", "Run.dataset", "Run.model", "Run.nats_fn", "Run.held_out", "Dataset.counts",
         "Dataset.manifest", "ByteCounts.base", "ByteCounts.space", "ByteCounts.of")
TTT_NEEDS = ("learning", "Run.loss_fn")      # of a script whose Config has ttt_lr


# ---- the script ----------------------------------------------------------------------------------

def default_script(artifact: str) -> Path:
    """The train_gpt.py of the record folder that the artifact lies in, or else the repository's."""
    for folder in Path(os.path.abspath(artifact)).parents:
        if (folder / "submission.json").is_file() and (folder / "train_gpt.py").is_file():
            return folder / "train_gpt.py"
    return Path(__file__).resolve().parent.parent / "train_gpt.py"


def load_audited(path: Path) -> ModuleType:
    """The script under test, with everything the tests reach in it. BadInput when it lacks some of that."""
    script = load_script(path, MODULE, NEEDS, "audit")
    if missing_names(script, ("Config.ttt_lr",)) == [] and (lacking := missing_names(script, TTT_NEEDS)):
        raise BadInput(f"{path}: this script has no {', '.join(lacking)}, which audit needs; "
                       "audit it with the tools of its own age")
    return script


# ---- what the tests share ------------------------------------------------------------------------

class Verdict(NamedTuple):
    test: str
    ok: bool
    evidence: str


@dataclass(frozen=True)
class Audit:
    """What the tests share: script and run under test, a piece of the validation split, how it is scored."""
    script: ModuleType
    run: Any                 # the script's Run, whose model holds the artifact's weights
    blob: bytes              # the artifact
    piece: np.ndarray        # (N,) tokens: a few windows from the middle of the split, document starts too
    how: Any                 # the script's ScoreRun: sliding, as the final score, and learning if that learns
    chunk: int               # targets after which it learns; 0: it never does

    def nats(self, tokens: np.ndarray, how: Any = None) -> Tensor:
        """Score of every target, as the final score computes it or in another way, (N - 1,) float64."""
        out = self.script.score_targets(self.run.nats_fn, tokens, how or self.how, self.run.m)[0]
        dist.all_reduce(out)
        return out

    @contextmanager
    def learnt(self) -> Iterator[None]:
        """Inside, the model is as it scores the piece's second chunk."""
        first = torch.from_numpy(self.piece[: self.chunk + 1].astype(np.int32)).to(self.run.m.device)
        with self.how.learner() if self.chunk else nullcontext() as learn:
            if learn:
                learn(first, 0.0)
            yield


def make_audit(script: ModuleType, run: Any, blob: bytes) -> Audit:
    """An audit of `run`, whose model holds the artifact's weights, on windows around a document start.

    With test-time training on two chunks more. BadInput where its bits would not repeat.
    """
    h, tokens = run.h, run.held_out("val")
    chunk = h.ttt_chunk_tokens if getattr(h, "ttt_lr", 0) else 0
    if chunk and run.m.pin and not h.deterministic:
        raise BadInput("ttt_lr on a GPU: gradients do not repeat to the bit, which T1 and T3 compare; add "
                       "deterministic=1, or leave it out of the audit with ttt_lr=0")
    if chunk and len(tokens) <= 2 * chunk + 1:
        raise BadInput(f"ttt_chunk_tokens={chunk}: {len(tokens)} tokens of val are no three chunks; audit on "
                       "more text or with smaller chunks")
    length = 2 * chunk + 2 * h.eval_seq_len + 4 * h.eval_stride + h.eval_stride // 2 + 1      # and a tail
    length = min(len(tokens), length)
    starts = np.flatnonzero(tokens[: len(tokens) - length + 1] == h.bos_id)
    middle = int(starts[len(starts) // 2]) if len(starts) else 0
    begin = max(0, min(middle - h.eval_seq_len // 2, len(tokens) - length))
    batch = h.eval_batch_tokens // h.eval_seq_len
    how = script.ScoreRun(h.eval_seq_len, h.eval_stride, batch, "audit", run.log)
    if chunk:
        how = how._replace(chunk=chunk, learner=partial(script.learning, run.model, run.loss_fn, h, run.m))
    return Audit(script, run, blob, np.array(tokens[begin: begin + length]), how, chunk)


# ---- the tests -----------------------------------------------------------------------------------

def earlier_scores_move(audit: Audit, cuts: list[int], seed: int) -> tuple[int, float]:
    """Replace every token from each cut on; how many earlier tokens' scores changed, and by how much at most.

    Target j is token j + 1: with tokens >= cut replaced, targets up to cut - 2 must keep their score.
    """
    random, vocab = np.random.default_rng(seed), audit.run.h.vocab_size
    before, moved, worst = audit.nats(audit.piece), 0, 0.0
    for cut in cuts:
        changed = audit.piece.copy()
        changed[cut:] = random.integers(0, vocab, len(changed) - cut)
        gap = (audit.nats(changed) - before).abs()[: max(0, cut - 1)]
        moved, worst = moved + int((gap > 0).sum()), max(worst, gap.max().item() if len(gap) else 0.0)
    return moved, worst


def own_target_seen(audit: Audit) -> tuple[int, float]:
    """Change the inputs from a column on and keep all targets; scores of the columns before that moved.

    Replacing a token of the stream replaces a target too, so only this sees a model that reads its target.
    """
    how, m, random = audit.how, audit.run.m, np.random.default_rng(4)
    piece = torch.from_numpy(audit.piece[: how.seq_len + 1].astype(np.int64))
    x, y = (t.expand(how.batch, -1).contiguous() for t in (piece[:-1], piece[1:]))
    with audit.learnt(), torch.no_grad():
        before = audit.run.nats_fn(x.to(m.device), y.to(m.device), how.seq_len)
        cuts = torch.from_numpy(random.integers(1, how.seq_len, how.batch))[:, None]
        keep = torch.arange(how.seq_len) < cuts
        other = torch.from_numpy(random.integers(0, audit.run.h.vocab_size, x.shape))
        changed = torch.where(keep, x, other)
        gap = (audit.run.nats_fn(changed.to(m.device), y.to(m.device), how.seq_len) - before).abs().cpu()
    return int((gap[keep] > 0).sum()), gap[keep].max().item()


def audit_flip(audit: Audit) -> Verdict:
    """T1: no score depends on a later token; the embedding at a document start does not see the last one."""
    n, how, h = len(audit.piece), audit.how, audit.run.h
    starts = np.flatnonzero(audit.piece == h.bos_id)
    random = np.random.default_rng(1)
    cuts = {2, how.stride, how.seq_len, how.seq_len + 1, how.seq_len + how.stride, n - 1}
    cuts |= set(random.integers(2, n, 4).tolist()) | {int(b) + d for b in starts[:2] for d in (0, 1)}
    if audit.chunk:          # at and behind the first targets of chunks that are scored after learning
        cuts |= {i * audit.chunk + d for i in (1, 2) for d in (0, 1, 2, how.stride + 1)}
    cuts = sorted(c for c in cuts if 2 <= c < n)
    moved, worst = map(sum, zip(earlier_scores_move(audit, cuts, 2), own_target_seen(audit)))
    leaks = 0
    for b in starts[starts > 0][:8]:
        pair = torch.from_numpy(np.stack([audit.piece[b - 1: b + 1]] * 2).astype(np.int64))
        pair[1, 0] = (pair[1, 0] + 1) % h.vocab_size
        with torch.no_grad():
            x = audit.run.model.embed(pair.to(audit.run.m.device))[:, 1]
        leaks += int((x[0] != x[1]).any())
    return Verdict("T1 causality", moved == 0 and leaks == 0,
                   f"{len(cuts)} cuts, {moved} earlier scores moved (most by {worst:.2g} nats); "
                   f"{leaks} document starts see the token before")


def audit_normalised(audit: Audit) -> Verdict:
    """T2: over the whole vocabulary exp(-nats) sums to 1 at every position, in both forms of window."""
    h, m, how = audit.run.h, audit.run.m, audit.how
    x = torch.from_numpy(audit.piece[: how.seq_len].astype(np.int64)).to(m.device).expand(how.batch, -1)
    off = 0.0
    with audit.learnt(), torch.no_grad():
        for last in (how.seq_len, how.stride):
            total = torch.zeros(last, dtype=torch.float64, device=m.device)
            for ids in torch.arange(h.vocab_size, device=m.device).split(how.batch):
                y = F.pad(ids, (0, how.batch - len(ids)))[:, None].expand(how.batch, how.seq_len)
                nats = audit.run.nats_fn(x.contiguous(), y.contiguous(), last)[: len(ids)]
                total += (-nats.double()).exp().sum(0)
            off = max(off, (total - 1).abs().max().item())
    return Verdict("T2 normalisation", off < 1e-3,
                   f"{how.seq_len} + {how.stride} positions, largest |sum - 1| = {off:.1e}")


def learnt_unscored(audit: Audit) -> int:
    """How many tokens the learner is handed ahead of their score. Here tokens are positions, and no model runs.

    Replacing the token of a chunk's first target replaces the target, too: T1's cuts cannot see it learnt.
    """
    scored, early, m = torch.zeros(len(audit.piece), device=audit.run.m.device), [], audit.run.m

    def nats_fn(x: Tensor, y: Tensor, last: int) -> Tensor:
        scored[y[:, -last:]] = 1
        return torch.zeros(len(x), last, device=m.device)

    def learn(tokens: Tensor, progress: float) -> None:
        dist.all_reduce(scored)
        early.append(int((scored[tokens[1:].long()] == 0).sum()))

    how = audit.how._replace(learner=lambda: nullcontext(learn))
    audit.script.score_targets(nats_fn, np.arange(len(audit.piece)), how, m)
    return sum(early)


def audit_first_score(audit: Audit) -> Verdict:
    """T3: the first score of a chunk comes from a state that has seen nothing of the chunk."""
    step = audit.how.stride
    cuts = {c + 1 for c in range(step, len(audit.piece) - 1, max(step, len(audit.piece) // 6))}
    told, learns = f"{len(cuts)} chunk starts", True
    if audit.chunk:          # the first target of a chunk is changed, or all that is behind it
        cuts |= {i * audit.chunk + d for i in (1, 2) for d in (1, 2)}
        still = audit.nats(audit.piece, audit.how._replace(chunk=0, learner=nullcontext))
        apart = audit.nats(audit.piece) - still
        learns, early = bool((apart[: audit.chunk] == 0).all() and apart.any()), learnt_unscored(audit)
        told += f", 2 behind learning{' that moves no score, or one before it' * (not learns)}"
        told, learns = f"{told}, {early} tokens learnt ahead of their score", learns and not early
    moved, worst = earlier_scores_move(audit, sorted(cuts), 3)
    return Verdict("T3 score before update", moved == 0 and learns,
                   f"{told}, {moved} scores moved (most by {worst:.2g} nats)")


def audit_coverage(audit: Audit) -> Verdict:
    """T4: every target of the split scored exactly once; totals equal the manifest's."""
    run, script, tokens = audit.run, audit.script, audit.run.held_out("val")
    ones = lambda x, y, last: torch.ones(x.size(0), last, device=x.device)
    how = audit.how._replace(learner=lambda: nullcontext(lambda *_: None)) if audit.chunk else audit.how
    count = script.score_targets(ones, tokens, how, run.m)[1]
    dist.all_reduce(count)
    wrong = int((count != 1).sum())
    split = run.dataset.manifest.get("splits", {}).get("val", {})
    weight = int(run.dataset.counts.of(tokens).sum())
    if not split or run.h.val_tokens:
        fits, known = True, "a part of the split" if split else "no manifest to compare with"
    else:
        fits = len(tokens) == split.get("tokens") and split.get("decoded_bytes") in (None, weight)
        known = "manifest agrees" if fits else f"manifest says {split.get('decoded_bytes')} bytes"
    nats, counts = audit.nats(audit.piece).sum().item(), run.dataset.counts
    score, size = script.evaluate(run.nats_fn, audit.piece, counts, audit.how, run.m), len(audit.piece) - 1
    want = (nats / size, nats / math.log(2) / int(counts.of(audit.piece).sum()), size)
    sums = all(abs(a / b - 1) < 1e-9 for a, b in zip((score.loss, score.bpb, score.tokens), want))
    return Verdict("T4 coverage", wrong == 0 and fits and sums,
                   f"{count.numel()} targets, {wrong} not scored exactly once; {weight} bytes; {known}; the "
                   f"score is {'' if sums else 'not '}the sum of its targets")


def decoder(run: Any) -> Callable[[list[list[int]]], list[str]]:
    """Documents' token ids -> texts, by the tokenizer itself: the audited script has no say in it."""
    named = run.dataset.manifest.get("tokenizer", {})
    if named.get("encoding") and not run.h.tokenizer_path:
        import tiktoken
        return tiktoken.get_encoding(named["encoding"]).decode_batch
    import sentencepiece
    path = run.h.tokenizer_path or os.path.join(run.h.data_path, named["file"])
    sp = sentencepiece.SentencePieceProcessor(model_file=path)
    # Without a piece for a space it is spelled in bytes, and decode drops none at the start.
    first = " " if sp.is_unknown(sp.piece_to_id("\u2581")) and sp.is_byte(sp.piece_to_id("<0xE2>")) else ""
    return lambda documents: [x.replace("\u2581", " ").removeprefix(first) for x in sp.decode(documents)]


def audit_bytes(audit: Audit) -> Verdict:
    """T5: the denominator is the UTF-8 length of the decoded documents, document by document."""
    run, tokens = audit.run, audit.run.held_out("val")[:2_000_000]
    starts = np.flatnonzero(tokens == run.h.bos_id)
    ends = np.append(starts[1:], len(tokens))
    weights = np.concatenate([[0], np.cumsum(run.dataset.counts.of(tokens))])
    texts = decoder(run)([tokens[a + 1: b].tolist() for a, b in zip(starts, ends)])
    whole = range(len(starts) - 1)                      # the last one may be cut inside a character
    bad = [i for i in whole if weights[ends[i] - 1] - weights[starts[i]] != len(texts[i].encode())]
    return Verdict("T5 byte accounting", not bad,
                   f"{len(whole)} documents decoded, {len(bad)} of another length")


def word_ngrams(tokens: np.ndarray, counts: Any, bos_id: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """64-bit hashes of all spans of n words, and of whole documents, in a token stream.

    A word begins at a token with a leading space or behind a document start; hashes are polynomials modulo
    2^64 over a random value per token: a span's is a difference of prefix sums times an inverse power.
    """
    base, inverse = np.uint64(0x9E3779B97F4A7C15), np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))
    values = np.random.default_rng(13).integers(0, 1 << 64, len(counts.base), dtype=np.uint64)
    power = np.cumprod(np.full(len(tokens), base), dtype=np.uint64)
    prefix = np.concatenate([[np.uint64(0)], np.cumsum(values[tokens] * power, dtype=np.uint64)])
    undo = np.cumprod(np.full(len(tokens), inverse), dtype=np.uint64)
    documents = np.flatnonzero(tokens == bos_id)
    first = np.zeros(len(tokens), bool)
    first[np.minimum(documents + 1, len(tokens) - 1)] = True
    words = np.flatnonzero((counts.space[tokens] | first) & (tokens != bos_id))
    a, b = words[:-n], words[n:]
    inside = np.searchsorted(documents, a) == np.searchsorted(documents, b)      # not across a document start
    a, b = a[inside], b[inside]
    span = lambda a, b: (prefix[b] - prefix[a]) * undo[a]
    starts, ends = documents + 1, np.append(documents[1:], len(tokens))
    full = starts < ends
    return span(a, b), span(starts[full], ends[full])


# Whole documents: web text honestly repeats short ones. 13-word spans: clean text shares well under 1 %,
# a leaked split nearly all.
LEAKED_DOCUMENTS, LEAKED_SPANS = 0.001, 0.05


def audit_leak(audit: Audit) -> Verdict:
    """T6: which share of validation documents, and of their 13-word spans, is in the training shards."""
    run, h = audit.run, audit.run.h
    grams, documents = word_ngrams(run.held_out("val"), run.dataset.counts, h.bos_id, 13)
    grams, documents = np.unique(grams), np.unique(documents)
    seen, found = np.zeros(len(grams), bool), np.zeros(len(documents), bool)
    files = audit.script.split_files(h.data_path, "train")
    for i, f in enumerate(files):
        run.log.status(f"audit T6: training shard {i + 1}/{len(files)}")
        train = np.asarray(audit.script.load_shard(f, h.vocab_size))
        train_grams, train_documents = word_ngrams(train, run.dataset.counts, h.bos_id, 13)
        seen |= np.isin(grams, train_grams)
        found |= np.isin(documents, train_documents)
    rate, whole = seen.sum() / max(1, len(seen)), found.sum() / max(1, len(found))
    return Verdict("T6 leak", bool(whole <= LEAKED_DOCUMENTS and rate < LEAKED_SPANS),
                   f"{found.sum()} of {len(documents)} documents (limit {100 * LEAKED_DOCUMENTS:.1f} %) and "
                   f"{100 * rate:.3f} % of {len(grams)} 13-word spans (limit {100 * LEAKED_SPANS:.0f} %) are "
                   f"in {len(files)} training shards")


def audit_repeat(audit: Audit) -> Verdict:
    """T7: the container packs to the same bytes again, and scoring twice gives the same bits."""
    header, payload = audit.script.open_artifact(audit.blob)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    raw = b"".join([audit.script.MAGIC, struct.pack("<I", len(text)), text, payload])
    again = lzma.compress(raw, **audit.script.XZ)
    same = bool((audit.nats(audit.piece) == audit.nats(audit.piece)).all())
    words = {True: "equal", False: "different"}
    return Verdict("T7 size and determinism", again == audit.blob and same,
                   f"{len(audit.blob)} bytes, repacked {len(again)}, {words[again == audit.blob]}; "
                   f"scored twice: {words[same]}")


@contextmanager
def watch(*events: str) -> Iterator[list]:
    """The interpreter's audit events of these names, with arguments, that happen inside the block."""
    seen, live = [], [True]
    sys.addaudithook(lambda event, args: seen.append((event, args)) if live and event in events else None)
    try:
        yield seen
    finally:
        live.clear()       # a hook cannot be removed; an empty list silences it


def audit_files(audit: Audit) -> Verdict:
    """T8: a two-step training of this code, one layer deep, opens no held-out file before its clock stops."""
    run, script = audit.run, audit.script
    h = dataclasses.replace(run.h, num_layers=1, xsa_last_n=1, ve_last_n=1, iterations=2, warmup_steps=1,
                            max_wallclock_seconds=0.0, micro_batch_tokens=run.h.train_seq_len,
                            train_batch_tokens=run.h.train_seq_len * run.m.world_size, val_loss_every=0)
    held_out = {os.path.realpath(f) for split in ["val"] + [h.report_split] * bool(h.report_split)
                for f in script.split_files(h.data_path, split)}
    small = script.GPT(h, run.m.ops, run.m.dtype).to(run.m.device)
    with watch("open") as opened:
        script.train(dataclasses.replace(run, h=h, model=small, loss_fn=small.loss, nats_fn=small.nats,
                                         phases={}, splits={}, log=script.Log("", None)))
    paths = [os.path.realpath(os.fsdecode(a[0])) for _, a in opened if isinstance(a[0], (str, bytes))]
    early = sorted(held_out & set(paths))
    return Verdict("T8 file access", not early and bool(paths),
                   f"{len(paths)} files opened while training, {len(early)} of them held out" +
                   (f": {early[0]}" if early else ""))


def audit_network(audit: Audit) -> Verdict:
    """T9: nothing reaches for the network while scoring."""
    with watch("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr",
               "socket.sendto", "socket.sendmsg", "urllib.Request", "subprocess.Popen", "os.system",
               "os.posix_spawn", "os.exec", "os.fork") as calls:
        audit.nats(audit.piece[: audit.how.seq_len + 1])
    first = f", first {calls[0]}" if calls else ""
    return Verdict("T9 network", not calls, f"{len(calls)} network calls{first}")


AUDIT = (audit_flip, audit_normalised, audit_first_score, audit_coverage, audit_bytes, audit_leak,
         audit_repeat, audit_files, audit_network)


# ---- the command ---------------------------------------------------------------------------------

def run_audit(script: ModuleType, artifact: str, knobs: list[str], env: Mapping[str, str]) -> int:
    """Every test on an artifact, a line for each in the script's log. Exit status 1 when one fails."""
    run, blob = script.load_run(artifact, knobs, env)
    seal = lambda path: f"{path} sha256:{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"
    run.log(f"auditing {seal(script.__file__)} with {seal(__file__)}")
    audit, failed = make_audit(script, run, blob), 0
    for test in AUDIT:
        start = time.perf_counter()
        verdict = test(audit)
        failed += not verdict.ok
        run.log(f"audit {verdict.test}: {'ok' if verdict.ok else 'FAIL'} ({verdict.evidence}) "
                f"[{time.perf_counter() - start:.1f} s]")
    run.log(f"audit {len(AUDIT) - failed} of {len(AUDIT)} tests passed")
    return 1 if failed else 0


def parse(argv: list[str]) -> tuple[str, Path, list[str]]:
    """(artifact, script, knobs) of a command line."""
    rest, script = list(argv), None
    while "--script" in rest[:-1]:
        at = rest.index("--script")
        script, rest = Path(rest[at + 1]), rest[:at] + rest[at + 2:]
    if not rest or rest[0].startswith("-") or "=" in rest[0] or "--script" in rest:
        raise BadInput(USAGE)
    return rest[0], script or default_script(rest[0]), rest[1:]


def main(argv: list[str], env: Mapping[str, str]) -> int:
    """Audit an artifact; what a user can mend is said in one line. Returns the exit status."""
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    mendable: tuple[type, ...] = (BadInput,)
    try:
        artifact, path, knobs = parse(argv)
        script = load_audited(path)
        mendable += (script.InputError,)
        return run_audit(script, artifact, knobs, env)
    except mendable as e:
        print(f"audit.py: {e}", file=sys.stderr, flush=True)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
