"""What the weightings reach beside fixed weights: on the toy problem of the papers, and on the demo's digits.

Every rule of bench._rules, with three seeds, in two processes of one thread each: some minutes on two cores.

    python -m bench.weightings            # measures, prints, draws
    python -m bench.weightings --redraw   # prints and draws what was measured
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pathlib
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from bench import _digits, _toy
from bench._rules import FIXED, RULES, missing
from bench._timing import RESULTS, save, table

SEEDS = (0, 1, 2)
BASE = FIXED[0].name
DOCS = pathlib.Path(__file__).parents[1] / "docs"


def jobs() -> list[tuple[str, str, int]]:
    """Returns problem, rule and seed of each run. The toy has a seed only where the rule draws."""
    digits = [("digits", name, seed) for name in RULES for seed in SEEDS]
    return digits + [
        ("toy", name, seed) for name, rule in RULES.items() for seed in (SEEDS if rule.is_random else SEEDS[:1])
    ]


def run(job: tuple[str, str, int]) -> tuple[list[dict[str, Any]], float]:
    """Returns what one job found, and the seconds of processor that it took."""
    problem, name, seed = job
    torch.set_num_threads(1)
    start = time.process_time()
    if problem == "digits":
        found = [_digits.train(RULES[name], seed)]
    else:
        found = [_toy.train(RULES[name], seed, point) for point in _toy.STARTS]
    return found, time.process_time() - start


def measure() -> dict[str, Any]:
    if lacking := missing():
        raise RuntimeError(f"bench/_rules.py lacks {', '.join(sorted(lacking))}, which the package exports.")
    results: dict[str, Any] = {"toy": {}, "digits": {}}
    start, processor, work = time.perf_counter(), 0.0, jobs()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done, (job, (found, seconds)) in enumerate(zip(work, pool.map(run, work), strict=True), 1):
            problem, name, _ = job
            results[problem].setdefault(name, []).extend(found)
            processor += seconds
            print(f"\r{done}/{len(work)} runs, {time.perf_counter() - start:.0f} s", end="", flush=True)
    print()
    results["seconds"] = {"elapsed": round(time.perf_counter() - start), "processor": round(processor)}
    results["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return results


def gains(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> list[float]:
    """Returns for each seed the mean relative gain over the tasks in percent, the measure of multi-task papers."""
    return [
        statistics.mean(
            100 * sign * (mine["metrics"][metric] - theirs["metrics"][metric]) / theirs["metrics"][metric]
            for metric, sign in _digits.METRICS.items()
        )
        for mine, theirs in zip(runs, base, strict=True)
    ]


def digits_rows(results: dict[str, Any]) -> list[list[str]]:
    """Returns a row for each rule: metrics as mean and half the range over the seeds, and the gain over the base."""
    rows = []
    for name, runs in results["digits"].items():
        row = [name]
        for metric in _digits.METRICS:
            values = [found["metrics"][metric] for found in runs]
            row.append(f"{statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}")
        gain = gains(runs, results["digits"][BASE])
        better = sum(value > 0 for value in gain)
        row += ["", ""] if name == BASE else [f"{statistics.mean(gain):+.1f} %", f"{better} of {len(gain)}"]
        rows.append(row)
    return rows


def toy_rows(results: dict[str, Any]) -> list[list[str]]:
    """Returns a row for each rule: how many starts reach the front, and where on it they end."""
    rows = []
    for name, runs in results["toy"].items():
        reached = [found for found in runs if found["gap"] < _toy.NEAR]
        losses = [f"{statistics.mean(found['losses'][number] for found in runs):.1f}" for number in (0, 1)]
        apart = statistics.mean(abs(found["losses"][0] - found["losses"][1]) for found in reached) if reached else None
        shown = "" if apart is None else f"{apart:.1f}"
        rows.append([name, f"{len(reached)} of {len(runs)}", *losses, shown])
    return rows


DIGITS_HEAD = ["digits", "accuracy", "mean IoU", "confidence right", "ink loss", "gain", "better in"]
TOY_HEAD = ["toy", "on the front", "first loss", "second loss", "apart on it"]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def verdict(results: dict[str, Any]) -> str:
    """Returns in words how the weightings compare with fixed weights."""
    always = {name: gains(runs, results["digits"][BASE]) for name, runs in results["digits"].items() if name != BASE}
    better = [name for name, gain in always.items() if min(gain) > 0]
    worse = [name for name, gain in always.items() if max(gain) < 0]
    best = max(always, key=lambda name: statistics.mean(always[name]))
    front = {row[0]: row for row in toy_rows(results)}
    full = [name for name, row in front.items() if row[1].split(" of ")[0] == row[1].split(" of ")[1]]
    return "\n".join(
        [
            f"Digits: better than {BASE} in every seed: {'; '.join(better) or 'none'}.",
            f"Digits: worse than {BASE} in every seed: {'; '.join(worse) or 'none'}.",
            f"Digits: the largest mean gain is that of {best}.",
            f"Toy: on the front from every start: {'; '.join(full) or 'none'}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.weightings")
    parser.add_argument("--redraw", action="store_true", help="print and draw what was measured")
    if not parser.parse_args().redraw:
        print(f"written to {save('weightings', measure())}")
    found = json.loads((RESULTS / "weightings.json").read_text())
    results = found["results"]
    print("\n" + table(DIGITS_HEAD, digits_rows(results)) + "\n\n" + table(TOY_HEAD, toy_rows(results)))
    print("\n" + verdict(results))
    seconds = results["seconds"]
    print(f"{seconds['elapsed']} s, of which processor: {seconds['processor']} s in two processes")

    from bench import _draw_weightings

    path = DOCS / "images" / "weightings.png"
    _draw_weightings.figure(results).savefig(path, dpi=110)
    print(f"drawn: {path}")
    page = DOCS / "weightings.md"
    if page.exists() and "<!-- measured -->" in page.read_text():
        write(page, found)


def write(page: pathlib.Path, found: dict[str, Any]) -> None:
    """Puts both tables between the marks of the page."""
    from bench.plots import replace_table

    results, machine, versions = found["results"], found["machine"], found["versions"]
    where = (
        f"Measured on {found['date'][:10]}, torch {versions['torch']}, Python {versions['python']}, "
        f"{machine['processor']}, {machine['cores']} shared cores; {results['seconds']['processor']} s of processor."
    )
    tables = [markdown(DIGITS_HEAD, digits_rows(results)), markdown(TOY_HEAD, toy_rows(results)), where]
    page.write_text(replace_table(page.read_text(), "measured", "\n\n".join(tables)))
    print(f"written: {page}")


if __name__ == "__main__":
    main()
