"""For every test: few threads, no network, gpu tests skipped without a GPU."""

import dataclasses
import os
import shutil
import socket

import pytest

# Before torch is imported anywhere; child processes inherit these.
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"
if shutil.which("nvidia-smi") is None:
    # Triton reads this when it is imported; its interpreter then runs the kernels.
    os.environ.setdefault("TRITON_INTERPRET", "1")

LOOPBACK = {"127.0.0.1", "::1", "localhost"}
real_connect = socket.socket.connect


def loopback_connect(self, address):
    """Connect like socket.connect. Raises OSError for an internet address other than this machine's."""
    if isinstance(address, tuple) and address[0] not in LOOPBACK:
        raise OSError(f"tests have no network: connect to {address[0]!r} refused")
    return real_connect(self, address)


socket.socket.connect = loopback_connect


@pytest.fixture(autouse=True)
def attention_switches():
    """Restore PyTorch's attention kernels: binding one switches the others off for the process."""
    import torch

    names = ("cudnn", "flash", "mem_efficient", "math")
    enabled = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in names}
    yield
    for name, is_enabled in enabled.items():
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(is_enabled)


@pytest.fixture(scope="session", autouse=True)
def every_program_is_packed_once():
    """Pack a program once for all runs of the session: a tiny run spends nearly half of its time on that."""
    import train_gpt as t
    from tests import helpers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t, "packed_code", helpers.packed_once)
        yield


@pytest.fixture
def clean_environment(monkeypatch):
    """Keep every knob of the caller's environment from a test."""
    import train_gpt as t

    for f in dataclasses.fields(t.Config):
        monkeypatch.delenv(f.name.upper(), raising=False)


@pytest.fixture
def quick_bench(clean_environment, monkeypatch):
    """Free the lab of knobs from the environment, and let it time each section only three times."""
    from lab.shared import timing

    monkeypatch.setattr(timing, "HOST_SECONDS", 0.0)


def pytest_collection_modifyitems(items):
    """Skip the tests marked gpu if there is no GPU. torch is imported only if there are such tests."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return

    import torch

    if torch.cuda.is_available():
        return
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
