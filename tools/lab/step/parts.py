"""Times everything that a training step does, each part on its own, in bursts on a cool card."""

from __future__ import annotations

import time
from typing import Any

import torch

from lab.shared.timing import typical, wall_times
from lab.shared.trainer import Session, TrainingParts, capture_backward, gradient_buffers, quiet_run
from older_scripts import machine_names


def report_times(s: Session, name: str, times: list[float]) -> None:
    """Print and report the line `bench NAME: median ...`."""
    middle = typical(s, name, times)
    names = machine_names(s.m)
    least = min(times)
    most = max(times)
    s.report["whole"].append(dict(name=name, median_ms=middle, min_ms=least, max_ms=most, n=len(times)))
    s.progress.advance()
    s.say(
        f"bench {name}: median {middle:.2f} ms, min {least:.2f}, max {most:.2f} "
        f"(device {names['device']}, attention {names['attention']})"
    )


def time_step(s: Session, run: TrainingParts) -> None:
    """Time each part of a training step, then the whole step.

    forward+backward is training's: a CUDA graph where the machine captures. Its memory is freed when this
    function returns, because a forward launched by the host, as in later measurements, needs as much again.
    """
    t = s.t
    m = s.m
    hp = t.hyper_at(s.h, 0, 0.0)
    buffers = gradient_buffers(run.optimizer)
    loss_and_norm = torch.zeros(2, dtype=torch.float64, device=m.device)

    def clock_check() -> None:
        fetched = m.fetch(loss_and_norm)
        m.agree(time.perf_counter(), 0.0)
        fetched()

    s.progress.begin("bench: a training step")
    report_times(s, "forward", wall_times(s, run.forward))
    backward, failure = capture_backward(s, run)
    if failure:
        s.skip("a CUDA graph of forward+backward: launched one by one", failure)

    parts = {
        "forward+backward": lambda: backward(run.fresh(), s.accum),
        "optimizer": lambda: run.optimizer.step(hp),
        "ema": lambda: run.ema.update(0.0),
        "zero gradients": lambda: torch._foreach_zero_(buffers),
        "clock check": clock_check,
        "step": lambda: t.train_step(backward, run.optimizer, [run.fresh()] * s.accum, hp),
    }
    s.progress.expect(len(parts) + 1, "parts")
    for name, fn in parts.items():
        report_times(s, name, wall_times(s, fn))

    if s.cuda:
        s.report["peak_mib"] = torch.cuda.max_memory_allocated() // 2**20
        s.say(
            f"bench rows:{s.sequences} seq_len:{s.h.train_seq_len} accum:{s.accum} peak memory allocated: "
            f"{s.report['peak_mib']} MiB"
        )

    loss = backward(run.fresh(), s.accum)
    with quiet_run(s) as logged:
        times = wall_times(s, lambda: t.log_step(logged, 1, loss, 1.0))
    report_times(s, "log line", times)


def time_loader(s: Session) -> Any:
    """Time the loader and return it, or None if there is no data.

    loader.next: its batch is ready. The time goes into starting a thread for the next batch (0.2 ms on a CPU;
    waking a standing thread would take 0.01) and, after the copy, into waiting for the device: by then that
    thread holds the interpreter. Training does not wait there; the sustained difference tells what it sees.
    """
    try:
        loader = s.t.TokenLoader(s.h, s.m)
    except s.t.InputError as error:
        s.skip("loader", error)
        return None

    s.progress.begin("bench: the loader")
    s.progress.expect(2, "parts")
    index = iter(range(1 << 30))
    report_times(s, "loader.next", wall_times(s, loader.next, lambda: loader.pending.result()))
    report_times(s, "loader.build (in its thread)", wall_times(s, lambda: loader.build(next(index))))
    loader.pending.result()
    return loader
