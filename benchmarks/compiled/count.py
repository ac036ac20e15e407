"""What a compiled program costs, in figures that are the same on every machine."""

import time
from typing import Any, NamedTuple

import jax

from benchmarks.compiled.cases import Case, entries
from benchmarks.compiled.hlo import Program
from benchmarks.compiled.schedule import simulated
from benchmarks.compiled.targets import Target


class Cost(NamedTuple):
    """The figures of one program; of one device, where there are several.

    Attributes:
      cycles: those that XLA for TPU expects; 0 for GPU.
      simulated: when the last kernel ends; see `schedule`.
      launches: kernels and collectives.
      moved: bytes to and from the main memory, a parameter.
      temporary: bytes that are neither arguments nor results, a parameter.
      arguments: bytes of arguments as they lie, with padding, a parameter.
      collectives: how many of each kind.
      exchanged: bytes of their results, a parameter.
      seconds: to compile.
    """

    cycles: float
    simulated: float
    launches: int
    moved: float
    temporary: float
    arguments: float
    collectives: dict[str, int]
    exchanged: float
    seconds: float


def cost(case: Case, target: Target, lowered: jax.stages.Lowered) -> Cost:
    """Compile a program and count."""
    start = time.perf_counter()
    compiled: Any = lowered.compile()
    seconds = time.perf_counter() - start
    program, memory = Program.read(compiled.as_text(), case.closed), compiled.memory_analysis()
    kinds, exchanged = program.collectives()
    count = entries(case)
    return Cost(
        cycles=program.cycles(),
        simulated=simulated(program) if target.platform == "tpu" else 0.0,
        launches=program.launches(),
        moved=program.moved() / count,
        temporary=memory.temp_size_in_bytes / count,
        arguments=memory.argument_size_in_bytes / count,
        collectives=kinds,
        exchanged=exchanged / count,
        seconds=seconds,
    )
