"""What comes of the records: JSON for each benchmark, a Markdown table of all, a chart of some.

`python -m benchmarks._report` writes tables and charts anew from the records.
"""

import json
import math
import pathlib
import re
from typing import Any

from benchmarks._compare import UNITS

RESULTS = pathlib.Path(__file__).parent / "results"

# What the chart shows, and of which peers: few enough to be read in a README.
CHART = {
    "update, 1e7 parameters, 4 leaves": ("optax", "keras", "flax", "torch-2"),
    "single steps, 100 small leaves": ("optax", "keras"),
    "`many`, 100 steps a call, 100 small leaves": ("optax",),
    "digits, `run` with 100 steps a call": ("optax", "keras", "torch-2"),
    "transformer": ("optax",),
    "transformer, compiling": ("optax",),
}
# of M. Okabe and K. Ito, for the colour-blind
COLOURS = {
    "optax": "#0072B2",
    "keras": "#E69F00",
    "flax": "#009E73",
    "torch": "#CC79A7",
    "limit": "#56B4E9",
    "ours": "#D55E00",
}


def tag(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write(name: str, result: dict[str, Any], folder: pathlib.Path) -> pathlib.Path:
    """Write one benchmark's JSON, then table and chart of all that were run on this device."""
    device = tag(result["machine"]["device"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{device}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    redraw(device, folder)
    return path


def redraw(device: str, folder: pathlib.Path) -> None:
    """Write table and chart of all that is recorded of a device."""
    results = [json.loads(p.read_text()) for p in sorted(folder.glob(f"*-{device}.json"))]
    results = [r for r in results if "benchmark" in r]  # one that times nothing has its own table
    (folder / f"table-{device}.md").write_text(page(results))
    chart([row for r in results for row in r["rows"]], folder / f"chart-{device}.png")


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
    """Draw the ratios of the rows in `CHART`, or of all where none of these was run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if "ratio" in row]
    rows = [r for what in CHART for r in timed if r["what"] == what and r["peer"] in CHART[what]]
    rows = rows or timed
    if not rows:
        return
    height = 1.3 + 0.3 * len(rows)
    figure, axes = pyplot.subplots(figsize=(8, height), layout="constrained")
    for y, row in enumerate(rows):
        peer = row["peer"].partition("-")[0]
        low, high = sorted((1, row["ratio"]))
        axes.barh(y, high - low, left=low, color=COLOURS[peer], height=0.75, label=peer)
        axes.plot(row["quartiles"], (y, y), color="black", linewidth=1.2)
        end = max(high, row["quartiles"][1]) * 1.08
        axes.text(end, y, f"{row['ratio']:.2f} {row['peer']}", va="center", fontsize=10)
    axes.set_xscale("log")
    axes.set_xlim(right=6 * max(row["ratio"] for row in rows))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.axvline(1, color="black", linewidth=1)
    labels = [row["what"].replace("`", "") for row in rows]
    once = ["" if i and labels[i - 1] == label else label for i, label in enumerate(labels)]
    axes.set_yticks(range(len(rows)), once, fontsize=10)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=10)
    axes.set_xlabel("time of the peer over ours (black line: quartiles)", fontsize=10)
    bars = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(bars.values(), bars, loc="outside upper center", ncols=len(bars), fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Write the tables and the charts anew from what is recorded; nothing is measured."""
    for path in sorted(RESULTS.glob("step-*.json")):
        redraw(path.stem.removeprefix("step-"), RESULTS)


if __name__ == "__main__":
    main()
