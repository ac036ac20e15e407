"""Read the text of a compiled program: its kernels, their cycles and bytes, and its collectives."""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d(?:fn)?)?)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CYCLES = re.compile(r'"estimated_cycles":"(-?\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NAME = re.compile(r"%([\w.\-]+)")

# Instructions that are no kernel: they give a name to memory that is there.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("opt-barrier", "partition-id", "replica-id", "domain", "add-dependency"),
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SMALL = 65_536  # bytes: a condition with a smaller result is a rare way out of a common case


def _bits(dtype: str) -> int:
    return _BITS[dtype] if dtype in _BITS else int(re.sub(r"\D", "", dtype) or 0)


def bytes_of(kind: str, *, only_hbm: bool = False) -> float:
    """Return the bytes of a type; of what lies in HBM alone, if asked: TPUs mark all else."""
    total = 0.0
    for dtype, sizes, layout in _ARRAY.findall(kind):
        if only_hbm and "S(" in layout:
            continue
        count = functools.reduce(int.__mul__, map(int, filter(None, sizes.split(","))), 1)
        total += count * _bits(dtype) / 8
    return total


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    kind: str  # the type of its result
    op: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return _NAME.findall(self.rest.split("), ")[0])

    @property
    def cycles(self) -> int:
        """The cycles that XLA for TPU expects, beside those of the static profile."""
        found = _CYCLES.search(self.rest.split('"bundle_analysis_data"')[0])
        return int(found.group(1)) if found else 0

    @property
    def trips(self) -> int:
        found = _TRIPS.search(self.rest)
        return int(found.group(1)) if found else 1

    @property
    def branches(self) -> list[str]:
        """The computations of which a condition runs one."""
        return self.called("branch_computations", "true_computation", "false_computation")

    def called(self, *keys: str) -> list[str]:
        """Return the computations that it names under these attributes."""
        found = [re.search(key + r"=(?:\{([^}]*)\}|%?([\w.\-]+))", self.rest) for key in keys]
        texts = [match.group(1) or match.group(2) for match in found if match]
        return [name.strip().lstrip("%") for text in texts for name in text.split(",")]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program."""

    computations: dict[str, list[Instruction]]
    entry: str
    closed: bool = False  # whether each condition usually goes the cheap way

    @classmethod
    def read(cls, text: str, closed: bool = False) -> "Program":
        """Return the program of `compiled.as_text()`."""
        computations: dict[str, list[Instruction]] = {}
        here, entry = None, ""
        for line in re.sub(r"/\*[^*]*\*/", "", text).splitlines():
            if head := _HEAD.match(line):
                here = head.group(2)
                computations[here] = []
                entry = here if head.group(1) else entry
            elif line.startswith("}"):
                here = None
            elif here and (match := _LINE.match(line)):
                computations[here].append(Instruction(*match.groups()))
        return cls(computations, entry, closed)

    def _total(self, name: str, cost: Callable[[str, Instruction], float]) -> float:
        """Return the sum of a cost: loops as often as they run, conditions as they usually go."""
        total = 0.0
        for one in self.computations[name]:
            total += cost(name, one)
            if one.op == "while":
                inner = one.called("body", "condition")
                total += one.trips * sum(self._total(x, cost) for x in inner)
            elif one.op == "conditional":
                total += self.usual(one, [self._total(x, cost) for x in one.branches])
            elif one.op in ("call", "async-start"):
                total += sum(self._total(x, cost) for x in one.called("to_apply", "calls"))
        return total

    def usual(self, one: Instruction, costs: list[float]) -> float:
        """Return the cost of the branch that a condition usually takes.

        One that gives a few numbers has a rare way out, such as a norm that overflows. One that
        gives arrays usually makes an update.
        """
        cheap = self.closed or bytes_of(one.kind) < SMALL
        return min(costs) if cheap else max(costs)

    def cycles(self) -> float:
        """Return the cycles that XLA for TPU expects."""
        return self._total(self.entry, lambda _, one: one.cycles)

    def launches(self) -> int:
        """Return the number of kernels, copies and collectives."""
        return int(self._total(self.entry, lambda _, one: float(is_kernel(one))))

    def moved(self) -> float:
        """Return the bytes that kernels read from and write to the main memory."""
        return self._total(self.entry, self.moved_by)

    @functools.cached_property
    def _kinds(self) -> dict[str, dict[str, str]]:
        return {name: {x.name: x.kind for x in xs} for name, xs in self.computations.items()}

    def moved_by(self, name: str, one: Instruction) -> float:
        """Return the bytes that one instruction of a computation reads and writes."""
        if one.op in ("copy-done", "slice-done"):  # between the main memory and one on the chip
            return bytes_of(one.kind)
        if not is_kernel(one):
            return 0.0
        kinds = self._kinds[name]
        read = sum(bytes_of(kinds.get(x, ""), only_hbm=True) for x in one.operands)
        return read + bytes_of(one.kind, only_hbm=True)

    def collectives(self) -> tuple[dict[str, int], float]:
        """Return how many collectives there are of each kind, and the bytes of their results.

        A gather that XLA for TPU cuts into asynchronous chunks is in several fusions: only the one
        that starts it counts.
        """
        found: dict[str, int] = collections.Counter()
        size = 0.0
        for name, one in self._with_names():
            op = one.op.removesuffix("-start")
            if op not in COLLECTIVES or self._is_later_chunk(name, op):
                continue
            found[op] += 1
            size += bytes_of(_result(one))
        return dict(found), size

    def _with_names(self) -> Iterator[tuple[str, Instruction]]:
        for name, instructions in self.computations.items():
            yield from ((name, one) for one in instructions)

    def _is_later_chunk(self, name: str, op: str) -> bool:
        if name == self.entry or op != "all-gather" or "fus" not in name:
            return False
        return not any('"AsyncCollectiveStart"' in x.rest for x in self.computations[name])


def is_kernel(one: Instruction) -> bool:
    """Return whether an instruction is started by itself, and is no copy beside kernels.

    On a TPU, single numbers are computed by its scalar unit. Its arrays have tiles, T.
    """
    inside = one.op in ("while", "conditional", "call", "async-start", "copy-start", "slice-start")
    is_scalar = ":T(" in one.kind and not one.cycles and bytes_of(one.kind) <= 64
    return not (inside or is_scalar or one.op in _FREE or one.op.endswith("-done"))


def _result(one: Instruction) -> str:
    """Return the type of a result; where a collective is started, its operands are part of it."""
    kind = one.kind
    if one.op.endswith("-start") and kind.startswith("(("):
        return kind.partition("), (")[2] or kind
    if one.op == "all-gather-start":
        return ", ".join(match.group(0) for match in list(_ARRAY.finditer(kind))[1:])
    return kind
