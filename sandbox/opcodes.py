"""The machine behind :func:`sandbox.unpickle.safe_loads`: pickle's protocol 5 for plain data, and nothing else."""

from __future__ import annotations

import pickle
import struct
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Final

from sandbox.errors import WireError

MAX_DEPTH: Final = 100  # tuples within tuples; hash() of a tuple recurses in C without a check
_BATCH: Final = 512  # items between two looks at the clock
_SPARE_MEMORY: Final = 256 << 20  # also for short strings (14 bytes for each of the pickle) and small dicts (40)
_MEMORY_PER_BYTE: Final = 4  # what is large in a reply is text and bytes
_SPARE_SECONDS: Final = 20.0
_BYTES_PER_SECOND: Final = 1e6  # measured on a 2 GHz core: 2.5 (small dicts) to 200 (long bytes) million

_DOUBLE: Final = struct.Struct(">d")
_SCALARS: Final = frozenset({int, float, bool, str, bytes, type(None)})
_HASHED: Final = frozenset({tuple, frozenset})


class Refused(Exception):
    """Why the data is refused, in words."""


def _complex(real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise Refused("complex of something else than two floats")
    return complex(real, imaginary)


def _range(*parts: Any) -> range:
    if any(type(part) is not int for part in parts):
        raise Refused("range of something else than integers")
    return range(*parts)


def _slice(*parts: Any) -> slice[Any, Any, Any]:
    # Only scalars: slices within slices are freed by recursion in C.
    if len(parts) != 3 or any(type(part) not in _SCALARS for part in parts):
        raise Refused("slice of something else than three scalars")
    return slice(*parts)


def _ordered() -> OrderedDict[Any, Any]:
    return OrderedDict()  # pickle writes it empty and sets the items afterwards


#: What plain data needs besides opcodes: the class that a name stands for, and how it is made from a REDUCE.
_BUILTIN: Final[dict[str, tuple[type, Callable[..., Any]]]] = {
    "builtins:complex": (complex, _complex),
    "builtins:range": (range, _range),
    "builtins:slice": (slice, _slice),
    "collections:OrderedDict": (OrderedDict, _ordered),
}


def resolve(name: str) -> type:
    """The class that ``name``, as `module:qualname`, stands for among the modules already imported.

    Raises:
        WireError: there is none, or it is a function, a module, a metaclass or anything else than a class.
    """
    module_name, _, qualname = name.partition(":")
    module = sys.modules.get(module_name)
    if module is None or not qualname:
        raise WireError(f"{name}: no such module is imported")
    found: Any = module
    for part in qualname.split("."):
        # vars(), not getattr(): a module's or a metaclass's __getattr__ is code, and could import more.
        if found is not module and not isinstance(found, type):
            raise WireError(f"{name}: {part} is not inside of a class")
        if part not in vars(found):
            raise WireError(f"{name}: there is no {part}")
        found = vars(found)[part]
    if not isinstance(found, type) or issubclass(found, type):
        raise WireError(f"{name}: not a class, or a metaclass")
    return found


class Machine:
    """One run over one pickle."""

    def __init__(self, data: bytes, allowed: frozenset[str]) -> None:
        self._data = data
        self._at = 0
        self._allowed = allowed
        self._classes: dict[int, type] = {}  # by id: a metaclass may define __eq__ and __hash__
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: list[Any] = []
        self._memory = _SPARE_MEMORY + _MEMORY_PER_BYTE * len(data)
        self._work = 1_000_000 + 16 * len(data)
        self._end = time.monotonic() + _SPARE_SECONDS + len(data) / _BYTES_PER_SECOND
        # Of each tuple or frozenset that holds some: its depth, how many elements a comparison visits, and itself
        # (so that its id is not used again).
        self._nested: dict[int, tuple[int, int, Any]] = {}

    def run(self) -> Any:
        data, table, size = self._data, _OPCODES, len(self._data)
        if data[:2] != b"\x80\x05":
            raise Refused("it does not begin as a pickle of protocol 5")
        self._at = 2
        ticks = 0
        while self._at < size:
            opcode = data[self._at]
            self._at += 1
            if opcode == _STOP:
                if self._at != size:
                    raise Refused("there are bytes after its end")
                if len(self._stack) != 1 or self._marks:
                    raise Refused("it ends with a stack of other than one value")
                return self._stack[0]
            entry = table.get(opcode)
            if entry is None:
                raise Refused(f"opcode {bytes([opcode])!r} at byte {self._at - 1} is not one of plain data")
            action, cost = entry
            self._memory -= cost
            action(self)
            ticks += 1
            if not ticks & 1023:
                self._charge(0)
                self._look_at_clock()
        raise Refused("it is truncated")

    # Bounds

    def _look_at_clock(self) -> None:
        if time.monotonic() > self._end:
            raise Refused("reading it takes too long")

    def _charge(self, size: int) -> None:
        self._memory -= size
        if self._memory < 0:
            raise Refused("it would take too much memory")

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise Refused("it is truncated")
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def _size(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _popmark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def _hashable(self, key: Any) -> Any:
        if type(key) in _HASHED:
            nested = self._nested.get(id(key))
            self._work -= nested[1] if nested else len(key)
            if self._work < 0:
                raise Refused("hashing its keys takes too long")
        return key

    # Values

    def _text(self, width: int) -> None:
        self._stack.append(self._take(self._size(width)).decode("utf-8", "surrogatepass"))

    def _short_text(self) -> None:
        # The most frequent opcode of ordinary data: all in one place for speed.
        data, start = self._data, self._at + 1
        end = self._at = start + data[self._at]
        if end > len(data):
            raise Refused("it is truncated")
        self._stack.append(data[start:end].decode("utf-8", "surrogatepass"))

    def _bytes(self, width: int) -> None:
        self._stack.append(self._take(self._size(width)))

    def _bytearray(self) -> None:
        self._stack.append(bytearray(self._take(self._size(8))))

    def _long(self, width: int) -> None:
        self._stack.append(int.from_bytes(self._take(self._size(width)), "little", signed=True))

    def _int(self) -> None:
        self._stack.append(int.from_bytes(self._take(4), "little", signed=True))

    def _int1(self) -> None:
        self._stack.append(self._data[self._at])  # IndexError: truncated
        self._at += 1

    def _int2(self) -> None:
        self._stack.append(self._size(2))

    def _float(self) -> None:
        self._stack.append(_DOUBLE.unpack(self._take(8))[0])

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _tuple(self, items: Iterable[Any]) -> None:
        made = tuple(items)
        self._memory -= 8 * len(made)
        if self._note(made) > MAX_DEPTH:
            raise Refused(f"tuples are nested more than {MAX_DEPTH} deep")
        self._stack.append(made)

    def _note(self, made: tuple[Any, ...] | frozenset[Any]) -> int:
        """Keep in mind what it costs to hash or to compare ``made``; returns how deep it is nested."""
        depth, visits = 0, len(made)
        for item in made:
            if type(item) in _HASHED and item:
                below, more, _ = self._nested.get(id(item), (1, len(item), None))
                depth, visits = max(depth, below), visits + more
        if depth:
            self._memory -= 200
            self._nested[id(made)] = (depth + 1, min(visits, 1 << 60), made)
        return depth + 1

    def _last(self, count: int) -> None:
        if len(self._stack) < count:
            raise Refused("a tuple of more values than there are")
        items = self._stack[-count:]
        del self._stack[-count:]
        self._tuple(items)

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is list:
            target.extend(items)
        else:
            self._instance(target).extend(items)

    def _setitems(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict and type(target) is not OrderedDict:
            self._instance(target)
        self._charge(64 * len(items))
        if len(items) % 2:
            raise Refused("a key without a value")
        for start in range(0, len(items), 2):
            key = items[start]
            if type(key) in _HASHED:
                self._hashable(key)
            if start & 1023 == 1022:
                self._look_at_clock()
            target[key] = items[start + 1]

    def _setitem(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._setitems([key, value])

    def _additems(self) -> None:
        items = self._popmark()
        target = self._stack[-1]
        if type(target) is not set:
            raise Refused("adds items to something else than a set")
        self._fill(target, items)

    def _frozenset(self) -> None:
        items = self._popmark()
        found: set[Any] = set()
        self._fill(found, items)
        made = frozenset(found)
        self._note(made)
        self._stack.append(made)

    def _fill(self, target: set[Any], items: list[Any]) -> None:
        self._charge(64 * len(items))
        for start in range(0, len(items), _BATCH):
            self._look_at_clock()
            target.update(map(self._hashable, items[start : start + _BATCH]))

    def _pop(self) -> None:
        # As pickle reads it: with nothing above the mark, POP takes the mark.
        if self._stack:
            self._stack.pop()
        else:
            self._popmark()

    def _memoize(self) -> None:
        self._memo.append(self._stack[-1])

    def _get(self, width: int) -> None:
        self._stack.append(self._memo[self._size(width)])

    def _get1(self) -> None:
        self._stack.append(self._memo[self._data[self._at]])
        self._at += 1

    # Classes

    def _global(self) -> None:
        qualname, module = self._stack.pop(), self._stack.pop()
        name = f"{module}:{qualname}" if type(module) is str and type(qualname) is str else "(not a name)"
        if name in _BUILTIN:
            self._stack.append(_BUILTIN[name][0])
            return
        if name not in self._allowed:
            raise Refused(f"{name[:100]!r} is not one of the classes allowed here")
        try:
            found = resolve(name)
        except WireError as error:
            raise Refused(str(error)) from None
        self._classes[id(found)] = found
        self._stack.append(found)

    def _reduce(self) -> None:
        arguments, made = self._stack.pop(), self._stack.pop()
        if type(arguments) is not tuple:
            raise Refused("arguments that are not a tuple")
        if id(made) in self._classes:
            self._stack.append(made(*arguments))
            return
        for known, make in _BUILTIN.values():
            if made is known:
                self._stack.append(make(*arguments))
                return
        raise Refused("it calls something else than an allowed class")

    def _new(self, keywords: dict[str, Any]) -> None:
        arguments, made = self._stack.pop(), self._stack.pop()
        if type(arguments) is not tuple or type(keywords) is not dict:
            raise Refused("arguments that are not a tuple and a dict")
        if id(made) not in self._classes:
            raise Refused("it makes an instance of something else than an allowed class")
        self._stack.append(made.__new__(made, *arguments, **keywords))

    def _instance(self, target: Any) -> Any:
        """``target``, if it is an instance of an allowed class; never a class itself, whose attributes are code."""
        if isinstance(target, type) or id(type(target)) not in self._classes:
            raise Refused("it changes something else than an instance of an allowed class")
        return target

    def _build(self) -> None:
        state, target = self._stack.pop(), self._instance(self._stack[-1])
        setter = getattr(target, "__setstate__", None)
        if setter is not None:
            setter(state)
            return
        slots: Any = {}
        if type(state) is tuple and len(state) == 2:
            state, slots = state
        for names in (state or {}, slots or {}):
            if type(names) is not dict or any(type(name) is not str or name.startswith("__") for name in names):
                # __class__ and __dict__ are names, too.
                raise Refused("a state that is not attributes by their name")
        self._charge(64 * (len(state or ()) + len(slots or ())))
        if state:
            target.__dict__.update({sys.intern(name): value for name, value in state.items()})
        for name, value in (slots or {}).items():
            setattr(target, name, value)


def _skip_frame(machine: Machine) -> None:
    # A frame is a hint for reading ahead from a file: the size of what follows. Nothing is read ahead here.
    if machine._size(8) > len(machine._data) - machine._at:
        raise Refused("it is truncated")


def _void(value: object) -> None:
    """Nothing, whatever ``value`` is: an action has no result."""


_STOP: Final = pickle.STOP[0]
#: The action of each opcode, and the bytes of memory that it takes at most besides the items it is given.
_ACTIONS: Final[dict[bytes, tuple[Callable[[Machine], None], int]]] = {
    pickle.FRAME: (_skip_frame, 0),
    pickle.MARK: (Machine._mark, 72),
    pickle.POP: (Machine._pop, 0),
    pickle.POP_MARK: (lambda m: _void(m._popmark()), 0),
    pickle.NONE: (lambda m: m._stack.append(None), 8),
    pickle.NEWTRUE: (lambda m: m._stack.append(True), 8),
    pickle.NEWFALSE: (lambda m: m._stack.append(False), 8),
    pickle.BININT: (Machine._int, 40),
    pickle.BININT1: (Machine._int1, 8),
    pickle.BININT2: (Machine._int2, 40),
    pickle.LONG1: (lambda m: m._long(1), 40),
    pickle.LONG4: (lambda m: m._long(4), 40),
    pickle.BINFLOAT: (Machine._float, 32),
    pickle.SHORT_BINUNICODE: (Machine._short_text, 64),
    pickle.BINUNICODE: (lambda m: m._text(4), 64),
    pickle.BINUNICODE8: (lambda m: m._text(8), 64),
    pickle.SHORT_BINBYTES: (lambda m: m._bytes(1), 48),
    pickle.BINBYTES: (lambda m: m._bytes(4), 48),
    pickle.BINBYTES8: (lambda m: m._bytes(8), 48),
    pickle.BYTEARRAY8: (Machine._bytearray, 64),
    pickle.EMPTY_LIST: (lambda m: m._stack.append([]), 64),
    pickle.APPEND: (lambda m: m._append([m._stack.pop()]), 8),
    pickle.APPENDS: (lambda m: m._append(m._popmark()), 0),
    pickle.EMPTY_TUPLE: (lambda m: m._stack.append(()), 8),
    pickle.TUPLE1: (lambda m: m._last(1), 64),
    pickle.TUPLE2: (lambda m: m._last(2), 64),
    pickle.TUPLE3: (lambda m: m._last(3), 64),
    pickle.TUPLE: (lambda m: m._tuple(m._popmark()), 64),
    pickle.EMPTY_DICT: (lambda m: m._stack.append({}), 72),
    pickle.SETITEM: (Machine._setitem, 100),
    pickle.SETITEMS: (lambda m: m._setitems(m._popmark()), 0),
    pickle.EMPTY_SET: (lambda m: m._stack.append(set()), 224),
    pickle.ADDITEMS: (Machine._additems, 0),
    pickle.FROZENSET: (Machine._frozenset, 224),
    pickle.MEMOIZE: (Machine._memoize, 8),
    pickle.BINGET: (Machine._get1, 8),
    pickle.LONG_BINGET: (lambda m: m._get(4), 8),
    pickle.STACK_GLOBAL: (Machine._global, 8),
    pickle.REDUCE: (Machine._reduce, 512),  # OrderedDict() is the largest of the built-in ones
    pickle.NEWOBJ: (lambda m: m._new({}), 256),
    pickle.NEWOBJ_EX: (lambda m: m._new(m._stack.pop()), 256),
    pickle.BUILD: (Machine._build, 0),
}
_OPCODES: Final = {code[0]: entry for code, entry in _ACTIONS.items()}
