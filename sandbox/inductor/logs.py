"""What a child logs, warns and counts, as plain data, and its replay in the parent."""

from __future__ import annotations

import builtins
import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any, Final

from sandbox.errors import WireError
from sandbox.inductor import compat

#: Beyond so many records or characters the rest is counted and left out.
MAX_RECORDS: Final = 20_000
MAX_CHARACTERS: Final = 32 << 20

_ROOT: Final = "torch"


def _loggers() -> dict[str, logging.Logger]:
    return {
        name: logger
        for name, logger in sorted(logging.root.manager.loggerDict.items())
        if isinstance(logger, logging.Logger) and (name == _ROOT or name.startswith(_ROOT + "."))
    }


def levels() -> dict[str, Any]:
    """Level and state of each of torch's loggers, artifact loggers included, and whether structured trace is on."""
    trace = compat.structured_trace
    return {
        "levels": {name: logger.level for name, logger in _loggers().items()},
        "root": logging.root.level,
        "trace": bool(trace.handlers) and trace.isEnabledFor(logging.DEBUG),
    }


class _Capture(logging.Handler):
    """Keeps records as plain dicts, up to :data:`MAX_RECORDS`."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.records: list[dict[str, Any]] = []
        self.left_out = 0
        self._characters = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception as error:  # noqa: BLE001 - a record's arguments may raise anything when formatted
            message = f"{record.msg!r} (cannot be formatted: {error})"
        if record.exc_info and record.exc_info[1] is not None:
            message = f"{message}\n{logging.Formatter().formatException(record.exc_info)}"
        entry: dict[str, Any] = {
            "name": record.name,
            "level": record.levelno,
            "message": message,
            "pathname": record.pathname,
            "lineno": record.lineno,
            "function": record.funcName or "",
            "created": record.created,
            "trace": None,
        }
        if record.name == compat.structured_trace.name:
            payload = getattr(record, "payload", None)
            entry["trace"] = {
                "metadata": json.dumps(getattr(record, "metadata", {}), default=str),
                "payload": payload if isinstance(payload, str) else None,
            }
        self._characters += len(message) + (len(entry["trace"]["payload"] or "") if entry["trace"] else 0)
        if len(self.records) >= MAX_RECORDS or self._characters > MAX_CHARACTERS:
            self.left_out += 1
        else:
            self.records.append(entry)


def _set_level(logger: logging.Logger, level: int) -> None:
    # Each call empties the caches of every logger, which is most of a small job's own time.
    if logger.level != level:
        logger.setLevel(level)


@contextlib.contextmanager
def captured(wanted: dict[str, Any]) -> Iterator[_Capture]:
    """In a child: torch's loggers have the parent's levels, and what they log is kept instead of written."""
    capture = _Capture()
    trace = compat.structured_trace
    saved = {name: (logger, logger.level, logger.propagate, logger.handlers[:]) for name, logger in _loggers().items()}
    try:
        for name, (logger, _, _, _) in saved.items():
            logger.handlers[:] = []
            logger.propagate = name != _ROOT
            _set_level(logger, wanted["levels"].get(name, logger.level))
        for name in wanted["levels"]:
            if name not in saved:
                logging.getLogger(name).setLevel(wanted["levels"][name])
        root = logging.getLogger(_ROOT)
        root.propagate = False
        root.addHandler(capture)
        if wanted["trace"]:
            trace.propagate = False
            trace.addHandler(capture)
        elif trace is not root:
            trace.propagate = False
        yield capture
    finally:
        for logger, level, propagate, handlers in saved.values():
            logger.handlers[:] = handlers
            logger.propagate = propagate
            _set_level(logger, level)


def warnings_data(caught: list[warnings.WarningMessage]) -> list[dict[str, Any]]:
    """Caught warnings as plain data."""
    return [
        {
            "category": f"{item.category.__module__}:{item.category.__qualname__}",
            "text": str(item.message),
            "filename": item.filename,
            "lineno": item.lineno,
        }
        for item in caught[:1000]
    ]


def _field(entry: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
        raise WireError(f"a log entry lacks a proper {name!r}")
    return entry[name]


def check(data: Any) -> None:
    """Raise WireError unless ``data`` is what a child's `logs` and `warnings` look like."""
    if not isinstance(data, dict) or not all(isinstance(data.get(name), list) for name in ("logs", "warnings")):
        raise WireError("the reply lacks its logs and warnings")
    for entry in data["logs"]:
        for name, kind in (("name", str), ("level", int), ("message", str), ("pathname", str), ("lineno", int)):
            _field(entry, name, kind)
        _field(entry, "function", str)
        _field(entry, "created", float)
        if _field(entry, "trace", (dict, type(None))) is not None:
            _field(entry["trace"], "metadata", str)
            _field(entry["trace"], "payload", (str, type(None)))
    for entry in data["warnings"]:
        for name, kind in (("category", str), ("text", str), ("filename", str), ("lineno", int)):
            _field(entry, name, kind)


def replay_logs(data: Any, job_id: str) -> None:
    """Hand a child's records to the loggers of the same names, each with the extra attribute ``job_id``.

    Raises:
        WireError: when ``data`` (a reply, or its part with `logs` and `warnings`) is malformed.
    """
    check(data)
    for entry in data["logs"]:
        logger = logging.getLogger(entry["name"])
        record = logging.LogRecord(
            entry["name"], entry["level"], entry["pathname"], entry["lineno"], "%s", (entry["message"],), None,
            entry["function"],
        )  # fmt: skip
        record.created = entry["created"]
        record.job_id = job_id
        if entry["trace"] is not None:
            try:
                metadata = json.loads(entry["trace"]["metadata"])
            except ValueError as error:
                raise WireError(f"the metadata of a trace record is not JSON: {error}") from None
            record.msg, record.args = "", ()
            record.metadata, record.payload = metadata, entry["trace"]["payload"]
        logger.handle(record)
    for entry in data["warnings"]:
        # A registry of its own: what the child showed once is shown here, subject to the caller's filters.
        warnings.warn_explicit(entry["text"], _category(entry["category"]), entry["filename"], entry["lineno"])


def _category(name: str) -> type[Warning]:
    """The builtin warning class of that name, else UserWarning."""
    found = getattr(builtins, name.removeprefix("builtins:"), None)
    return found if isinstance(found, type) and issubclass(found, Warning) else UserWarning
