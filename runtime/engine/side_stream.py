"""The collective stream of a rank: a thread that runs actions in order beside those of the compute stream.

The waits of an all-to-all, for peers, for the network and for the counts that the host needs, then take no time from
computing. Order decides everything: actions are handed over in the program's order, so every member of a group starts
its collectives in one order, and an action is handed over when all that it reads is made or was handed over before it.
Where a device has streams, the thread launches on one of its own, which follows what the handing thread had launched,
and who waits for an action follows it (`mipipe.runtime.engine.streams`): a host that runs ahead is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from mipipe.graphs.errors import MipipeError, RunError
from mipipe.runtime.engine.streams import DeviceStreams, HostStreams


class SideStream:
    """`submit` hands an action over, `wait` returns when what was handed over under a key is done, `launched` when its
    thread is through it, whatever its device still does. ``streams`` are the device's."""

    def __init__(self, streams: DeviceStreams | None = None) -> None:
        self.streams: DeviceStreams = streams or HostStreams()
        self._pool = ThreadPoolExecutor(1, "collective")
        self._by_key: dict[Hashable, Future[Any]] = {}
        self._last: Future[Any] | None = None
        self._failed: MipipeError | None = None

    def submit(self, action: Callable[[], None], what: str, keys: Iterable[Hashable]) -> None:
        """Run an action after those before it; ``what`` names it in errors. None runs after one that failed."""
        self._last = self._pool.submit(self._guarded, action, what, self.streams.mark())
        self._by_key.update(dict.fromkeys(keys, self._last))

    def wait(self, key: Hashable) -> None:
        """Return when the last action under this key, if there is one, is done; raise what it raised."""
        future = self._by_key.pop(key, None)
        if future is not None:
            self.streams.follow(future.result())

    def launched(self, key: Hashable) -> None:
        """As `wait`, for who needs what the action left on the host alone."""
        future = self._by_key.pop(key, None)
        if future is not None:
            future.result()

    def join(self) -> None:
        """Return when all actions are done; raise what the first failing one raised."""
        self._by_key.clear()
        if self._last is not None:
            self.streams.follow(self._last.result())
            self._last = None

    def abandon(self) -> None:
        """Run nothing more; what runs ends by its own timeout."""
        self._failed = self._failed or RunError("the run has ended")
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _guarded(self, action: Callable[[], None], what: str, handed: Any) -> Any:
        """Run an action behind what was launched when it was handed over; the mark behind it."""
        if self._failed is not None:
            raise self._failed
        try:
            with torch.no_grad(), self.streams.beside():
                self.streams.follow(handed)
                action()
                return self.streams.mark()
        except Exception as error:
            text = str(error) if isinstance(error, MipipeError) else f"{type(error).__name__}: {error}"
            kind = type(error) if isinstance(error, MipipeError) else RunError
            self._failed = kind(f"{what} on the collective stream: {text}")
            raise self._failed from error
