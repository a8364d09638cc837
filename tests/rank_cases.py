"""Process groups for the tests of every folder: one process, or gloo ranks forked from a server."""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import time
import traceback

import torch

import train_gpt as t
from tests.helpers import PACKED, ROOT, share_packed_code, temporary_folder, tiny


@contextlib.contextmanager
def group_of_one():
    """Hold the process group of a run on one process; yields its Machine."""
    m = t.init_machine(tiny(), {})
    try:
        yield m
    finally:
        torch.distributed.destroy_process_group()


# Modules that the fork server imports, once for all ranks.
PRELOAD = ["torch", "torch.distributed", "numpy", "pytest"]
if not torch.cuda.is_available():
    # init_machine imports Inductor, which takes 2 s. It may look at a GPU, which must not be before the fork.
    PRELOAD += ["torch._inductor", "train_gpt"]

LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"


def fork_server():
    """Return a multiprocessing context whose server imports torch once; then a process costs milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    here = os.getcwd()
    os.chdir(ROOT)  # where a server that starts now finds train_gpt.py; a rank changes to its caller's folder
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.chdir(here)
    return context


def group_environment(world):
    """Return the variables that torchrun would set for every one of `world` ranks on this machine."""
    return {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE,
    }


def free_port():
    """Return a port on which nobody listens at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def rank_entry(fn, rank, env, out, args, packed):
    """Run one rank: set torchrun's environment, call fn(rank, *args), write its result or error to `out`.

    packed: the PACKED of the process that starts it.
    """
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
    share_packed_code(packed)
    torch.set_num_threads(1)
    try:
        result = ("ok", fn(rank, *args))
    except BaseException:
        result = ("error", traceback.format_exc())
    torch.save(result, f"{out}/{rank}.tmp")
    os.replace(f"{out}/{rank}.tmp", f"{out}/{rank}.pt")

    if result[0] == "ok":
        wait_for_results(out, int(env["WORLD_SIZE"]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def wait_for_results(out, world, seconds=10):
    """Wait until every rank has a result: one that leaves early breaks the groups that others still make."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not all(os.path.exists(f"{out}/{rank}.pt") for rank in range(world)):
        time.sleep(0.01)


def run_ranks(fn, world, *args, timeout=60):
    """Return [fn(rank, *args) for each of `world` gloo processes].

    fn must be importable and call init_machine itself. Raises AssertionError with the tracebacks of the ranks
    that failed, or if a rank gives no result within `timeout` seconds.
    """
    out = temporary_folder()
    context = fork_server()
    env = group_environment(world)
    processes = []
    for rank in range(world):
        processes.append(context.Process(target=rank_entry, args=(fn, rank, env, str(out), args, PACKED)))
        processes[-1].start()

    results = []
    try:
        for rank, process in enumerate(processes):
            process.join(timeout)
            file = out / f"{rank}.pt"
            assert file.exists(), f"rank {rank} of {world} gave no result (exit code {process.exitcode})"
            results.append(torch.load(file, weights_only=False))
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()

    errors = [text for status, text in results if status == "error"]
    assert not errors, "\n".join(errors)
    return [value for _, value in results]
