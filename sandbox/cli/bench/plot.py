"""The rows of `sandbox bench` as an SVG, written by hand: bars with a spread need no plotting library of 60 MB."""

from __future__ import annotations

from itertools import groupby
from typing import Any, Final
from xml.sax.saxutils import escape

from sandbox.cli.bench.summary import number

#: Pixels: of the whole, of the names at the left, of the longest bar, of a row and a heading.
WIDTH, NAMES, LENGTH, ROW, HEADING = 860, 190, 480, 22, 34
_COLOURS: Final = {"inductor-normal": "#777777", "inductor-subprocess": "#b0b0b0"}
_OURS: Final = "#3b75af"


def svg(rows: list[dict[str, Any]], caption: str) -> str:
    """A picture of the rows of ``summary.summarise``, in their order. Each group of rows has a scale of its own.

    Bars are medians, the thin line goes from the least sample to the greatest, the red mark is where a bar is to end.
    """
    parts = [_text(8, 22, caption, size=13)]
    y = 34
    for (measure, cache, figure), group in groupby(rows, key=lambda row: (row["measure"], row["cache"], row["figure"])):
        drawn = list(group)
        title = ", ".join(filter(None, (measure, cache and f"caches {cache}", figure)))
        parts.append(_text(8, y + 22, title, weight="bold"))
        y += HEADING
        medians = {row["scheme"]: row["median"] for row in drawn}
        aims = {row["scheme"]: _aims(row, medians) for row in drawn}
        top = max([row["max"] for row in drawn] + [aim for each in aims.values() for aim in each]) or 1.0
        for row in drawn:
            parts += _row(row, y, LENGTH / top, aims[row["scheme"]])
            y += ROW
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 12}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _aims(row: dict[str, Any], medians: dict[str, float]) -> list[float]:
    """Where the bars of a row are to end, in its own unit."""
    return [
        bar["limit"] * (medians[bar["of"]] if bar["of"] else 1)
        for bar in row["bars"]
        if not bar["of"] or bar["of"] in medians
    ]


def _row(row: dict[str, Any], y: int, scale: float, aims: list[float]) -> list[str]:
    colour = _COLOURS.get(row["scheme"], _OURS)
    middle = y + ROW / 2
    left, right = NAMES + row["min"] * scale, NAMES + row["max"] * scale
    parts = [
        _text(NAMES - 8, middle + 4, row["scheme"], anchor="end"),
        f'<rect x="{NAMES}" y="{y + 4}" width="{row["median"] * scale:.1f}" height="{ROW - 8}" fill="{colour}"/>',
        f'<line x1="{left:.1f}" y1="{middle}" x2="{right:.1f}" y2="{middle}" stroke="black"/>',
        *(
            f'<line x1="{NAMES + aim * scale:.1f}" y1="{y + 1}" x2="{NAMES + aim * scale:.1f}" y2="{y + ROW - 1}" '
            'stroke="#cc2222" stroke-width="2"/>'
            for aim in aims
        ),
    ]
    ratio = f" ({row['of_normal']:.2f} of NORMAL)" if "of_normal" in row else ""
    end = max(right, NAMES + row["median"] * scale, *(NAMES + aim * scale for aim in aims), NAMES)
    parts.append(_text(end + 8, middle + 4, number(row["median"]) + ratio))
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" font-size="{size}">'
        f"{escape(text)}</text>"
    )
