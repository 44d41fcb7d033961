"""What one reply of a child may cost the parent that reads it: nodes, characters, numbers, guards, seconds.

A reply is plain data, but plain data can be hostile: sixty lists that each hold the next one twice are a kilobyte
on the wire and 2**60 values to whoever walks them. So a reply is walked once as a *tree*, each shared value
counted as often as it is reached; afterwards every walk and every `repr` of it is known to end.
"""

from __future__ import annotations

import time
from typing import Any, Final

from sandbox.errors import WireError

#: Values in one reply, a count. A line map of 200,000 lines takes 600,000.
MAX_NODES: Final = 2_000_000
MAX_DEPTH: Final = 600  # levels; an expression of depth 200 takes two for each
MAX_CHARACTERS: Final = 1 << 28  # of all text, source code included
MAX_BITS: Final = 64
MAX_GUARDS: Final = 10_000
MAX_EXPRESSION_NODES: Final = 50_000  # of all guards together
#: Summands that all guards together have once sympy has expanded them, a count.
MAX_TERMS: Final = 50_000
MAX_PLACEHOLDERS: Final = 100_000
#: Time that the parent spends on reading a reply, and again on adding its guards, in seconds.
MAX_SECONDS: Final = 60.0


class Budget:
    """What is left for one reply. One object goes through every decoder of it."""

    def __init__(self) -> None:
        self._left = {
            "values": MAX_NODES,
            "characters": MAX_CHARACTERS,
            "guards": MAX_GUARDS,
            "expression nodes": MAX_EXPRESSION_NODES,
            "terms": MAX_TERMS,
            "placeholders": MAX_PLACEHOLDERS,
        }
        self.restart()

    def restart(self) -> None:
        """Start the clock anew: what lies between two parts of the decoding is not the reply's fault."""
        self._end = time.monotonic() + MAX_SECONDS

    def spend(self, what: str, amount: int = 1) -> None:
        """Take ``amount`` of ``what``.

        Raises:
            WireError: there is not so much left, or the time is over.
        """
        self._left[what] -= amount
        if self._left[what] < 0:
            raise WireError(f"the reply has too many {what}")
        if time.monotonic() > self._end:
            raise WireError(f"the reply takes longer than {MAX_SECONDS:g} s to read")

    def admit(self, data: Any) -> None:
        """Walk a whole reply: None, bool, int, float, str, bytes, lists, and tables with names as keys.

        Raises:
            WireError: it holds something else, or too much.
        """
        level, depth = [data], 0
        seen: set[int] = set()  # bytes objects: each would be copied as often as it is shared
        while level:
            depth += 1
            if depth > MAX_DEPTH:
                raise WireError(f"the reply is nested deeper than {MAX_DEPTH} levels")
            below: list[Any] = []
            characters = 0
            for value in level:
                kind = type(value)
                if kind is str:
                    characters += len(value)
                elif kind is int:
                    if value.bit_length() > MAX_BITS:
                        raise WireError(f"the reply holds a number of more than {MAX_BITS} bits")
                elif kind is list:
                    self.spend("values", len(value))
                    below.extend(value)
                elif kind is dict:
                    self.spend("values", len(value))
                    if not all(type(name) is str for name in value):
                        raise WireError("a table of the reply has a key that is not text")
                    characters += sum(map(len, value))
                    below.extend(value.values())
                elif kind is bytes:
                    if len(value) > 1 and id(value) in seen:
                        raise WireError("the reply holds the same bytes twice")
                    seen.add(id(value))
                elif value is not None and kind not in (bool, float):
                    raise WireError("the reply holds something else than plain data")
            self.spend("characters", characters)
            level = below


def shown(value: Any) -> str:
    """``value`` for a message: text up to 80 characters, a plain number, otherwise only its type."""
    if type(value) is str:
        return repr(value[:80])
    if type(value) is bool or (type(value) is int and value.bit_length() <= MAX_BITS):
        return repr(value)
    return f"a {type(value).__name__}"
