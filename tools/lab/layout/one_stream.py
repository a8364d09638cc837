"""A GPU's work is queued on one stream, launch by launch: no lanes, and no pass or update is captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from train_gpt import Captured, Machine, contextmanager, nullcontext


class OneStream(Machine):
    """Runs all blocks of device work in order."""

    @contextmanager
    def lanes(self) -> Iterator[Callable]:
        """Leave every block on the current stream."""
        yield nullcontext

    def capture(self, fn: Callable[[], None]) -> Captured:
        """Return fn as it is."""
        return Captured(fn, None)


REPLACES = {"Machine": OneStream}
