"""For every test: the root importable, few threads, no network, gpu tests skipped without a GPU."""

import dataclasses
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]

# Before torch is imported anywhere; child processes inherit these.
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"
if shutil.which("nvidia-smi") is None:  # kernels run in Triton's interpreter; read when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

LOOPBACK = {"127.0.0.1", "::1", "localhost"}
real_connect = socket.socket.connect


def loopback_connect(self, address):
    if isinstance(address, tuple) and address[0] not in LOOPBACK:
        raise OSError(f"tests have no network: connect to {address[0]!r} refused")
    return real_connect(self, address)


socket.socket.connect = loopback_connect


@pytest.fixture(autouse=True)
def attention_switches():
    """Restore PyTorch's attention kernels after a test: binding one switches the others off."""
    import torch

    names = "cudnn", "flash", "mem_efficient", "math"
    before = [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in names]
    yield
    for name, on in zip(names, before):
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(on)


@pytest.fixture
def quick_bench(monkeypatch):
    """The lab without knobs from the environment, each section timed three times."""
    import train_gpt as t
    from lab import timing

    for f in dataclasses.fields(t.Config):
        monkeypatch.delenv(f.name.upper(), raising=False)
    monkeypatch.setattr(timing, "HOST_SECONDS", 0.0)


def pytest_collection_modifyitems(items):
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
