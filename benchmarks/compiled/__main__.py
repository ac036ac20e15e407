"""Compile steps for TPU and GPU, which need not be here, and count what the compilers made.

    python -m benchmarks.compiled [tpu|gpu] [words that cases must have] [--write]

Our step and the step written by hand with optax do the same work. Figures are counted in the
compiled programs, so they are the same on every machine; those of one version of a compiler may
differ from those of the next. How far to trust them: see docs/benchmarks.md.
"""

import argparse
import fnmatch
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from benchmarks.compiled.targets import TARGETS, Target, begin_again, missing

RESULTS = pathlib.Path(__file__).parent.parent / "results"
HEAD = (
    "| for | case | cycles | simulated | launches | bytes moved | temporary | collectives | "
    "exchanged | compile |\n|---|---|---:|---:|---:|---:|---:|---|---:|---:|"
)


def rows(targets: list[Target], pattern: str) -> Iterator[dict[str, Any]]:
    """Yield the figures of both sides of each case."""
    from benchmarks.compiled.build import ours, with_optax
    from benchmarks.compiled.cases import CASES
    from benchmarks.compiled.count import cost

    for target in targets:
        for name, case in CASES[target.count].items():
            if not fnmatch.fnmatch(name, pattern):
                continue
            both = {"ours": ours, "optax": with_optax}
            found = {side: cost(case, target, f(case, target)) for side, f in both.items()}
            yield {"for": target.name, "case": name} | {k: v._asdict() for k, v in found.items()}


def line(row: dict[str, Any]) -> str:
    """Return a row of the table: ours, and ours over optax in brackets."""
    ours, optax = row["ours"], row["optax"]

    def figure(name: str, digits: int) -> str:
        mine, theirs = ours[name], optax[name]
        if not mine and not theirs:
            return ""
        ratio = f" ({mine / theirs:.2f})" if theirs > 0.005 else f" ({theirs:.2f})"
        return f"{mine:,.{digits}f}{ratio}"

    kinds = ", ".join(f"{n} {k}" for k, n in sorted(ours["collectives"].items()))
    theirs = ", ".join(f"{n} {k}" for k, n in sorted(optax["collectives"].items()))
    collectives = kinds if kinds == theirs else f"{kinds or 0} ({theirs or 0})"
    figures = [figure(n, 0) for n in ("cycles", "simulated", "launches")]
    figures += [figure(n, 2) for n in ("moved", "temporary")]
    end = [collectives, figure("exchanged", 2), f"{ours['seconds'] / optax['seconds']:.2f}"]
    return " | ".join(["| " + str(row["for"]), str(row["case"]), *figures, *end]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("platform", nargs="?", choices=["tpu", "gpu"])
    parser.add_argument("cases", nargs="?", default="*", help="a pattern of names of cases")
    parser.add_argument("--write", action="store_true", help="record the figures in results/")
    options = parser.parse_args()
    begin_again()
    platforms = [options.platform] if options.platform else ["tpu", "gpu"]
    for platform in list(platforms):
        if problem := missing(platform):
            print(f"not here: {problem}")
            platforms.remove(platform)
    targets = [target for target in TARGETS if target.platform in platforms]
    print(HEAD)
    found = []
    for row in rows(targets, options.cases):
        print(line(row), flush=True)
        found.append(row)
    if options.write and found:
        write(found)


def write(found: list[dict[str, Any]]) -> None:
    """Record the figures, with the versions that made them."""
    import importlib.metadata

    names = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt", "optax", "optimize_loss")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    (RESULTS / "compiled.json").write_text(
        json.dumps({"versions": versions, "rows": found}, indent=1) + "\n"
    )
    (RESULTS / "compiled.md").write_text("\n".join([HEAD, *map(line, found)]) + "\n")


if __name__ == "__main__":
    main()
