"""What this process has registered at a resource tracker of `multiprocessing` and not taken back.

A resource tracker is one more process: it removes the semaphores and shared memory that were registered and still are
when its last client ends, with a warning about "leaked" objects on stderr. It has the list; its clients keep none. So
the one function by which all of them talk to it is watched. Source: `ResourceTracker._send` in
Lib/multiprocessing/resource_tracker.py (3.11 to 3.13); `multiprocess` and `loky` have copies of it.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any, Final

#: Imported by a template, so that it costs a worker nothing, and not by the service: `multiprocessing` gives `__main__`
#: a second name in `sys.modules`.
TRACKER: Final = "multiprocessing.resource_tracker"
_MODULES: Final = (
    TRACKER,
    "multiprocess.resource_tracker",
    "joblib.externals.loky.backend.resource_tracker",
)


class Registrations:
    """Names that are registered at the moment, with their type (`semaphore`, `shared_memory`, ...)."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def watch(self) -> None:
        """From now on, in this process, for the trackers of the modules that are loaded, and for Python's own."""
        importlib.import_module(TRACKER)
        seen = set()
        for name in _MODULES:
            tracker = getattr(sys.modules.get(name), "ResourceTracker", None)
            # Loky's is a subclass of that of multiprocessing, which is watched already.
            if tracker is not None and "_send" in vars(tracker) and tracker not in seen:
                seen.add(tracker)
                tracker._send = self._watched(tracker._send)

    def _watched(self, send: Any) -> Any:
        @functools.wraps(send)
        def watched(tracker: Any, command: str, name: str, kind: str) -> Any:
            answer = send(tracker, command, name, kind)
            if command == "REGISTER":
                self.names[name] = kind
            elif command in ("UNREGISTER", "MAYBE_UNLINK"):
                self.names.pop(name, None)
            return answer

        return watched
