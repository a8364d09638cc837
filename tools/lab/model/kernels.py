"""The profile of one compiled forward+backward on a GPU: its kernels by class, and the largest of them."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from lab.shared.timing import aligned
from lab.shared.trainer import Session, TrainingParts

PASSES = 3  # traced
LARGEST = 25  # kernels listed
NAME_WIDTH = 100
CLASSES = (
    ("attention", re.compile(r"sdpa|fmha|flash|attention", re.I)),
    ("matrix products", re.compile(r"nvjet|cutlass|gemm|gemv|cublas|xmma|splitK|triton_tem", re.I)),
    ("Inductor reductions", re.compile(r"^triton_(red|per|mix)_")),
    ("Inductor pointwise", re.compile(r"^triton_")),
    ("copies and fills", re.compile(r"^mem(cpy|set)", re.I)),
)
DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a Chrome trace


def trace_events(cuda: bool, run: Callable[[], None]) -> list[dict]:
    """Run under torch.profiler and return the events of its Chrome trace. `run` ends synchronised."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as trace:
        run()

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        trace.export_chrome_trace(path)
        with open(path, encoding="utf-8") as file:
            return json.load(file)["traceEvents"]


def own_kernels(path: Path) -> set[str]:
    """Return the names of the script's Triton kernels."""
    return set(re.findall(r"^@triton\.jit\s+def (\w+)", path.read_text(encoding="utf-8"), re.M))


def kernel_class(name: str, own: set[str]) -> str:
    """Return the class of a kernel by its name. own: the script's Triton kernels."""
    if name in own:
        return "our kernels"
    return next((label for label, pattern in CLASSES if pattern.search(name)), "others (ATen)")


def kernel_tables(events: list[dict], own: set[str], passes: int) -> dict:
    """Return {classes, kernels} of a trace's events: ms and launches of one pass, the largest first."""
    found: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") in DEVICE_EVENTS:
            found.setdefault(event["name"], []).append(event["dur"] / 1000)
    kernels = [
        dict(name=name, which=kernel_class(name, own), ms=sum(ms) / passes, count=len(ms) / passes)
        for name, ms in found.items()
    ]

    classes: dict[str, dict] = {}
    for kernel in kernels:
        row = classes.setdefault(kernel["which"], dict(which=kernel["which"], ms=0.0, count=0.0))
        row["ms"] += kernel["ms"]
        row["count"] += kernel["count"]

    def largest_first(rows: list[dict]) -> list[dict]:
        return sorted(rows, key=lambda row: -row["ms"])

    return dict(classes=largest_first([*classes.values()]), kernels=largest_first(kernels))


def profile(s: Session, run: TrainingParts, script: Path) -> None:
    """Trace the compiled forward+backward; print and report its kernels by class and the largest of them."""
    if not s.cuda:
        s.skip("profile", "kernels are traced on a GPU")
        return

    def passes() -> None:
        for _ in range(PASSES):
            run.both()
        s.m.sync()

    run.both()
    s.m.sync()
    found = kernel_tables(trace_events(True, passes), own_kernels(script), PASSES)
    s.report["profile"] = found

    total = sum(row["ms"] for row in found["classes"])
    rows = [(row["which"], "", f"{row['ms']:.3f}", f"{row['count']:.0f}") for row in found["classes"]]
    s.say(f"\nkernels of one forward+backward, {total:.3f} ms in all")
    s.say(aligned(("class", "", "ms", "launches"), rows))

    rows = [
        (row["name"][:NAME_WIDTH], row["which"], f"{row['ms']:.3f}", f"{row['count']:.0f}")
        for row in found["kernels"][:LARGEST]
    ]
    s.say(f"\nthe {len(rows)} largest kernels\n" + aligned(("kernel", "class", "ms", "launches"), rows))
