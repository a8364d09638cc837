"""T7, T8, T9: the same again, no held-out file, no network."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from auditor.protocols import Log
from auditor.subject import Audit, Verdict
from older_scripts import compressor, one_layer, passes_of, with_own_signals


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
        **passes_of(script, run, small),
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
