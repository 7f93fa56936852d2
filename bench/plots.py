"""Draws the results, and writes their tables into docs/performance.md, between the marks that name them.

python -m bench.plots
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

from matplotlib.figure import Figure

from bench._timing import RESULTS

DOCS = pathlib.Path(__file__).parents[1] / "docs"
OURS, HAND, KERAS = "#1f6feb", "#8c959f", "#bf8700"


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def held(ratio: float, limit: float | None) -> str:
    """Returns a ratio with its limit, in bold where it is missed."""
    if limit is None:
        return f"{ratio:.2f}"
    return f"{ratio:.2f} (limit {limit:.2f})" if ratio <= limit else f"**{ratio:.2f}** (limit {limit:.2f}: missed)"


def markdown(head: list[str], rows: list[list[str]], found: dict[str, Any]) -> str:
    """Returns a Markdown table with the date and the machine that it was measured on."""
    machine, versions = found["machine"], found["versions"]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    where = (
        f"Measured on {found['date'][:10]}, torch {versions['torch']}, Python {versions['python']}, "
        f"{machine['processor']}, {machine['cores']} shared cores."
    )
    return "\n".join([*lines, "", where])


def overhead(found: dict[str, Any]) -> str:
    rows = []
    for row in found["results"]["rows"]:
        step, forward = row["step"], row["forward"]
        keras = [
            f"{t['Keras CompileLoss'] / t['by hand']:.1f}" if "Keras CompileLoss" in t else "" for t in (step, forward)
        ]
        rows.append(
            [
                str(row["terms"]),
                f"{step['by hand'] * 1e6:.0f} µs",
                f"{step['PathLossModule'] * 1e6:.0f} µs",
                held(step["PathLossModule"] / step["by hand"], row["limit"]),
                f"{forward['PathLossModule'] / forward['by hand']:.2f}",
                *keras,
            ]
        )
    head = ["terms", "by hand", "container", "ratio", "forward alone", "Keras 3", "Keras 3, forward"]
    growth = held(found["results"]["growth"], found["results"]["growth limit"])
    return markdown(head, rows, found) + f"\nTime per term at 1000 terms over that at 10: {growth}."


def compiled(found: dict[str, Any]) -> str:
    rows = [
        [
            row["case"],
            f"{row['by hand'] * 1e6:.0f} µs",
            f"{row['by hand, default options'] / row['by hand']:.2f}",
            *(held(row[way] / row["by hand"], row["limits"][way]) for way in ("call", "backward")),
        ]
        for row in found["results"]["steps"]
    ]
    rows += [
        [
            f"time to compile, {row['case']}",
            f"{row['by hand']:.1f} s",
            "",
            held(row["call"] / row["by hand"], row["limits"]["call"]),
            "",
        ]
        for row in found["results"]["compile times"]
    ]
    return markdown(["compiled", "by hand", "by hand, default options", "call", "`criterion.backward`"], rows, found)


def memory(found: dict[str, Any]) -> str:
    rows = [
        [case, way, f"{peak / 2**20:.0f} MiB", held(peak / row["peaks"]["by hand"], row["limits"].get(way))]
        for case, row in found["results"].items()
        for way, peak in row["peaks"].items()
    ]
    return markdown(["eager step", "way", "peak", "ratio"], rows, found)


def launches(found: dict[str, Any]) -> str:
    counted = found["results"]

    def shown(name: str) -> str:
        return " + ".join(map(str, counted[name]["launches"]))

    rows = [
        [size, options, *(shown(f"{way}, {size}, {options}") for way in ("by hand", "call", "value_and_grad"))]
        for size in ("same small", "different small", "same large", "different large")
        for options in ("default", "own")
    ]
    rows += [
        [
            "ten mixed criteria",
            options,
            "",
            shown(f"call, mixed, {options}"),
            shown(f"value_and_grad, mixed, {options}"),
        ]
        for options in ("default", "own")
    ]
    return markdown(["ten terms", "options", "by hand", "call", "`value_and_grad`"], rows, found)


def draw_overhead(found: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axis = figure.subplots()
    rows = found["results"]["rows"]
    terms = [row["terms"] for row in rows]
    for name, colour in (("by hand", HAND), ("PathLossModule", OURS), ("Keras CompileLoss", KERAS)):
        times = [
            (t, row["step"][name] / row["terms"] * 1e6)
            for t, row in zip(terms, rows, strict=True)
            if name in row["step"]
        ]
        axis.plot(*zip(*times, strict=True), marker="o", color=colour, label=name)
    axis.set(xscale="log", yscale="log", xlabel="terms", ylabel="µs per term, forward + backward")
    axis.set_title("eager, MSE on 64x16, one CPU thread", fontsize=10)
    return finished(figure)


def draw_memory(found: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    cases = found["results"]
    for axis, (case, row) in zip(figure.subplots(1, len(cases)), cases.items(), strict=True):
        peaks = row["peaks"]
        ways = list(peaks)[::-1]
        axis.barh(
            ways, [peaks[way] / 2**20 for way in ways], color=[HAND if way == "by hand" else OURS for way in ways]
        )
        axis.set_title(case, fontsize=10)
        axis.set_xlabel("peak MiB, eager")
    return finished(figure)


def finished(figure: Figure) -> Figure:
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    return figure


def replace_table(page: str, name: str, text: str) -> str:
    marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"docs/performance.md has no place for {name!r}: {marks[0]} ... {marks[1]}")
    return pattern.sub(lambda _: f"{marks[0]}\n{text}\n{marks[1]}", page)


def main() -> None:
    path = DOCS / "performance.md"
    page = path.read_text()
    for name, table in {"overhead": overhead, "compiled": compiled, "memory": memory, "launches": launches}.items():
        page = replace_table(page, name, table(load(name)))
    path.write_text(page)
    for name, draw in {"overhead": draw_overhead, "memory": draw_memory}.items():
        draw(load(name)).savefig(DOCS / "images" / f"{name}.png", dpi=110)
    print(f"written to {path} and {DOCS / 'images'}/")


if __name__ == "__main__":
    main()
