"""What a child logs, warns and counts, as plain data, and its replay in the parent."""

from __future__ import annotations

import builtins
import contextlib
import functools
import json
import logging
import math
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from sandbox.errors import WireError
from sandbox.inductor import compat

#: Beyond so many records or characters the rest is counted and left out.
MAX_RECORDS: Final = 20_000
MAX_CHARACTERS: Final = 32 << 20
MAX_WARNINGS: Final = 1000
MAX_WARNING: Final = 20_000  # characters of one warning's text

_ROOT: Final = "torch"
_NAME: Final = re.compile(r"^torch(\.\w{1,100}){0,20}$", re.ASCII)
#: What makes a terminal do things, or hides text: control characters but newline and tab, marks of direction,
#: halves of surrogate pairs (which no stream takes).
_UNPRINTABLE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


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


def _characters(entry: dict[str, Any]) -> int:
    """What a record counts for; parent and child count alike."""
    trace = entry["trace"] or {}
    texts = (entry["message"], entry["pathname"], entry["function"], trace.get("metadata"), trace.get("payload"))
    return sum(len(text) for text in texts if text)


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
        self._characters += _characters(entry)
        if len(self.records) >= MAX_RECORDS or self._characters > MAX_CHARACTERS:
            self.left_out += 1
        else:
            self.records.append(entry)

    def told_of(self, folder: str, final: str) -> list[dict[str, Any]]:
        """The records, with ``final`` where messages name ``folder``: its files move there."""
        if folder != final:
            for record in self.records:
                if folder in record["message"]:
                    record["message"] = record["message"].replace(folder, final)
        return self.records


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
            "text": str(item.message)[:MAX_WARNING],
            "filename": item.filename,
            "lineno": item.lineno,
        }
        for item in caught[:MAX_WARNINGS]
    ]


# In the parent ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Told:
    """The logs and warnings of a reply, checked."""

    records: list[tuple[logging.Logger, logging.LogRecord]]
    warnings: list[tuple[str, type[Warning], str, int]]
    dropped: int
    """Records for loggers that are not torch's."""


def _field(entry: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
        raise WireError(f"a log entry lacks a proper {name!r}")
    return entry[name]


def _number(entry: Any, name: str) -> int:
    found = _field(entry, name, int)
    if not 0 <= found < 1 << 31:
        raise WireError(f"a log entry's {name!r} is out of range")
    return int(found)


def check(data: Any) -> None:
    """Raise WireError unless ``data`` is what a child's `logs` and `warnings` look like, within the limits."""
    _told(data, "")


def _told(data: Any, job_id: str) -> _Told:
    if not isinstance(data, dict) or not all(isinstance(data.get(name), list) for name in ("logs", "warnings")):
        raise WireError("the reply lacks its logs and warnings")
    if len(data["logs"]) > MAX_RECORDS or len(data["warnings"]) > MAX_WARNINGS:
        raise WireError("the reply has too many logs or warnings")
    told = _Told([], [], 0)
    known, characters, dropped = _loggers(), 0, 0
    for entry in data["logs"]:
        record = _record(entry, job_id)
        characters += _characters(entry)
        if characters > MAX_CHARACTERS:
            raise WireError(f"the reply's logs have more than {MAX_CHARACTERS} characters")
        logger = _nearest(record.name, known)
        if logger is None:
            dropped += 1
        else:
            record.name = logger.name  # formatters ask for the logger by it, which makes one
            told.records.append((logger, record))
    sources = _sources(len(sys.modules)) if data["warnings"] else frozenset()
    for entry in data["warnings"]:
        text, filename = _field(entry, "text", str), _field(entry, "filename", str)
        if len(text) > MAX_WARNING:
            raise WireError("a warning of the reply is too long")
        # Whoever shows a warning opens the file that it names, to show the line: only files of this program's own.
        place = filename if filename in sources else f"<{job_id}>"
        told.warnings.append((_clean(text), _category(_field(entry, "category", str)), place, _number(entry, "lineno")))
    return _Told(told.records, told.warnings, dropped)


def _record(entry: Any, job_id: str) -> logging.LogRecord:
    name = _field(entry, "name", str)
    if not _NAME.match(name):
        name = ""
    pathname, function = _clean(_field(entry, "pathname", str)[:1000]), _clean(_field(entry, "function", str)[:200])
    level, message = _number(entry, "level"), _clean(_field(entry, "message", str))
    record = logging.LogRecord(name, level, pathname, _number(entry, "lineno"), "%s", (message,), None, function)
    created = _field(entry, "created", float)
    if math.isfinite(created) and 0 < created < 1e11:
        record.created = created
        record.msecs = created % 1 * 1000
    record.job_id = job_id
    trace = _field(entry, "trace", (dict, type(None)))
    if (trace is not None) is not (name == compat.structured_trace.name):
        raise WireError("a trace record is for the structured trace, and no other is")
    if trace is not None:
        payload, metadata = _field(trace, "payload", (str, type(None))), _field(trace, "metadata", str)
        try:
            found = json.loads(metadata)
        except (ValueError, RecursionError) as error:
            raise WireError(f"the metadata of a trace record is not JSON: {type(error).__name__}") from None
        if not isinstance(found, dict):
            raise WireError("the metadata of a trace record is not a table")
        record.msg, record.args = "", ()
        record.metadata, record.payload = found, None if payload is None else _clean(payload)
    return record


def _clean(text: str) -> str:
    """``text`` without what could steer a terminal or a reader's eye."""
    return _UNPRINTABLE.sub("", text)


def _nearest(name: str, known: dict[str, logging.Logger]) -> logging.Logger | None:
    """The logger of that name, or of the nearest package above it, among those that exist: a reply makes none."""
    while name:
        if name in known:
            return known[name]
        name = name.rpartition(".")[0]
    return None


@functools.lru_cache(maxsize=1)
def _sources(_count: int) -> frozenset[str]:
    """The source files of the modules that this process has loaded, so many."""
    files = (getattr(module, "__dict__", {}).get("__file__") for module in list(sys.modules.values()))
    return frozenset(file for file in files if isinstance(file, str) and file.endswith(".py"))


def replay_logs(data: Any, job_id: str) -> int:
    """Hand a child's records to the loggers of the same names, each with the extra attribute ``job_id``.

    Returns:
        How many records were for loggers that are not torch's, and were dropped.

    Raises:
        WireError: when ``data`` (a reply, or its part with `logs` and `warnings`) is malformed; nothing has been
            told then.
    """
    told = _told(data, job_id)
    for logger, record in told.records:
        # A child is asked for the levels that this process has; one that sends more is not listened to.
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
    for text, category, filename, line in told.warnings:
        # A registry of its own: what the child showed once is shown here, subject to the caller's filters.
        warnings.warn_explicit(text, category, filename, line)
    return told.dropped


def _category(name: str) -> type[Warning]:
    """The builtin warning class of that name, else UserWarning."""
    found = vars(builtins).get(name.removeprefix("builtins:"))
    return found if isinstance(found, type) and issubclass(found, Warning) else UserWarning
