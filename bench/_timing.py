"""Timing on a noisy machine: interleaved in one process, medians, ratios."""

from __future__ import annotations

import datetime
import gc
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import torch

RESULTS = pathlib.Path(__file__).parent / "results"


def interleaved(variants: Mapping[str, Callable[[], Any]], *, calls: int, rounds: int) -> dict[str, float]:
    """Returns the median seconds of one call of each variant.

    Every round times all variants one after the other, so that what disturbs the machine disturbs all of them.
    """
    for variant in variants.values():
        for _ in range(max(1, calls // 4)):
            variant()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, variant in variants.items():
                start = time.perf_counter()
                for _ in range(calls):
                    variant()
                samples[name].append((time.perf_counter() - start) / calls)
    finally:
        gc.enable()
    return {name: statistics.median(times) for name, times in samples.items()}


def environment() -> dict[str, Any]:
    """Returns the versions and the machine that a result belongs to."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "optree", "keras"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def save(name: str, results: Any) -> pathlib.Path:
    """Writes results with their environment to bench/results/."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**environment(), "results": results}, indent=2) + "\n")
    return path


def verdict(ratio: float, limit: float | None) -> str:
    """Returns a ratio with its limit, and whether it holds."""
    if limit is None:
        return f"{ratio:.2f}"
    return f"{ratio:.2f}, limit {limit:.2f} {'holds' if ratio <= limit else 'MISSED'}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Returns rows as columns of text, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [
        "  ".join(
            text.rjust(width) if column else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
