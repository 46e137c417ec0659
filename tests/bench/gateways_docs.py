"""What `gateways` found, for docs/: a page, and its picture."""

from __future__ import annotations

import math
from collections.abc import Iterator

from conftest import ROOT

from .report import Cell, Report, machine

PAGE, PICTURE = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks.svg"
NAMES = ("Voxgate", "LiteLLM", "Portkey")
CLIENTS = (1, 8)
LARGEST = ("24 MB", 8)
WIDTH, HEIGHT = 990, 384
TOP, BOTTOM = 96, 330  # of the plots' areas
BAR, GAP = 22, 4
LOWEST = 1.0  # ms
STYLE = """
.page { fill: #ffffff } text { fill: #1f2328; font: 12px system-ui, sans-serif } .small { font-size: 10.5px }
.title { font-size: 16px; font-weight: 600 } .head { font-size: 13px; font-weight: 600 }
.grid { stroke: #d8dee4; stroke-width: 1 } .axis { stroke: #6e7781; stroke-width: 1 }
.voxgate { fill: #0b6bcb } .litellm { fill: #d4812a } .portkey { fill: #8c7ae6 }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117 } text { fill: #e6edf3 } .grid { stroke: #30363d } .axis { stroke: #8b949e }
.voxgate { fill: #58a6ff } .litellm { fill: #e8a357 } .portkey { fill: #a99bf5 } }
"""

_Record = dict[str, Cell]


def write(report: Report) -> None:
    records = report.records()
    PICTURE.write_text(picture(records), encoding="utf-8")
    PAGE.write_text(page(report, records), encoding="utf-8")


def picture(records: list[_Record]) -> str:
    """An SVG that needs nothing else, and follows the reader's light or dark scheme."""
    names = [name for name in NAMES if any(record["gateway"] == name for record in records)]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="t d">',
        '<title id="t">What each gateway adds to a request, and its memory</title>',
        f'<desc id="d">{_described(names, records)}</desc>',
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>',
        _text(24, 30, "What each gateway adds to a request, and its peak memory", "title", "start"),
        *_legend(names),
        *_added(names, records),
        *_memory(names, records),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _described(names: list[str], records: list[_Record]) -> str:
    return "; ".join(
        f"{name}, {audio}, {clients} client{'s' * (clients > 1)}: {_shown(_figure(records, name, audio, clients))} ms"
        for clients in CLIENTS
        for audio in _sizes(records)
        for name in names
    )


def _legend(names: list[str]) -> Iterator[str]:
    for number, name in enumerate(names):
        x = 24 + 96 * number
        yield f'<rect class="{name.lower()}" x="{x}" y="44" width="12" height="12" rx="2"/>'
        yield _text(x + 18, 54, name, "", "start")


def _added(names: list[str], records: list[_Record]) -> Iterator[str]:
    sizes = _sizes(records)
    figures = {
        (clients, audio, name): _figure(records, name, audio, clients)
        for clients in CLIENTS
        for audio in sizes
        for name in names
    }
    decades = max(math.ceil(math.log10(max(*figures.values(), 10 * LOWEST) / LOWEST)), 1)
    width, left = len(names) * (BAR + GAP) + 18, 62

    def height(figure: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * math.log10(max(figure, LOWEST) / LOWEST) / decades

    yield _text(16, (TOP + BOTTOM) / 2, "added to the median, ms (log scale)", "", "middle", turned=True)
    for panel, clients in enumerate(CLIENTS):
        start = left + panel * (len(sizes) * width + 34)
        end = start + len(sizes) * width
        yield _text((start + end) / 2, TOP - 14, f"{clients} client{'s' * (clients > 1)}", "head")
        for decade in range(decades + 1):
            y = height(LOWEST * 10**decade)
            yield _line(start, y, end, y, "grid")
            if not panel:
                yield _text(start - 6, y + 4, f"{LOWEST * 10**decade:,.0f}", "small", "end")
        for group, audio in enumerate(sizes):
            first = start + group * width + (width - len(names) * (BAR + GAP) + GAP) / 2
            for number, name in enumerate(names):
                figure = figures[clients, audio, name]
                yield _bar(first + number * (BAR + GAP), height(figure), name, _shown(figure))
            yield _text(start + (group + 0.5) * width, BOTTOM + 18, audio, "")
        yield _line(start, BOTTOM, end, BOTTOM, "axis")
        yield _text((start + end) / 2, BOTTOM + 40, "size of the audio", "")


def _memory(names: list[str], records: list[_Record]) -> Iterator[str]:
    figures = {name: _figure(records, name, *LARGEST, of="peak MB") for name in names}
    step = 10 ** math.floor(math.log10(max(*figures.values(), 100.0)))
    steps = math.ceil(max(figures.values()) / step)
    if steps < 3:
        step, steps = step / 2, math.ceil(max(figures.values()) / (step / 2))
    start, end = WIDTH - 200, WIDTH - 24
    yield _text((start + end) / 2, TOP - 14, f"{LARGEST[0]}, {LARGEST[1]} clients", "head")
    yield _text(start - 54, (TOP + BOTTOM) / 2, "peak resident memory, MB", "", "middle", turned=True)
    for number in range(steps + 1):
        y = BOTTOM - (BOTTOM - TOP) * number / steps
        yield _line(start, y, end, y, "grid")
        yield _text(start - 6, y + 4, f"{step * number:,.0f}", "small", "end")
    width = (end - start) / max(len(names), 1)
    for number, name in enumerate(names):
        middle = start + (number + 0.5) * width
        y = BOTTOM - (BOTTOM - TOP) * figures[name] / (step * steps)
        yield _bar(middle - BAR, y, name, f"{figures[name]:,.0f}", 2 * BAR)
        yield _text(middle, BOTTOM + 18, name, "")
    yield _line(start, BOTTOM, end, BOTTOM, "axis")


def _bar(x: float, y: float, name: str, label: str, width: float = BAR) -> str:
    bar = f'<rect class="{name.lower()}" x="{x:.1f}" y="{y:.1f}" width="{width:g}" height="{BOTTOM - y:.1f}" rx="2"/>'
    return bar + _text(x + width / 2, y - 4, label, "small")


def _line(x: float, y: float, to_x: float, to_y: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str = "middle", *, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turn}>{text}</text>'


def page(report: Report, records: list[_Record]) -> str:
    table = [
        "| " + " | ".join(report.columns) + " |",
        "| " + " | ".join(["---"] * 2 + ["---:"] * (len(report.columns) - 2)) + " |",
        *("| " + " | ".join(_cell(record[column]) for column in report.columns) + " |" for record in records),
    ]
    goals = [f"| {goal.what} | {_shown(goal.figure)} | {'yes' if goal.met else 'no'} |" for goal in report.goals]
    return TEXT.format(
        notes=f"{'; '.join(report.notes)}. {machine()}.",
        table="\n".join(table),
        goals="\n".join(["| goal | measured | met |", "| --- | ---: | --- |", *goals]),
    )


TEXT = """# What the gateway adds

How much longer a request takes through a gateway than straight to the provider, and how much memory the gateway
needs for it: Voxgate beside LiteLLM's proxy and Portkey's gateway, in one run on one machine.

![Added median by size of the audio for 1 and 8 clients, and peak memory](benchmarks.svg)

{notes}

{table}

`added` is the gateway's median (or 95th percentile) less that of the direct request. Memory is the resident set of
all of the gateway's processes: its peak in that row, and how far that is above the idle gateway. One process serves
all rows from top to bottom, so what it keeps of earlier ones counts; a garbage collector that is in no hurry, as
Node's, makes that much.

{goals}

## Method

A fake provider answers a `verbose_json` transcript as soon as it has read the whole upload, so what is left is the
gateway. All three forward to it, and a direct request is the baseline. The audio is valid PCM WAV of 100 KB, 10 MB
and 24 MB, in a multipart form that is made beforehand and written to connections that stay open, by clients in a
process of their own. The gateways take turns in small blocks, so that whatever else the machine does hits all alike;
before each block every connection is used once, unmeasured. Memory is sampled every 3 ms.
Each gateway is one process with its defaults. Voxgate authenticates, limits, measures the audio, routes and bills
each request in SQLite; LiteLLM runs without a database, with a master key, one worker and telemetry off; Portkey
without its cache. Provider, clients and gateway share the machine's cores, so figures with 8 clients are those of a
machine that is full, and only the comparison within one run means something.

## Repeat it

```sh
make bench                                           # all benchmarks
.venv/bin/python -m tests.bench gateways             # this one
.venv/bin/python -m tests.bench gateways --docs      # and rewrite this page and its picture
```

The first run installs the other two gateways, in the versions above, into `.bench`; one that cannot be installed is
left out, and the run says so.
"""


def _sizes(records: list[_Record]) -> list[str]:
    return list(dict.fromkeys(str(record["audio"]) for record in records))


def _figure(records: list[_Record], name: str, audio: str, clients: int, of: str = "added ms") -> float:
    for record in records:
        if (record["gateway"], record["audio"], record["clients"]) == (name, audio, clients):
            return float(record[of] or 0)
    raise ValueError(f"{name} was not measured with {audio} and {clients} clients")


def _cell(cell: Cell) -> str:
    return _shown(cell) if isinstance(cell, float) else "" if cell is None else str(cell)


def _shown(figure: float) -> str:
    return f"{figure:,.0f}" if abs(figure) >= 100 else f"{figure:.1f}" if abs(figure) >= 1 else f"{figure:.2f}"
