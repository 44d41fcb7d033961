"""Turns pydantic's errors into messages for people: a line per fault, with key, value and what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

from pydantic import BaseModel, ValidationError

_SIZE: Final = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?\s*$", re.IGNORECASE)
_POWER: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
#: Lines, at most: a capsule from elsewhere may hold hundreds of thousands of faults.
_MAX_LINES: Final = 100
#: Characters of a key that are shown, at most.
_MAX_KEY: Final = 100
#: pydantic names the branch of a union as the last part of a place; people do not know unions.
_BRANCHES: Final = frozenset({"bool", "int", "float", "str", "none"})


def explain(what: str, error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """A line per fault. ``what`` is what the messages call the whole (a file's name); ``model`` lets them name the
    closest known key for an unknown one."""
    lines: dict[str, None] = {}  # the branches of one union give the same line
    for fault in error.errors(include_url=False):
        if len(lines) == _MAX_LINES:
            lines[f"{what}: and so on, {error.error_count()} faults in all"] = None
            break
        place = list(fault["loc"])
        scalar = len(place) > 1 and place[-1] in _BRANCHES and not fault["type"].startswith("extra")
        if scalar:
            place.pop()
        message = "must be a boolean, a number or a string" if scalar else _message(fault, place, model)
        shown = _shown(fault["input"])
        if place:
            lines[f"{what}: {_dotted(place)} = {shown}: {message}"] = None
        elif isinstance(fault["input"], dict):
            # A rule about several keys: its message names them, and the whole file is no value to show.
            lines[f"{what}: {message}"] = None
        else:
            lines[f"{what}: {shown}: {message}"] = None
    return "\n".join(lines)


def closest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'X'?` for the word of ``known`` that looks most like ``word``, or nothing."""
    found = difflib.get_close_matches(word, known, 1, 0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def _dotted(place: Sequence[int | str]) -> str:
    text = ""
    for part in place:
        if isinstance(part, str):  # perhaps a hostile one's: it may neither steer a terminal nor fill a log
            part = part[:_MAX_KEY] if part.isprintable() else ascii(part[:_MAX_KEY])
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()  # as TOML and JSON write it
    # Only the beginning: a value can be megabytes, and repr of a long one takes as long.
    cut = value[:200] if isinstance(value, str | bytes | list | tuple) else value
    try:
        text = repr(cut)
    except ValueError:  # an integer of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


def _message(fault: Any, place: Sequence[int | str], model: type[BaseModel] | None) -> str:
    message = re.sub(r"^(Input|String|Value|Tuple) should", "must", str(fault["msg"]))
    message = message.removeprefix("Value error, ").replace("\n", " ")
    kind, value = fault["type"], fault["input"]
    key = next((part for part in reversed(place) if isinstance(part, str)), "")
    if kind == "extra_forbidden":
        return "there is no such key" + _known(place, model)
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", str(fault.get("ctx", {}).get("expected", "")))
        return message + (closest(value, allowed) if isinstance(value, str) else "")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"must be a table: [{_dotted(place)}] with keys below it" if place else "must be a table"
    if kind in ("int_type", "int_from_float") and key.endswith("_bytes"):
        return f"{message}: a size is a whole number of bytes{_size(value)}"
    if kind == "float_type" and key.endswith("_seconds"):
        return f"{message}: a time is a number of seconds, for example 90"
    return message


def _size(value: Any) -> str:
    match = _SIZE.match(value) if isinstance(value, str) else None
    if match is None:
        return ", for example 4294967296 for 4 GiB"
    number = int(float(match[1]) * 1024 ** _POWER[match[2].upper()])
    return f", {number} for {value.strip()!r}"


def _known(place: Sequence[int | str], model: type[BaseModel] | None) -> str:
    if model is None:
        return ""
    parent = _dotted(place[:-1])
    word = str(place[-1])
    every = list(_names(model, ""))
    here = [name.rpartition(".")[2] for name in every if name.rpartition(".")[0] == parent]
    # The right name in the wrong table first: that is what a forgotten [limits] looks like.
    elsewhere = [name for name in every if name.rpartition(".")[2] == word]
    if elsewhere:
        return f"; did you mean {elsewhere[0]!r}?"
    return closest(word, here) or f"; allowed: {', '.join(sorted(here))}"


def _names(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _names(field.annotation, f"{prefix}{name}.")
