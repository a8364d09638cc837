"""Checkpoints of train_gpt.py: written by a thread, two sets kept, read by any number of ranks. No pickle.

    OUT_DIR/RUN_ID.stepN.RofW.ckpt := u32 header_bytes | header JSON | float32 payload | sha256 of all before

A file is the share of one of W ranks, the R-th in order of the matrices that it updates, of all that N steps
changed; shares end to end are whole tensors. The header holds step, training clock in ms, progress of the
average, what wrote it (config, script, data), and the index of the tensors as in an artifact, whose reader
reads them. No step draws random numbers, and batch n is the
loader's n-th: that is all of the state. `train_gpt.py train checkpoint_every=SECONDS resume=auto` uses it;
a run without these knobs does not load this file.
"""
from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import re
import struct
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

FREE = ("run_id", "out_dir", "data_path", "tokenizer_path", "checkpoint_every", "resume")
NAME = re.compile(r"(.*)\.step(\d+)\.\d+of(\d+)\.ckpt(?:\.tmp)?")


class Checkpoints:
    """What train() calls: resume before the first step, save after each, last_good when it ends badly."""

    def __init__(self, run, optimizer, ema) -> None:
        """run, optimizer, ema: train_gpt.py's, whichever copy of the file is running."""
        self.t = sys.modules[type(run).__module__]
        self.run, self.m, self.optimizer, self.ema = run, run.m, optimizer, ema
        self.base, self.good, self.saved_ms = run.log.path.removesuffix(".txt"), 0, 0.0
        self.whole = {"flat_m": optimizer.flat_m, "flat_v": optimizer.flat_v}       # the same on every rank
        for (name, p), average in zip(run.model.named_parameters(), ema.average):
            self.whole |= {name: p.data, f"average.{name}": average}
        self.part = self.m.levels[-1][2].start
        self.shares = {name: self.share(x) for name, x in self.whole.items()}
        for kind, state in (("momentum", optimizer.momentum), ("second", optimizer.second)):
            self.shares |= {f"{kind}.{name}": x for name, x in state.items()}
        self.made_by = {k: v for k, v in dataclasses.asdict(run.h).items() if k not in FREE}
        script = hashlib.sha256(Path(self.t.__file__).read_bytes()).hexdigest()
        self.made_by |= {"script": script, "data": run.dataset.manifest_sha256}
        device = (torch.cuda.set_device, (self.m.device,)) if self.m.pin else ()   # a new thread has the first
        self.pool, self.pending = ThreadPoolExecutor(1, "checkpoint", *device), None

    def share(self, whole: Tensor) -> Tensor:
        """This rank's rows of what is the same on every rank."""
        rows = -(-len(whole) // self.m.world_size)
        return whole[rows * self.part:][:rows]

    # ---- writing

    def write(self, step: int, header: dict, fetched: Callable[[], list[Tensor]]) -> None:
        """In the thread: this rank's file. InputError when it cannot be, or when a value is not finite."""
        host = {name: x.contiguous().numpy() for name, x in zip(self.shares, fetched()) if len(x)}
        for name, x in host.items():
            if not np.isfinite(x).all():
                raise self.t.InputError(f"{name} is not finite")
        ends = np.cumsum([0] + [x.nbytes for x in host.values()]).tolist()
        index = [[name, "f32", x.shape, at] for (name, x), at in zip(host.items(), ends)]
        text = json.dumps({**header, "tensors": index}).encode()
        chunks, digest = [struct.pack("<I", len(text)), text, *host.values()], hashlib.sha256()
        for chunk in chunks:                                # hashing and writing let go of the interpreter
            digest.update(chunk)
        path = f"{self.base}.step{step}.{self.part}of{self.m.world_size}.ckpt"
        self.t.write_atomic(path, *chunks, digest.digest())

    def save(self, step: int, train_ms: float, last: bool = False) -> None:
        """Have the state after `step` written when it is time and no rank is writing; last: now, to the end.

        checkpoint_every=0 writes none.
        """
        every = 1000 * self.run.h.checkpoint_every
        due = every > 0 and (last or train_ms >= self.saved_ms + every)
        if due and self.settled(wait=last) and self.good != step:
            header = dict(made_by=self.made_by, step=step, train_ms=train_ms, progress=self.ema.progress)
            fetched = self.m.fetch(*self.shares.values())
            future = self.pool.submit(self.write, step, header, fetched)
            self.pending, self.saved_ms = (step, future), train_ms
        if last:
            self.settled(wait=True)

    def settled(self, wait: bool) -> bool:
        """Whether no rank is writing; the log then says how it ended, and sets older than the last two go.

        All ranks begin a set at one step, and only when the one before is known to be whole or given up: no
        file that a whole set needs is ever removed.
        """
        if self.pending is None:
            return True
        (step, future), reasons = self.pending, [None] * self.m.world_size
        dist.all_gather_object(reasons, str(future.exception() or "") if wait or future.done() else None)
        if None in reasons:
            return False
        self.pending = None
        if any(reasons):
            last = f"step:{self.good} stays" if self.good else "there is none before it"
            self.run.log(f"checkpoint step:{step} failed: {max(reasons)}; {last}")
            return True
        self.run.log(f"checkpoint step:{step}")
        for path in self.files() if self.m.rank == 0 else ():
            if self.good != int(NAME.fullmatch(path)[2]) < step:
                os.remove(path)
        self.good = step
        return True

    def last_good(self) -> int:
        """The step of the newest whole set, once no rank is writing; 0 without one."""
        self.settled(wait=True)
        return self.good

    def files(self) -> list[str]:
        """Every checkpoint file of this run, halves left by a kill included."""
        return [f for f in glob.glob(glob.escape(self.base) + ".step*") if NAME.fullmatch(f)]

    # ---- reading

    def resume(self) -> tuple[int, float]:
        """(step, train_ms) of the newest sound set, now the state of all ranks; (0, 0.0) without one.

        InputError when another config, script or data set wrote it, or when the file named is unsound.
        """
        wanted = self.run.h.resume
        files = self.files() if wanted == "auto" else [wanted]
        found = {(int(m[2]), int(m[3]), m[1]) for f in files if (m := NAME.fullmatch(f))}
        for step, world, base in sorted(found, reverse=True):
            parts, reasons = [], [""] * self.m.world_size
            try:
                parts = [self.read(f"{base}.step{step}.{r}of{world}.ckpt") for r in range(world)]
                reason = ""
            except (OSError, ValueError) as e:
                reason = str(e)
            dist.all_gather_object(reasons, reason)
            if not any(reasons):
                self.check(f"{base}.step{step}.*", parts[0][0]["made_by"])
                self.put(step, parts)
                self.run.log(f"resumed step:{step} from {base}.step{step}.* "
                             f"train_time:{self.saved_ms:.0f}ms written by {world} ranks")
                return step, self.saved_ms
            self.run.log(f"checkpoint step:{step} skipped: {max(reasons)}")
        if wanted != "auto":
            raise self.t.InputError(f"{wanted}: not of a sound checkpoint; resume=auto takes the newest")
        if self.run.log.goes_on:
            self.run.log("resumed step:0 from the beginning: no sound checkpoint")
        return 0, 0.0

    def read(self, path: str) -> tuple[dict, dict[str, Tensor]]:
        """Header and tensors of one file. ValueError or OSError when it is damaged or not there."""
        with open(path, "rb") as f:
            blob = f.read()
        if hashlib.sha256(blob[:-32]).digest() != blob[-32:]:
            raise ValueError(f"{path}: checksum mismatch")
        end = 4 + struct.unpack("<I", blob[:4])[0]
        header = json.loads(blob[4:end])
        return header, self.t.read_tensors(header, blob[end:-32])

    def check(self, path: str, made_by: dict) -> None:
        """InputError names what differs between this run and the one that wrote a checkpoint."""
        odd = sorted(k for k in self.made_by.keys() | made_by if self.made_by.get(k) != made_by.get(k))
        if odd:
            raise self.t.InputError(f"{path}: written with another {', '.join(odd)}; resume with what wrote "
                                    "it, or begin anew with another run_id")

    @torch.no_grad()
    def put(self, step: int, parts: list) -> None:
        """Make what the ranks of a set wrote the state of this one."""
        for name, x in self.shares.items():
            pieces = [tensors[name] for _, tensors in parts if name in tensors]
            if name in self.whole:
                self.whole[name].copy_(torch.cat(pieces))
            else:
                x.copy_(torch.cat(pieces)[self.optimizer.rows[name.partition(".")[2]]])
        header = parts[0][0]
        self.optimizer.steps = self.good = step
        self.ema.progress, self.saved_ms = header["progress"], header["train_ms"]
