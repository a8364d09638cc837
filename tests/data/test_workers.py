"""Worker processes: whatever goes wrong in one of them is one line that names the cause."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import build
import download
import offline
import prepare
import tokenizing
import workers
from messages import BadInput
from tests.data.data_cases import make_documents, one_line, read_split, replaced, write_docs


def test_ctrl_c_that_another_thread_takes_waits_for_the_end_of_the_block():
    """Raised while a process starts, it would leave a half-started one that waits for the rest for ever."""
    stop = threading.Event()
    other = threading.Thread(target=stop.wait)  # as a library has one; it does not block signals
    other.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    finished = False
    try:
        with pytest.raises(KeyboardInterrupt), workers.signals_held_back():
            signal.pthread_kill(other.ident, signal.SIGINT)
            time.sleep(0.1)
            finished = True
    finally:
        signal.signal(signal.SIGINT, before)
        stop.set()
        other.join()
    assert finished


# Leaves the work while processes write results that no pipe holds at once.
LEAVES = """
import sys
import workers

def large(item):
    return bytes(1 << 24)

if __name__ == "__main__":
    try:
        with workers.Workers(2) as pool:
            for _ in pool.run(large, range(100)):
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        print("left")
"""


def test_a_process_that_ends_halfway_through_a_result_is_not_waited_for(tmp_path):
    (tmp_path / "leaves.py").write_text(LEAVES)
    env = os.environ | {"PYTHONPATH": os.path.dirname(workers.__file__)}
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, tmp_path / "leaves.py"], env=env, capture_output=True, text=True, timeout=30
        )
        assert done.stdout == "left\n", done.stderr


class Panic(BaseException):
    """The panic of a Rust library: no Exception."""


class Picky(Exception):
    """An exception that pickles but does not unpickle."""

    def __init__(self, file, line):
        super().__init__(f"{file}, {line}")


def double(item):
    return 2 * item


def panic(item):
    raise Panic("stack overflow\nand more")


def picky(item):
    raise Picky("file", 3)


def die(item):
    os.kill(os.getpid(), signal.SIGKILL)


def out_of_memory(item):
    raise MemoryError


def unreachable(item):
    raise download.HubUnreachable("unplugged")


def blocked_signals(item):
    """Return the signals that this process holds back."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, set())


def bad_start():
    raise BadInput("tokenizer: gone; fetch it")


def panic_start():
    raise Panic("no stack")


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_order(count):
    with workers.Workers(count) as pool:
        assert list(pool.run(double, range(20))) == [(i, 2 * i) for i in range(20)]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (panic, "a library failed (Panic: stack overflow)"),
        (picky, "a worker process failed (Picky: file, 3)"),
        (die, "a worker process died"),
        (out_of_memory, "out of memory; use fewer --workers"),
    ],
)
def test_every_failure_of_a_worker_is_a_data_error(function, words):
    with pytest.raises(BadInput) as caught, workers.Workers(2) as pool:
        list(pool.run(function, [1, 2, 3]))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert "--workers" in str(caught.value)


@pytest.mark.parametrize(
    ("start", "words"), [(bad_start, "tokenizer: gone; fetch it"), (panic_start, "no stack")]
)
def test_a_worker_that_cannot_start_says_why(start, words):
    with pytest.raises(BadInput, match=words), workers.Workers(2, start) as pool:
        list(pool.run(double, [1, 2, 3]))


def test_an_unreachable_hub_is_wrapped_once():
    error = download.HubUnreachable("unplugged")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) and type(copy) is type(error)
    with pytest.raises(download.HubUnreachable) as caught, workers.Workers(2) as pool:
        list(pool.run(unreachable, [1]))
    assert str(caught.value) == str(error)


@pytest.mark.parametrize("error", [Panic, RuntimeError])
def test_a_document_that_the_tokenizer_cannot_encode_is_named(files, monkeypatch, capsys, error):
    encode = tokenizing.SentencePieceCoder.encode

    def fails(self, texts):
        if any("poison" in text for text in texts):
            raise error("stack overflow\nmore")
        return encode(self, texts)

    monkeypatch.setattr(tokenizing.SentencePieceCoder, "encode", fails)
    monkeypatch.setattr(build, "BATCH_CHARS", 1000)  # so that the batch is not the first one
    write_docs(files.train, [*make_documents(100, 20), "some poison"])
    assert prepare.main(files.args) == 2
    line = one_line(capsys)
    assert f"{files.train}: document 20 ('some poison', 11 characters)" in line
    assert "cut the document" in line
    assert f"({error.__name__}: stack overflow)" in line and not files.out.exists()


@pytest.fixture
def tiktoken_encoding(monkeypatch):
    """Make every tiktoken encoding one of single bytes with the pattern of GPT-2."""
    tiktoken = pytest.importorskip("tiktoken")
    patterns = pytest.importorskip("tiktoken_ext.openai_public")
    encoding = tiktoken.Encoding(
        "toy",
        pat_str=patterns.r50k_pat_str,
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return encoding


@pytest.mark.parametrize("space", [" ", "\n", "\u3000"])
def test_a_million_spaces_are_encoded_in_pieces(files, tiktoken_encoding, space):
    documents = ["short", "a" + 1_000_000 * space + "b  c" + 300_000 * space + "d"]
    write_docs(files.train, documents)
    assert prepare.main(replaced(files.args, tokenizer="toy")) == 0
    tokens = read_split(files.out, "train")
    second = np.flatnonzero(tokens == 256)[1] + 1
    assert tiktoken_encoding.decode(tokens[second:].tolist()) == documents[1]
    assert len(tokens) == 2 + sum(len(text.encode()) for text in documents)


def test_pieces_are_cut_only_inside_long_runs_of_spaces(monkeypatch):
    monkeypatch.setattr(tokenizing, "LONGEST_SPACE", 3)
    assert list(tokenizing.cut_spaces("a   b    c\n \n \n \nd")) == ["a   b   ", " c\n \n", " \n ", "\nd"]


def test_a_panic_of_tiktoken_is_one_line(files, tiktoken_encoding, monkeypatch, capsys):
    monkeypatch.setattr(tokenizing, "LONGEST_SPACE", 10**9)
    write_docs(files.train, ["short", "a" + 1_000_000 * " " + "b"])
    assert prepare.main(replaced(files.args, tokenizer="toy")) == 2
    line = one_line(capsys)
    assert "t.txt: document 1 (" in line
    assert "1,000,002 characters" in line
    assert "StackOverflow" in line


def test_a_panic_anywhere_is_one_line(files, monkeypatch, capsys):
    def panics(*_):
        raise Panic("deep inside")

    monkeypatch.setattr(build, "describe_inputs", panics)
    assert prepare.main(files.args) == 1
    assert "a library failed (Panic: deep inside)" in one_line(capsys)


def running(pids):
    """Those of the processes that run; one that ended and waits for its parent does not."""
    asked = ["ps", "-o", "pid=,stat=", "-p", ",".join(map(str, pids))]
    lines = subprocess.run(asked, capture_output=True, text=True).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if not line.split()[1].startswith("Z")]


def children_of(pid):
    """The processes that a process has started."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def within(seconds, holds):
    """Whether something holds before so many seconds have passed."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)
    return holds()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_a_signal_leaves_no_worker(number, tmp_path):
    """A pool's processes would wait for ever. All but SIGKILL leave no file, either."""
    out = tmp_path / "out"
    command = [sys.executable, prepare.__file__, "offline", "--workers", "2", "--out", str(out)]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert within(60, lambda: len(children_of(parent.pid)) >= 3)  # two workers and multiprocessing's tracker
    children = children_of(parent.pid)
    try:
        parent.send_signal(number)
        _, said = parent.communicate(timeout=20)
        assert within(10, lambda: not running(children))
        if number != signal.SIGKILL:
            assert parent.returncode == 128 + number and "interrupted; nothing half-written" in said
            assert "Traceback" not in said and not out.exists()
    finally:
        for pid in running(children):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("verb", ["offline", "auto"])
@pytest.mark.parametrize("count", ["0", "-1"])
def test_workers_below_one_are_refused(tmp_path, capsys, monkeypatch, verb, count):
    monkeypatch.setattr(prepare, "DATASETS", tmp_path / "datasets")
    assert prepare.main([verb, "--workers", count]) == 2
    assert one_line(capsys) == f"error: --workers {count}: choose 1 or more"
    assert not (tmp_path / "datasets").exists()


def test_a_reading_process_that_dies_is_one_line(tmp_path, sources, monkeypatch, capsys):
    monkeypatch.setattr(offline, "installed", lambda: sources)
    monkeypatch.setattr(offline, "documents_of_files", die)
    assert prepare.main(["offline", "--workers", "2", "--out", str(tmp_path / "out")]) == 2
    assert "a worker process died" in one_line(capsys)


def test_a_worker_that_starts_never_hears_of_ctrl_c():
    """Interrupted while it imports, it would show a traceback."""
    if not hasattr(signal, "pthread_sigmask"):
        pytest.skip("no signal masks here")
    with workers.Workers(2) as pool:
        for _, blocked in pool.run(blocked_signals, [1, 2]):
            assert blocked == {signal.SIGINT}
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
