"""The command of every benchmark: options, workers, rows, report."""

import argparse
import os
import pathlib
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import _report
from benchmarks._compare import OURS, Comparison, Pool, Row, peers


def options(arguments: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    summary = (description or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=0.15, help="of a peer in a round")
    parser.add_argument("--out", type=pathlib.Path, default=_report.RESULTS, help="a folder")
    parser.add_argument("--peers", type=lambda x: x.split(","), help="only these, by comma")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    python = os.environ.get("TORCH_PYTHON", sys.executable)
    parser.add_argument("--torch", default=python, help="a Python that has torch (TORCH_PYTHON)")
    parser.add_argument("--tiny", action="store_true", help="one round of tiny problems, for tests")
    return parser.parse_args(arguments)


def machine(pool: Pool) -> dict[str, Any]:
    device = pool.need(OURS).ask("device")
    return {
        "device": device,
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": pool.versions(),
    }


def processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def measure(name: str, rows: Sequence[Row], chosen: argparse.Namespace, pool: Pool) -> None:
    """Measure the rows of one benchmark, print them as they come, and write the report."""
    start = time.monotonic()
    print(f"\n{name}: load {os.getloadavg()[0]:.2f} of {os.cpu_count()} cores", flush=True)
    records: list[dict[str, Any]] = []
    for row in rows:
        if chosen.only in row.what:
            row = row.tiny() if chosen.tiny else row
            new = Comparison(row, pool, chosen.rounds, chosen.seconds).results()
            print("\n".join(_report.table(new).splitlines()[2:]), flush=True)
            records += new
    result = {
        "benchmark": name,
        "machine": machine(pool),
        "rounds": chosen.rounds,
        "minutes": (time.monotonic() - start) / 60,
        "missing": dict(pool.missing),
        "rows": records,
    }
    print(_report.write(name, result, chosen.out), f"{result['minutes']:.1f} minutes", flush=True)


def main(
    benchmarks: Mapping[str, Sequence[Row]],
    arguments: Sequence[str] | None,
    description: str | None,
) -> None:
    chosen = options(arguments, description)
    pool = Pool(peers(chosen.torch), chosen.peers)
    try:
        for name, rows in benchmarks.items():
            measure(name, rows, chosen, pool)
    finally:
        pool.close()
