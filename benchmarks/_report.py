"""What comes of the records: JSON for each benchmark, a Markdown table and a chart of all."""

import json
import math
import pathlib
import re
from typing import Any

from benchmarks._compare import UNITS

RESULTS = pathlib.Path(__file__).parent / "results"


def tag(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write(name: str, result: dict[str, Any], folder: pathlib.Path) -> pathlib.Path:
    """Write one benchmark's JSON, then table and chart of all that were run on this device."""
    device = tag(result["machine"]["device"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{device}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    results = [json.loads(p.read_text()) for p in sorted(folder.glob(f"*-{device}.json"))]
    results = [r for r in results if "benchmark" in r]  # one that times nothing has its own table
    (folder / f"table-{device}.md").write_text(page(results))
    chart([row for r in results for row in r["rows"]], folder / f"chart-{device}.png")
    return path


def page(results: list[dict[str, Any]]) -> str:
    parts = []
    for result in results:
        machine = result["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
        loads = [r["load"] for r in result["rows"] if "load" in r] or [math.nan]
        parts += [
            f"## {result['benchmark']}\n",
            table(result["rows"]),
            f"\n{machine['device']}, {machine['processor']}, {machine['cores']} cores, "
            f"at most {result['rounds']} rounds; load {min(loads):.1f} to {max(loads):.1f} "
            f"(our own included). {versions}.\n",
        ]
        parts += [f"Missing: {name} ({why}).\n" for name, why in result["missing"].items()]
    return "\n".join(parts)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown: times as ratios only, counted things as they are."""
    lines = ["| | peer | peer / ours | quartiles | wanted | |", "|---|---|---:|---:|---:|---|"]
    for row in rows:
        peer = f"{row['peer']} ({row['note']})" if row.get("note") else row["peer"]
        lines.append(f"| {row['what']} | {peer} | {' | '.join(_cells(row))} |")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    target = "" if row["target"] is None else f"{row['target']:.4g}"
    if "skipped" in row:
        return [row["skipped"], "", target, "-"]
    met = {True: "met", False: "**not met**", None: ""}[row["met"]]
    if row["measure"] not in UNITS:
        low, high = row["quartiles"]
        rounds = f"{low:.2f}-{high:.2f} of {len(row['ratios'])}"
        return [f"{row['ratio']:.2f}", rounds, target, met]
    figures = f"{_figure(row['theirs'])} / {_figure(row['ours'])} {UNITS[row['measure']]}"
    return [figures, "", target, met]


def _figure(x: float) -> str:
    return f"{x:.2e}" if 0 < x < 1e-3 else f"{x:.2f}"


def chart(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw the ratios, on a logarithmic axis, with quartiles and what was wanted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "ratio" in row][::-1]
    if not rows:
        return
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.26 * len(rows)), layout="constrained")
    for y, row in enumerate(rows):
        color = {True: "tab:green", False: "tab:red", None: "tab:gray"}[row["met"]]
        axes.barh(y, row["ratio"] - 1, left=1, color=color, height=0.7)
        axes.plot(row["quartiles"], (y, y), color="black", linewidth=1)
        if row["target"]:
            axes.plot(row["target"], y, "k|", markersize=11, markeredgewidth=2)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{r['what']} · {r['peer']}" for r in rows], fontsize=7)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("peer's time over ours (upright mark: wanted; thin line: quartiles)")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
