"""When a TPU would be done: kernels in order, copies between memories beside them, in a queue.

A model, fitted to v5e: what the compiler expects of a kernel in cycles assumes that each begins by
reading from the main memory. Where the operands are on the chip already, its count of bundles says
more. Neither knows how copies delay the kernels that wait for them; here they do.
"""

import re

from benchmarks.compiled.hlo import Instruction, Program, bytes_of, is_kernel

RATE = 444.0  # bytes a cycle between the main memory and the chip
LATENCY = 1150.0  # cycles until the first byte of a copy is there
START = 12.0  # cycles to start a kernel or a copy
READ = 1820.0  # cycles that the compiler adds to each kernel, for a first read that waits
BRANCH, TRIP, SCALAR = 60.0, 30.0, 6.0
_BUNDLES = re.compile(r'"bundle_analysis_data":\{"estimated_cycles":"(-?\d+)"')


def simulated(program: Program) -> float:
    """Return after how many cycles the last kernel of a program has ended."""
    return _time(program, program.entry)


def _time(program: Program, name: str) -> float:
    now, queue = 0.0, 0.0
    arrives: dict[str, float] = {}
    for one in program.computations[name]:
        if one.op in ("copy-start", "slice-start"):
            now += START
            queue = max(queue, now) + _copied(program, name, one) / RATE
            arrives[one.name] = queue + LATENCY
        elif one.op in ("copy-done", "slice-done"):
            now = max(now + START, *(arrives.get(x, 0.0) for x in one.operands))
        else:
            now += _cost(program, name, one)
    return now


def _copied(program: Program, name: str, one: Instruction) -> float:
    done = (x for x in program.computations[name] if one.name in x.operands)
    return next((bytes_of(x.kind) for x in done if x.op.endswith("-done")), 0.0)


def _cost(program: Program, name: str, one: Instruction) -> float:
    """Return the cycles of what is no copy."""
    if one.op == "conditional":
        return BRANCH + program.usual(one, [_time(program, x) for x in one.branches])
    if one.op == "while":
        return one.trips * (TRIP + sum(_time(program, x) for x in one.called("body", "condition")))
    if one.op == "call":
        return sum(_time(program, x) for x in one.called("to_apply"))
    return _kernel(program, name, one) if is_kernel(one) else 0.0


def _kernel(program: Program, name: str, one: Instruction) -> float:
    found = _BUNDLES.search(one.rest)
    bundles = float(found.group(1)) if found else 0.0
    if not one.cycles and not bundles and bytes_of(one.kind) <= 64:
        return SCALAR
    expected = one.cycles - READ if one.cycles else bytes_of(one.kind) / 256
    if not found:
        expected += LATENCY if program.moved_by(name, one) > 64 else 0.0
    return START + max(bundles, expected, 0.0)
