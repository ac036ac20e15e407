"""Rows of the tables: this package against its peers, in turns, ratios within a round."""

import dataclasses
import math
import os
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from benchmarks._problems import Problem
from benchmarks._worker import Late, Missing, Name, Worker

OURS = "ours"
CHECKED, TOLERANCE = 10, 1e-2  # steps before the comparison; error over movement, both rms
PARTS = 4  # in which a peer takes its steps, to stop early where the machine is suddenly busy
UNITS = {"temporary": "B/parameter", "donated": "B/parameter", "error": "rms"}
BUILDS = ("trace", "lower", "compile")


def peers(torch_python: str) -> dict[str, Name]:
    cores = os.cpu_count() or 1
    return {
        OURS: Name("ours"),
        "ours, bucket=None": Name("ours", setting=("OURS_BUCKET", "None")),
        "ours, loss only": Name("ours", setting=("OURS_SUMMARIES", "loss")),
        "optax": Name("with_optax"),
        "keras": Name("with_keras"),
        "keras-10": Name("with_keras", setting=("KERAS_STEPS", "10")),
        "flax": Name("with_flax"),
        "torch-1": Name("with_torch", 1, torch_python),
        "torch-2": Name("with_torch", min(2, cores), torch_python),
        "limit": Name("limit", cores),
        "float64": Name("float64"),
    }


@dataclasses.dataclass(frozen=True)
class Row:
    """A comparison.

    Attributes:
      what: its name in the table.
      problem: what is computed.
      targets: peers, each with the least ratio wanted of peer over ours; None: just to be told.
      measure: "run" (seconds of a step), "trace", "lower" or "compile" (seconds to get there),
        "temporary" or "donated" (bytes a parameter), "error" (rms, after `steps` steps).
      rounds: where not as many as usual.
      steps: for "error".
      counted: whether "run" counts temporaries, too, of those peers that can tell.
    """

    what: str
    problem: Problem
    targets: Mapping[str, float | None]
    measure: str = "run"
    rounds: int | None = None
    steps: int = 200
    counted: bool = False

    def tiny(self) -> "Row":
        return dataclasses.replace(self, problem=self.problem.tiny(), rounds=1, steps=20)

    def gigabytes(self) -> float:
        """Return about what all peers need at once: p, m, v, gradients and two temporaries."""
        return 24e-9 * self.problem.size * (1 + len(self.targets))


class Pool:
    """The workers: started when first needed, each with the last problem it was given."""

    def __init__(self, names: Mapping[str, Name], only: list[str] | None = None) -> None:
        self.names = {n: x for n, x in names.items() if not only or n in (*only, OURS, "float64")}
        self.starting: dict[str, Worker] = {}
        self.workers: dict[str, Worker] = {}
        self.missing: dict[str, str] = {n: "not asked for" for n in names if n not in self.names}
        self.problems: dict[str, Problem] = {}

    def start(self, names: Iterable[str]) -> None:
        """Start these if they are not there, all at once."""
        for name in names:
            if not any(name in known for known in (self.missing, self.starting, self.workers)):
                self.starting[name] = Worker(self.names[name])

    def get(self, name: str) -> Worker | None:
        if name in self.missing:
            return None
        if name not in self.workers:
            self.start([name])
            worker = self.starting.pop(name)
            try:
                worker.started()
            except Missing as error:
                worker.close()
                self.missing[name] = str(error)
                print(f"MISSING: {name}: {error}")
                return None
            self.workers[name] = worker
        return self.workers[name]

    def need(self, name: str) -> Worker:
        worker = self.get(name)
        if worker is None:
            raise RuntimeError(f"{name} cannot run: {self.missing[name]}")
        return worker

    def prepare(self, name: str, problem: Problem) -> str:
        self.problems[name] = problem
        return self.need(name).ask("prepare", problem=dataclasses.asdict(problem))

    def release(self) -> None:
        """Free what all workers hold."""
        for name in self.problems:
            self.workers[name].ask("release")
        self.problems = {}

    def forget_the_dead(self) -> None:
        """Let ended workers start anew when they are needed."""
        for name in [n for n, w in self.workers.items() if w.process.poll() is not None]:
            del self.workers[name]
            self.problems.pop(name, None)

    def versions(self) -> dict[str, str]:
        return {k: v for w in self.workers.values() for k, v in w.versions.items()}

    def close(self) -> None:
        for worker in (*self.workers.values(), *self.starting.values()):
            worker.close()
        self.workers.clear()


def relative_error(got: Any, wanted: np.ndarray, first: np.ndarray) -> float:
    def rms(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean(x * x)))

    return rms(np.asarray(got) - wanted) / rms(wanted - first)


def in_whole_calls(steps: float, problem: Problem) -> int:
    return problem.steps_per_call * max(1, math.ceil(steps / problem.steps_per_call))


@dataclasses.dataclass
class Comparison:
    """One row being measured."""

    row: Row
    pool: Pool
    rounds: int
    seconds: float  # of each peer in each round

    def __post_init__(self) -> None:
        self.pool.start((OURS, "float64", *self.row.targets))
        self.names = [n for n in (OURS, *self.row.targets) if self.pool.get(n)]
        if self.row.rounds:
            self.rounds = min(self.rounds, self.row.rounds)

    def results(self) -> list[dict[str, Any]]:
        """Measure, and return a record for each peer."""
        available = memory_available()
        if self.row.gigabytes() > 0.8 * available:
            reason = f"needs {self.row.gigabytes():.0f} GB, there are {available:.0f}"
            return [{**self._facts(n), "skipped": reason} for n in self.row.targets]
        try:
            return self._measured()
        except (Late, RuntimeError) as error:  # it did not answer, or it died
            self.pool.forget_the_dead()
            return [{**self._facts(n), "skipped": str(error)} for n in self.row.targets]

    def _measured(self) -> list[dict[str, Any]]:
        load = os.getloadavg()[0]
        self.pool.release()
        notes = {n: self.pool.prepare(n, self.row.problem) for n in self.names}
        temporary = self._bytes_a_parameter("temporary") if self.row.counted else {}
        if self.row.measure == "run":
            errors = self._check_agreement(in_whole_calls(CHECKED, self.row.problem))
            samples = self._in_turns(self._run())
        elif self.row.measure in BUILDS:
            errors = {}
            samples = self._in_turns(
                {n: ("build", {"stage": self.row.measure}) for n in self.names}
            )
        else:
            errors, samples = {}, self._counted()
        records = []
        for name in self.row.targets:
            record = self._facts(name)
            if name in self.names:
                record |= {"load": load, "note": notes[name]}
                record |= self._compared(samples[OURS], samples[name], self.row.targets[name])
                if name in temporary:
                    record["temporary"] = {OURS: temporary[OURS], "peer": temporary[name]}
                if name in errors:
                    record["disagreement"] = {OURS: errors[OURS], "peer": errors[name]}
            else:
                record["skipped"] = f"missing: {self.pool.missing[name]}"
            records.append(record)
        return records

    def _facts(self, name: str) -> dict[str, Any]:
        problem = dataclasses.asdict(self.row.problem)
        target = self.row.targets[name]
        facts = {"what": self.row.what, "measure": self.row.measure, "peer": name}
        return {**facts, "target": target, "problem": problem}

    def _errors(self, steps: int) -> dict[str, float]:
        """Advance all peers, and return their distance to float64, relative to the movement."""
        self.pool.prepare("float64", self.row.problem)
        reference = self.pool.need("float64")
        first = np.asarray(reference.ask("first"))
        wanted = np.asarray(reference.ask("advance", steps=steps))
        got = {n: self.pool.need(n).ask("advance", steps=steps) for n in self.names}
        return {n: relative_error(x, wanted, first) for n, x in got.items() if x is not None}

    def _check_agreement(self, steps: int) -> dict[str, float]:
        errors = self._errors(steps)
        wrong = {n: e for n, e in errors.items() if not e <= TOLERANCE}
        if wrong:
            raise AssertionError(f"{self.row.what}: not the float64 answer, by {wrong}.")
        return errors

    def _run(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Return what to ask of each peer: to take steps for about the seconds wanted."""
        problem, asked = self.row.problem, {}
        for name in self.names:
            once = self.pool.need(name).ask("timed", steps=in_whole_calls(1, problem), seconds=0)[0]
            part = in_whole_calls(self.seconds / once / PARTS, problem)
            asked[name] = ("timed", {"steps": part, "seconds": self.seconds})
        return asked

    def _in_turns(self, asked: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
        """Ask all peers in every round, forward then backward."""
        samples: dict[str, Any] = {name: [] for name in self.names}
        for turn in range(self.rounds):
            for name in self.names if turn % 2 == 0 else reversed(self.names):
                what, arguments = asked[name]
                samples[name].append(self.pool.need(name).ask(what, **arguments))
        return samples

    def _counted(self) -> dict[str, Any]:
        if self.row.measure == "error":
            return {n: [(e,)] for n, e in self._errors(self.row.steps).items()}
        return {n: [(c,)] for n, c in self._bytes_a_parameter(self.row.measure).items()}

    def _bytes_a_parameter(self, measure: str) -> dict[str, float]:
        counts = {n: self.pool.need(n).ask("counts") for n in self.names}
        parameters = sum(p.size for p in self.row.problem.params().values())
        return {n: c[measure] / parameters for n, c in counts.items() if c}

    def _compared(self, ours: Any, theirs: Any, target: float | None) -> dict[str, Any]:
        pairs = [(o[0], t[0]) for o, t in zip(ours, theirs, strict=True)]
        our, their = (statistics.median(side) for side in zip(*pairs, strict=True))
        record: dict[str, Any] = {OURS: our, "theirs": their}
        if self.row.measure == "donated":
            return record | {"target": target, "met": None if target is None else our >= target}
        if self.row.measure in UNITS:
            return record | {"met": None if target is None else our * target <= their}
        ratios = [t / o for o, t in pairs]
        ratio = statistics.median(ratios)
        return record | {
            "ratio": ratio,
            "quartiles": [float(q) for q in np.quantile(ratios, (0.25, 0.75))],
            "met": None if target is None else ratio >= target,
            "cpu_ratio": statistics.median(t[1] / o[1] for o, t in zip(ours, theirs, strict=True)),
            "ratios": ratios,
        }


def memory_available() -> float:
    """Return the gigabytes to be had, or infinity where the system does not tell."""
    try:
        with open("/proc/meminfo") as lines:
            found = next(line for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf
    return int(found.split()[1]) * 1e-6
