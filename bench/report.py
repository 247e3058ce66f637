"""Results → a table in Markdown.

python -m bench.report bench/results/0.6b.json      writes the table again
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from datetime import date
from pathlib import Path
from typing import Any

OURS = "truetune_run"


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, memory and load, for the head of the table."""
    import psutil

    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return {
        "date": date.today().isoformat(),
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_before": round(os.getloadavg()[0], 2),
    }


def rates(contender: dict[str, Any]) -> list[float]:
    """Return rows a second of each measured step."""
    return [step["rows"] / step["seconds"] for step in contender["steps"]]


def median_rate(result: dict[str, Any], name: str) -> float | None:
    """Return the median rows a second of a contender, None if nothing was measured."""
    found = [rates(contender) for contender in result["contenders"] if contender["name"] == name]
    return statistics.median(found[0]) if found and found[0] else None


def markdown(result: dict[str, Any]) -> str:
    """Return the table, its head, and what a step of truetune is made of."""
    lines = [
        f"# {result['rows_per_step']} rows a step at the Qwen3-{result['shape'].upper()} shape",
        "",
        f"{result['date']}, {result['processor']}, {result['cores']} cores, {result['memory_bytes'] / 1e9:.0f} GB, "
        f"{result['dtype']}, load before the start {result['load_before']}. Random weights; LoRA r 8 on seven "
        "projections; every contender on the same rows in the same order, taking turns.",
        "",
        "| contender | rows/s, median | range | steps | peak memory | checkpointing | truetune is faster by |",
        "|---|---|---|---|---|---|---|",
        *(_line(contender, median_rate(result, OURS)) for contender in result["contenders"]),
        "",
    ]
    problems = [c for c in result["contenders"] if c["problem"] and c["steps"]]
    lines += [f"{c['title']} stopped early: {c['problem']}\n" for c in problems]
    return "\n".join([*lines, *_products(result)])


def _line(contender: dict[str, Any], ours: float | None) -> str:
    if not contender["steps"]:
        return f"| {contender['title']} | missing: {contender['problem'].replace('|', '/')} | | | | | |"
    values = rates(contender)
    median = statistics.median(values)
    ratio = f"{ours / median:.1f}×" if ours and contender["name"] != OURS else ""
    peak = max(step["peak_bytes"] for step in contender["steps"]) / 1e9
    checkpointing = "chosen by itself" if contender["name"] == OURS else "on" if contender["is_checkpointed"] else "off"
    return (
        f"| {contender['title']} | {median:.2f} | {min(values):.2f} to {max(values):.2f} | {len(values)} "
        f"| {peak:.1f} GB | {checkpointing} | {ratio} |"
    )


def _products(result: dict[str, Any]) -> list[str]:
    """Return what the steps of truetune are made of, where that was measured."""
    steps = [s for c in result["contenders"] for s in c["steps"] if c["name"] == OURS and "matmul_seconds" in s]
    if not steps:
        return []
    whole, alone, ratio, share, peak = (
        statistics.median(values)
        for values in zip(
            *(
                (
                    step["seconds"],
                    step["matmul_seconds"],
                    step["seconds"] / step["matmul_seconds"],
                    step["useful_operations"] / step["seconds"] / step["peak_rate"],
                    step["peak_rate"],
                )
                for step in steps
            ),
            strict=True,
        )
    )
    return [
        f"A step of truetune takes {whole:.2f} s; its own matrix products, timed alone in the same process, "
        f"{alone:.2f} s: ratio {ratio:.2f}. Its useful operations are {share:.0%} of the machine's best product "
        f"({peak / 1e12:.2f} TFLOP/s). Medians of {len(steps)} steps.",
        "",
    ]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    table = markdown(json.loads(path.read_text(encoding="utf-8")))
    path.with_suffix(".md").write_text(table, encoding="utf-8")
    sys.stdout.write(table)
