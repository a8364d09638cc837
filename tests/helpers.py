"""Helpers of all tests: tiny models and their arguments, datasets on disk, refused commands."""

import atexit
import hashlib
import io
import itertools
import json
import shutil
import struct
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import train_gpt as t

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)  # tensors are tiny: a second thread only waits

pack_anew = t.packed_code
PACKED = {}  # source -> its packed code


def packed_once(source):
    """Return the packed code of a program. Packs it only the first time."""
    if source not in PACKED:
        PACKED[source] = pack_anew(source)
    return PACKED[source]


def share_packed_code(packed):
    """Let the trainer in this process, a rank of a test, take what its parent has packed: `packed`."""
    PACKED.update(packed)
    t.packed_code = packed_once


BOS = 1

TINY = dict(
    preset="record_sp1024",  # knobs that are not given have its values
    vocab_size=96,
    num_layers=4,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_mult=2.0,
    rope_dims=4,
    xsa_last_n=2,
    ve_last_n=2,
    ve_dim=8,
    bigram_vocab_size=64,
    bigram_dim=8,
    attn_windows="",
    train_seq_len=16,
    train_batch_tokens=128,
    micro_batch_tokens=32,
    iterations=20,
    warmup_steps=2,
    max_wallclock_seconds=0.0,
    eval_seq_len=16,
    eval_stride=4,
    eval_batch_tokens=64,
)


# ---------------------------------------------------------------- tiny models


# Every part of the model that `record_sp1024` lacks, and none of the optional ones that it has.
OTHER_PARTS = dict(
    bigram_vocab_size=0,
    ve_last_n=0,
    loop_layers="0 1",
    loop_times=2,
    skip_gates=1,
    norm_gains=1,
    attn_gate_dims=8,
    parallel_last_n=1,
    parallel_form="two_streams",
)


def tiny(**knobs):
    """Return a Config small enough for a test. It comes from load_config and so has passed its checks."""
    return t.load_config(as_arguments(TINY | knobs), {})


def as_arguments(knobs):
    """Return {knob: value} as key=value arguments."""
    return [f"{key}={value}" for key, value in knobs.items()]


def machine(rank=0, world=1):
    """Return a CPU Machine as init_machine makes it, without a process group."""
    return t.Machine(
        rank=rank,
        world_size=world,
        device=torch.device("cpu"),
        dtype=torch.float32,
        compile=lambda function: function,
        ops=t.Ops(),
        levels=(t.Level(None, slice(0, world), slice(rank, rank + 1)),),
        device_name="cpu",
    )


def noisy_model(h, seed=0, scale=0.1, dtype=torch.float32):
    """Return a GPT with noise on every parameter, so that no path is switched off by a zero."""
    model = t.GPT(h, dtype=dtype).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model


def padding_of(optimizer, model, buffer):
    """Return the rows of the bank `buffer` that no parameter covers, (n, M * N)."""
    bank = optimizer.bank[buffer].flatten(0, 1)
    free = torch.ones(len(bank), dtype=torch.bool)
    for parameter in (getattr(model, s.name) for s in t.MATRICES if s.buffer == buffer):
        first = parameter.storage_offset() // parameter[0].numel()
        rows = slice(first, first + len(parameter))
        assert bool(free[rows].all())  # no two parameters share a row
        free[rows] = False
    return bank[free]


def gaussian(*shape, seed=0):
    """Return a tensor of normal numbers, float32, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def all_equal(a, b):
    """Return whether two lists of tensors are equal bit for bit. Raises ValueError if one is longer."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def random_tokens(h, shape, seed=0, bos_share=0.1):
    """Return random token ids of which a share of `bos_share` is BOS, int64 of `shape`."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(h.bos_id + 1, h.vocab_size, shape)
    tokens[rng.random(shape) < bos_share] = h.bos_id
    return torch.from_numpy(tokens)


# ---------------------------------------------------------------- datasets on disk


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    """Write a shard by the format's definition and return its path. count: a false number of tokens."""
    header = struct.pack("<3i", magic, version, len(tokens) if count is None else count)
    Path(path).write_bytes(header.ljust(1024, b"\0") + np.asarray(tokens, dtype="<u2").tobytes())
    return str(path)


def temporary_folder():
    """Make a folder that is removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="bankshot-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def random_documents(h, count, seed, lengths=(1, 40)):
    """Return random documents as lists of ids: BOS, the document's number as two ids, a body.

    The number makes all documents different. lengths: of a body, at least and less than.
    """
    rng = np.random.default_rng(seed)
    first = h.bos_id + 1
    base = h.vocab_size - first
    documents = []
    for number in range(count):
        body = rng.integers(first, h.vocab_size, rng.integers(*lengths)).tolist()
        documents.append([h.bos_id, first + number // base, first + number % base, *body])
    return documents


def shard_folder(folder, h, shards, seed=0, split="train"):
    """Write shards of random documents and return the documents, shard by shard.

    shards: the number of documents in each shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    documents = iter(random_documents(h, sum(shards), seed))
    groups = [list(itertools.islice(documents, count)) for count in shards]
    for index, group in enumerate(groups):
        write_shard(folder / f"x_{split}_{index:06d}.bin", joined(group))
    return groups


def joined(documents):
    """Return the ids of documents, one after the other."""
    return list(itertools.chain.from_iterable(documents))


WORDS = (
    "the of and to in model train token byte loss shard rank step weight head layer value query key norm "
    "river stone winter garden letter window machine paper copper silver engine harbour candle bridge"
).split()


def english(count, seed):
    """Return `count` texts in which a word mostly determines the next: something to learn in 20 steps."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        word = int(rng.integers(len(WORDS)))
        words = []
        for _ in range(int(rng.integers(30, 90))):
            words.append(WORDS[word])
            if rng.random() < 0.9:
                word = (word * 7 + 3) % len(WORDS)
            else:
                word = int(rng.integers(len(WORDS)))
        texts.append(" ".join(words) + ".")
    return texts


def train_tokenizer(path, texts, vocab_size, model_type="bpe", **options):
    """Train a SentencePiece model with the challenge's settings, write it to `path` and return the path.

    options: of SentencePiece, in place of the challenge's.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type=model_type,
        pad_id=0,
        bos_id=BOS,
        eos_id=2,
        unk_id=3,
        normalization_rule_name="nmt_nfkc",
        character_coverage=0.999,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **({"add_dummy_prefix": False, "byte_fallback": True} | options),
    )
    Path(path).write_bytes(model.getvalue())
    return str(path)


@cache
def english_dataset():
    """Make a dataset folder as data/ does: two train shards, val, a second split, tokenizer, manifest.

    Returns its path, the tokenizer's path, vocab_size, the tokens of val and their UTF-8 bytes (val_bytes).
    """
    import sentencepiece

    folder = temporary_folder()
    texts = english(150, 0)
    model = train_tokenizer(folder / "tokenizer.model", texts, 320)
    processor = sentencepiece.SentencePieceProcessor(model_file=model)

    def encoded(texts):
        return [[BOS, *processor.encode(text)] for text in texts]

    train = encoded(texts)
    val = encoded(english(12, 1))
    write_shard(folder / "tiny_train_000000.bin", joined(train[:80]))
    write_shard(folder / "tiny_train_000001.bin", joined(train[80:]))
    write_shard(folder / "tiny_val_000000.bin", joined(val))
    write_shard(folder / "tiny_other_000000.bin", joined(encoded(english(9, 2))))

    tokenizer = {
        "kind": "sentencepiece",
        "file": "tokenizer.model",
        "encoding": None,
        "sha256": hashlib.sha256(Path(model).read_bytes()).hexdigest(),
        "vocab_size": processor.vocab_size(),
    }
    manifest = {
        "format": 1,
        "name": "tiny",
        "bos_id": BOS,
        "splits": {},
        "source": {},
        "tokenizer": tokenizer,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return SimpleNamespace(
        path=str(folder),
        tokenizer=model,
        vocab_size=processor.vocab_size(),
        val=joined(val),
        val_bytes=sum(len(processor.decode(document[1:]).encode()) for document in val),
    )


def english_args(**knobs):
    """Return the arguments that train a tiny model on english_dataset()."""
    data = english_dataset()
    tiny_run = TINY | dict(
        data_path=data.path,
        run_id="run",
        vocab_size=data.vocab_size,
        num_layers=2,
        train_seq_len=32,
        train_batch_tokens=512,
        micro_batch_tokens=256,
        train_log_every=1,
        eval_seq_len=32,
        eval_stride=8,
        eval_batch_tokens=512,
    )
    return as_arguments(tiny_run | knobs)


# ---------------------------------------------------------------- refused commands


def stop_one_line(argv, capsys, wanted=2, main=t.main):
    """Return the one line on stderr with which main ends under `argv`, and check its status."""
    capsys.readouterr()
    status = main(argv)
    err = capsys.readouterr().err
    assert status == wanted, f"status {status}"
    assert err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err, err
    return err


def refused_by(main, capsys, *args):
    """Return the one line on stderr with which the bench's main(argv, env) refuses `args`; status 2."""
    assert main([*map(str, args)], {}) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("bench.py: "), err
    return err
