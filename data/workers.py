"""Worker processes whose every failure reaches the parent as an exception that it can show as one line."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from threading import Thread, current_thread, main_thread
from types import FrameType
from typing import TypeVar

from messages import BadInput, describe, is_panic

Item = TypeVar("Item")
Result = TypeVar("Result")

_start_error: BaseException | None = None  # in a worker: why it could not be prepared


def portable(error: BaseException) -> BaseException:
    """Return an exception that can be raised in another process: `error` if it can, else a BadInput.

    The panic of a Rust library is not an Exception, and its class cannot be imported.
    """
    if isinstance(error, MemoryError):
        return BadInput("out of memory; use fewer --workers or smaller documents")
    if is_panic(error):
        return BadInput(f"a library failed ({describe(error)}); repeat with --workers 1")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        return BadInput(f"a worker process failed ({describe(error)}); repeat with --workers 1")
    return error


def leave_with_parent() -> None:
    """End this process when its parent ends, even by SIGKILL: a pool's processes would wait for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def start_worker(start: Callable[..., None], args: tuple) -> None:
    """Call `start` in a new worker process.

    An error here would break the pool and be lost, so it is kept for `work` to raise.
    """
    global _start_error
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to every process; the parent acts
    Thread(target=leave_with_parent, daemon=True).start()
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        start(*args)
    except BaseException as error:
        _start_error = portable(error)


def work(function: Callable[[Item], Result], item: Item) -> Result:
    """Return function(item), in a worker process. Raises the error of `start_worker`, if any."""
    if _start_error is not None:
        raise _start_error
    try:
        return function(item)
    except BaseException as error:
        raise portable(error) from None


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the end of the block, in which processes may start.

    A worker interrupted during start-up would print a traceback, or wait for ever. A process inherits the
    blocked signals: it hears of SIGTERM when it has started, and never of Ctrl-C. To block them is not enough
    for this process: a library's thread that does not block a signal may take it, and Python then handles the
    signal in the main thread, at once.
    """
    if (
        not hasattr(signal, "pthread_sigmask") or current_thread() is not main_thread()
    ):  # Windows; no handlers
        yield
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    held_back = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, note) for number in held_back}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, held_back)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def nothing() -> None:
    """Do nothing: the default for workers that need no preparation."""


class Workers:
    """Processes that do the same work on many items, as a context manager. With count=1 this process does it.

    start: a function, called once in each process with `args`. It and the errors of the work must be
    importable by name; other errors arrive as BadInput.
    """

    def __init__(self, count: int, start: Callable[..., None] = nothing, *args: object) -> None:
        self.pool: ProcessPoolExecutor | None = None
        self.depth = 2 * count + 2  # most items in memory
        if count == 1:
            start(*args)
        else:
            context = multiprocessing.get_context("spawn")  # fork is unsafe beside other threads
            self.pool = ProcessPoolExecutor(count, context, start_worker, (start, args))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self.pool:
            return
        if kind is not None:  # nobody wants what they are working on
            for process in multiprocessing.active_children():
                process.terminate()
            # One may have ended halfway through a result. As long as this process could write there as well,
            # the pool's thread would wait for the rest of it.
            self.pool._result_queue._writer.close()
        self.pool.shutdown(cancel_futures=True)

    def run(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Yield (item, function(item)) in the order of `items`, whatever the number of processes."""
        if not self.pool:
            for item in items:
                yield item, function(item)
            return

        waiting = deque()
        try:
            for item in items:
                with signals_held_back():  # a submission may start a process
                    waiting.append((item, self.pool.submit(work, function, item)))
                if len(waiting) == self.depth:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for item, future in waiting:
                yield item, future.result()
        except BrokenProcessPool:
            raise BadInput("a worker process died, probably for lack of memory; use --workers 1") from None
