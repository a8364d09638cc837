"""What the trainer's tests share: a tiny config, a small dataset on disk, gloo ranks, calls of main."""

import atexit
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import struct
import sys
import tempfile
import traceback
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt as t  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: a second thread only waits

BOS = 1
TINY = dict(
    vocab_size=96, num_layers=4, model_dim=32, num_heads=4, num_kv_heads=2, mlp_mult=2.0, rope_dims=4,
    xsa_last_n=2, ve_last_n=2, ve_dim=8, bigram_vocab_size=64, bigram_dim=8, train_seq_len=16, eval_seq_len=16,
    eval_stride=4, eval_batch_tokens=64, train_batch_tokens=128, micro_batch_tokens=32, iterations=20,
    warmup_steps=2, max_wallclock_seconds=0.0, attn_windows="",
)  # fmt: skip


def tiny(**knobs):
    """A Config small enough for a test, through load_config and so through its checks."""
    return t.load_config([f"{k}={v}" for k, v in (TINY | knobs).items()], {})


def machine(rank=0, world=1):
    """A CPU Machine as init_machine makes it, without a process group."""
    names = dict(device="cpu", attention="cpu", qk="torch", mlp="torch", compile="none") | {"pass": "eager", "update": "eager"}
    levels = (t.Level(None, slice(0, world), slice(rank, rank + 1)),)
    return t.Machine(rank, world, torch.device("cpu"), torch.float32, lambda f: f, t.Ops(), False, levels, names)


def noisy_model(h, seed=0, scale=0.1, dtype=torch.float32):
    """A GPT none of whose parameters is zero or one, so that no path is switched off."""
    model = t.GPT(h, dtype=dtype).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator).to(dtype))
    return model


def padding_of(optimizer, model, home):
    """The rows of a bank that no parameter covers, (n, M * N)."""
    bank = optimizer.bank[home].flatten(0, 1)
    free = torch.ones(len(bank), dtype=torch.bool)
    for p in (getattr(model, s.name) for s in t.MATRICES if s.buffer == home):
        first = p.storage_offset() // p[0].numel()
        assert bool(free[first : first + len(p)].all())  # no two parameters share a row
        free[first : first + len(p)] = False
    return bank[free]


def random_tokens(h, shape, seed=0, bos_share=0.1):
    """Token ids with a BOS here and there, int64."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(h.bos_id + 1, h.vocab_size, shape)
    tokens[rng.random(shape) < bos_share] = h.bos_id
    return torch.from_numpy(tokens)


def refused_by(main, capsys, *args):
    """The line with which the bench's main(argv, env) refuses its input: one, on stderr, status 2."""
    assert main([*map(str, args)], {}) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("bench.py: "), err
    return err


# ---------------------------------------------------------------- data on disk


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    """A shard by the format's definition; `count` lies about the number of tokens."""
    header = struct.pack("<3i", magic, version, len(tokens) if count is None else count)
    Path(path).write_bytes(header.ljust(1024, b"\0") + np.asarray(tokens, dtype="<u2").tobytes())
    return str(path)


def temporary_folder():
    folder = Path(tempfile.mkdtemp(prefix="bankshot-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def random_documents(h, count, seed, lengths=(1, 40)):
    """Documents as id lists; each begins with BOS and holds its own number, so that no two are equal."""
    rng = np.random.default_rng(seed)
    body = lambda: rng.integers(h.bos_id + 1, h.vocab_size, rng.integers(*lengths)).tolist()
    low = h.vocab_size - h.bos_id - 1
    return [[h.bos_id, h.bos_id + 1 + i // low, h.bos_id + 1 + i % low, *body()] for i in range(count)]


def shard_folder(folder, h, shards, seed=0, split="train"):
    """Shards of random documents. shards: documents in each. Returns the documents, shard by shard."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = random_documents(h, sum(shards), seed)
    groups, start = [], 0
    for i, n in enumerate(shards):
        groups.append(documents[start : start + n])
        start += n
        write_shard(folder / f"x_{split}_{i:06d}.bin", sum(groups[-1], []))
    return groups


WORDS = (
    "the of and to in model train token byte loss shard rank step weight head layer value query key norm "
    "river stone winter garden letter window machine paper copper silver engine harbour candle bridge"
).split()


def english(count, seed):
    """Documents of words in which a word mostly names its successor: something to learn in 20 steps."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        word, out = int(rng.integers(len(WORDS))), []
        for _ in range(int(rng.integers(30, 90))):
            out.append(WORDS[word])
            word = (word * 7 + 3) % len(WORDS) if rng.random() < 0.9 else int(rng.integers(len(WORDS)))
        documents.append(" ".join(out) + ".")
    return documents


def train_tokenizer(path, lines, vocab_size, model_type="bpe", add_dummy_prefix=False):
    """A SentencePiece model with the challenge's settings, at `path`; the path as text."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size, model_type=model_type,
        byte_fallback=True, bos_id=1, eos_id=2, unk_id=3, pad_id=0, normalization_rule_name="nmt_nfkc",
        character_coverage=0.999, hard_vocab_limit=False, num_threads=1, minloglevel=2,
        add_dummy_prefix=add_dummy_prefix,
    )  # fmt: skip
    Path(path).write_bytes(model.getvalue())
    return str(path)


@lru_cache(maxsize=None)
def english_dataset():
    """A dataset folder as data/ writes it: two train shards, val, a second split, tokenizer, manifest."""
    import sentencepiece

    folder = temporary_folder()
    texts = english(150, 0)
    model = train_tokenizer(folder / "tokenizer.model", texts, 320)
    sp = sentencepiece.SentencePieceProcessor(model_file=model)
    ids = [[BOS, *sp.encode(x)] for x in texts]
    write_shard(folder / "tiny_train_000000.bin", sum(ids[:80], []))
    write_shard(folder / "tiny_train_000001.bin", sum(ids[80:], []))
    held_out = english(25, 1)
    val = [[BOS, *sp.encode(x)] for x in held_out]
    write_shard(folder / "tiny_val_000000.bin", sum(val, []))
    write_shard(folder / "tiny_other_000000.bin", sum(([BOS, *sp.encode(x)] for x in english(9, 2)), []))
    sha = hashlib.sha256(Path(model).read_bytes()).hexdigest()
    manifest = {
        "format": 1, "name": "tiny", "bos_id": BOS, "splits": {}, "source": {},
        "tokenizer": {"kind": "sentencepiece", "file": "tokenizer.model", "encoding": None, "sha256": sha,
                      "vocab_size": sp.vocab_size()},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    text_bytes = sum(len(sp.decode(d[1:]).encode()) for d in val)
    return SimpleNamespace(
        path=str(folder), tokenizer=model, vocab_size=sp.vocab_size(), val=sum(val, []), val_bytes=text_bytes
    )


def english_args(**knobs):
    """Command-line knobs of a tiny model on english_dataset()."""
    data = english_dataset()
    tiny_run = TINY | dict(
        data_path=data.path, vocab_size=data.vocab_size, num_layers=2, train_seq_len=32, eval_seq_len=32,
        eval_stride=8, eval_batch_tokens=512, train_batch_tokens=512, micro_batch_tokens=256,
        train_log_every=1, run_id="run",
    )  # fmt: skip
    return [f"{k}={v}" for k, v in (tiny_run | knobs).items()]


# ---------------------------------------------------------------- process groups


@contextlib.contextmanager
def group_of_one():
    """The process group of a run on one process; yields its Machine."""
    m = t.init_machine(tiny(), {})
    try:
        yield m
    finally:
        torch.distributed.destroy_process_group()


# What a fork server imports once. init_machine's torch.use_deterministic_algorithms imports Inductor, 2 s of
# every rank; where there is a GPU it may look at it, which must not be before the fork.
PRELOAD = ["torch", "torch.distributed", "numpy", "pytest"] + ["torch._inductor"] * (not torch.cuda.is_available())


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_entry(fn, rank, env, out, args):
    """One rank: the environment of torchrun, then fn(rank, *args); its result or the error goes to `out`."""
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        result = ("ok", fn(rank, *args))
    except BaseException:
        result = ("error", traceback.format_exc())
    torch.save(result, f"{out}/{rank}.tmp")
    os.replace(f"{out}/{rank}.tmp", f"{out}/{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_ranks(fn, world, *args, timeout=60):
    """[fn(rank, *args) for each of `world` gloo processes]. fn must be importable and call init_machine itself.

    A fork server imports torch once, so that a process costs milliseconds, not seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    out = temporary_folder()
    env = dict(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    env["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    processes = [context.Process(target=rank_entry, args=(fn, r, env, str(out), args)) for r in range(world)]
    for p in processes:
        p.start()
    results = []
    try:
        for r, p in enumerate(processes):
            p.join(timeout)
            file = out / f"{r}.pt"
            assert file.exists(), f"rank {r} of {world} gave no result (exit code {p.exitcode})"
            results.append(torch.load(file, weights_only=False))
    finally:
        for p in processes:
            if p.is_alive():
                p.terminate()
    errors = [text for status, text in results if status == "error"]
    assert not errors, "\n".join(errors)
    return [value for _, value in results]


def stop_one_line(argv, capsys):
    """main(argv) must refuse: status 2 and exactly one line on stderr, which is returned."""
    capsys.readouterr()
    status = t.main(argv)
    err = capsys.readouterr().err
    assert status == 2, f"status {status}"
    assert err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err, err
    return err


def emulate_fp8(monkeypatch, machine=False):
    """The MLP's kernels as torch lines, which a CPU runs in bf16, too: h's last bit says u < 0, as the kernel's does.
    machine: a CPU's binds the MLP as a GPU's does."""

    def hidden(u, dtype):
        h, kind = t.F.leaky_relu(u, 0.5).square().to(dtype), {4: torch.int32, 2: torch.int16}[dtype.itemsize]
        return ((h.view(kind) & -2) + (u < 0).to(kind)).view(dtype)

    def mlp_op(a, w, h):
        if h is None:
            return hidden(a.float() @ w.float().T, a.dtype)
        negative, root = h.view({4: torch.int32, 2: torch.int16}[h.itemsize]) & 1 == 1, h.float().sqrt()
        return (a.float() @ w.float() * torch.where(negative, -root, 2 * root)).to(h.dtype)

    def mlp8_op(x, up, down, steps, dtype):
        h = hidden(x.float() @ up.float().T * steps[0], dtype)
        h8 = (h.float() / steps[1]).clamp(max=448).to(x.dtype)
        return h, torch._scaled_mm(h8, down.t(), *steps[1:], out_dtype=dtype)

    monkeypatch.setattr(t, "mlp_op", mlp_op)
    monkeypatch.setattr(t, "mlp8_op", mlp8_op)
    initial = t.init_machine

    def bound(h, env, **how):
        m, (ops, names) = initial(h, env, **how), t.bind_ops(h, torch.device("cpu"))
        return dataclasses.replace(m, ops=t.Ops(mlp=ops.mlp), names=m.names | {"mlp": names["mlp"]})

    if machine:
        monkeypatch.setattr(t, "bind_attention", lambda h, device: (t.attend_sdpa, "none"))
        monkeypatch.setattr(t, "init_machine", bound)
