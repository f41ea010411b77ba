"""The table and the plot of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..plotting import save_figure
from .measure import ENGINES, FUSED, PLAIN
from .scores import Costs, scores

BASELINE = "rlfn"

Row = dict[str, Any]


def add_scores(rows: Sequence[Row]) -> None:
    """Put `scores` into every engine's results, against the baseline's in plain PyTorch; nothing without that."""
    baseline = next((r for r in rows if r["name"] == BASELINE and PLAIN in r["engines"]), None)
    if baseline is None:
        return

    def costs(row: Row, engine: str) -> Costs:
        return Costs(row["engines"][engine]["runtime_ms"], row["flops"], row["parameters"])

    against = costs(baseline, PLAIN)
    for row in rows:
        for engine, results in row["engines"].items():
            results["scores"] = asdict(scores(costs(row, engine), against))


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def _psnr(results: Row | None, name: str) -> str:
    part = None if results is None else results["sets"].get(name)
    return "" if part is None else _number(part["psnr"], 2)


def markdown(rows: Sequence[Row], sets: Sequence[str], *, cold_start: bool = False) -> str:
    """A line a network, fused and plain side by side.

    Args:
        rows: with `name`, the fields of `Complexity`, `engines` (engine -> `summary` and `peak_bytes`) and, after
            `add_scores`, scores.
        sets: names of the sets.
        cold_start: show what the first picture took, and the mean without it.
    """
    columns: list[tuple[str, list[str]]] = [("network", [f"`{r['name']}`" for r in rows])]

    def of(engine: str, key: str, digits: int, factor: float = 1.0) -> list[str]:
        values = [r["engines"].get(engine, {}).get(key) for r in rows]
        return [_number(None if v is None else v * factor, digits) for v in values]

    for name in sets:
        columns.append((f"PSNR {name} [dB]", [_psnr(r["engines"].get(FUSED), name) for r in rows]))
        columns.append(("plain", [_psnr(r["engines"].get(PLAIN), name) for r in rows]))
    columns += [("run time [ms]", of(FUSED, "runtime_ms", 2)), ("plain", of(PLAIN, "runtime_ms", 2))]
    columns.append(("speed-up", [_number(r["speedup"], 2) + "x" if r["speedup"] else "" for r in rows]))
    if cold_start:
        for key, title in (("first_ms", "first picture [ms]"), ("warm_ms", "without it [ms]")):
            columns += [(title, of(FUSED, key, 2)), ("plain", of(PLAIN, key, 2))]
    columns += [("memory [MB]", of(FUSED, "peak_bytes", 1, 1e-6)), ("plain", of(PLAIN, "peak_bytes", 1, 1e-6))]
    columns.append(("parameters [M]", [_number(r["parameters"] / 1e6, 3) for r in rows]))
    columns.append(("FLOPs [G]", [_number(r["flops"] / 1e9, 2) for r in rows]))
    columns.append(("activations [M]", [_number(r["activations"] / 1e6, 1) for r in rows]))
    columns.append(("convolutions", [str(r["convolutions"]) for r in rows]))
    for engine, title in ((FUSED, "score"), (PLAIN, "plain")):
        totals = [r["engines"].get(engine, {}).get("scores", {}).get("total") for r in rows]
        columns.append((title, [_number(total, 2) for total in totals]))
    lines = ["| " + " | ".join(title for title, _ in columns) + " |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    lines += ["| " + " | ".join(cells[i] for _, cells in columns) + " |" for i in range(len(rows))]
    return "\n".join(lines)


def plot(rows: Sequence[Row], name: str, path: Path) -> None:
    """Run time against PSNR of one set, the marker's area by FLOPs; a line joins a network's two engines.

    Args:
        rows: as `markdown` takes them.
        name: of the set.
        path: an .svg, .png or .pdf file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    colours = {PLAIN: "tab:orange", FUSED: "tab:blue"}
    seen: set[str] = set()
    for row in rows:
        points = []
        for engine in ENGINES:
            results = row["engines"].get(engine)
            part = None if results is None else results["sets"].get(name)
            if part is None or part["psnr"] is None:
                continue
            points.append((results["runtime_ms"], part["psnr"]))
            area = 12 * max(row["flops"] / 1e9, 0.5) ** 0.75
            label = None if engine in seen else engine
            seen.add(engine)
            axes.scatter(*points[-1], s=area, color=colours[engine], alpha=0.6, label=label)
        if points:
            axes.plot(*zip(*points, strict=True), color="grey", linewidth=0.6)
            axes.annotate(row["name"], points[-1], fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xlabel("run time per picture [ms]")
    axes.set_ylabel(f"PSNR on {name} [dB]")
    axes.set_title("area of a marker: FLOPs at 256x256", fontsize=9)
    axes.grid(alpha=0.3)
    if seen:
        axes.legend()
    save_figure(figure, path)
