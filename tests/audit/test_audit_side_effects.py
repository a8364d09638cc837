"""Side effects: held-out files read while training (T8), the network used while scoring (T9)."""

import dataclasses
import os
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import train_gpt as t
from auditor import effects
from auditor.subject import make_audit
from tests.audit.audit_cases import audited, fresh, on_data, with_nats
from tests.helpers import write_shard

# ---------------------------------------------------------------- T8: held-out files while training


def val_file(h):
    return t.split_files(h.data_path, "val")[0]


def in_loader(read):
    """Return a loader that reads held-out tokens when it is made."""

    class Loader(t.TokenLoader):
        def __init__(self, h, *rest):
            super().__init__(h, *rest)
            read(h)

    return Loader


def read_in_chunks(h):
    with open(val_file(h), "rb") as f:
        f.read(10)


def read_by_descriptor(h):
    os.close(os.open(val_file(h), os.O_RDONLY))


def read_by_bytes_name(h):
    with open(val_file(h).encode(), "rb") as f:
        f.read(10)


def read_by_path(h):
    Path(val_file(h)).read_bytes()


def read_by_roundabout_name(h):
    with open(h.data_path + "/../data/" + val_file(h).rsplit("/", 1)[1], "rb") as f:
        f.read(10)


def read_by_link(h):
    link = Path(h.data_path, "more_tokens.bin")
    if not link.exists():
        link.symlink_to(val_file(h))
    link.read_bytes()


READS = {
    "load_shard": lambda h: t.load_shard(val_file(h)),
    "open": read_in_chunks,
    "a descriptor": read_by_descriptor,
    "a name as bytes": read_by_bytes_name,
    "a pathlib path": read_by_path,
    "a roundabout name": read_by_roundabout_name,
    "a symbolic link": read_by_link,
    "numpy": lambda h: np.fromfile(val_file(h), np.uint16),
}


@pytest.mark.parametrize("how", READS)
def test_a_loader_that_opens_the_split_fails(how, honest, group, monkeypatch, tmp_path):
    run = on_data(honest, tmp_path)
    monkeypatch.setattr(t, "TokenLoader", in_loader(READS[how]))
    fails, verdicts = audited(run, honest.blob)
    assert fails == {"T8"}, verdicts


def test_a_validation_before_the_clock_stops_fails(honest, group, monkeypatch):
    """Warm-up scores real validation tokens."""
    warm = t.warmup

    def warmup(run, *args):
        t.validate(run, 0, 0.0)
        return warm(run, *args)

    monkeypatch.setattr(t, "warmup", warmup)
    fails, verdicts = audited(fresh(honest.run), honest.blob)
    assert fails == {"T8"}, verdicts


def test_training_on_the_report_split_fails(honest, group, monkeypatch, tmp_path):
    """The second held-out split is held out too."""
    run = on_data(honest, tmp_path)
    other = str(tmp_path / "data" / "x_other_000000.bin")
    write_shard(other, honest.val[0])
    run = fresh(run, h=dataclasses.replace(run.h, report_split="other"))
    assert not audited(run, honest.blob).fails
    monkeypatch.setattr(t, "TokenLoader", in_loader(lambda h: t.load_shard(other)))
    assert audited(fresh(run), honest.blob).fails == {"T8"}


# ---------------------------------------------------------------- T9: network while scoring


def connect():
    with socket.socket() as s:
        s.settimeout(1)
        s.connect_ex(("127.0.0.1", 9))


def datagram():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.sendto(b"x", ("127.0.0.1", 9))


def message():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.sendmsg([b"x"], [], 0, ("127.0.0.1", 9))


def fetch():
    with suppress(OSError):
        urllib.request.urlopen("http://127.0.0.1:9/", timeout=1)


def child():
    subprocess.run([sys.executable, "-S", "-c", ""])


def shell():
    os.system(":")


CALLS = {
    "connect": connect,
    "getaddrinfo": lambda: socket.getaddrinfo("127.0.0.1", 9),
    "gethostbyname": lambda: socket.gethostbyname("127.0.0.1"),
    "a datagram": datagram,
    "a message": message,
    "a URL": fetch,
    "a child process": child,
    "a shell": shell,
}


@pytest.mark.parametrize("how", CALLS)
def test_a_scorer_that_calls_out_fails(how, honest, group):
    def nats_fn(x, y, last):
        CALLS[how]()
        return honest.run.model.nats(x, y, last)

    verdict = effects.audit_network(make_audit(t, with_nats(honest.run, nats_fn), honest.blob))
    assert not verdict.ok, verdict


def test_only_the_network_test_sees_the_network(honest, group):
    def nats_fn(x, y, last):
        connect()
        return honest.run.model.nats(x, y, last)

    assert audited(with_nats(honest.run, nats_fn), honest.blob).fails == {"T9"}
