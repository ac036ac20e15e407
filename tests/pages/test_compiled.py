"""The benchmark of programs for TPU and GPU reads the text of compiled programs right."""

import importlib.util
import pathlib

import pytest

from benchmarks.compiled import cases, targets
from benchmarks.compiled.hlo import Program, bytes_of
from benchmarks.compiled.schedule import LATENCY, RATE, START, simulated

TEXT = """HloModule jit_f

%body (p: f32[1000]) -> f32[1000] {
  %p = f32[1000]{0} parameter(0)
  ROOT %twice = f32[1000]{0} fusion(%p), calls=%g, cost={"estimated_cycles":"50"}
}

%small (q: f32[1000]) -> f32[1000] {
  ROOT %q = f32[1000]{0} parameter(0)
}

ENTRY %main (a: f32[1000], b: pred[]) -> f32[1000] {
  %a = f32[1000]{0} parameter(0)
  %b = pred[] parameter(1)
  %loop = f32[1000]{0} while(%a), condition=%small, body=%body, c={"known_trip_count":{"n":"3"}}
  %gathered = (f32[250]{0}, f32[1000]{0}) all-gather-start(%loop), dimensions={0}
  %whole = f32[1000]{0} all-gather-done(%gathered)
  %moved = (f32[1000]{0:S(1)}, f32[1000]{0}, u32[]) copy-start(%whole)
  %here = f32[1000]{0:S(1)} copy-done(%moved)
  ROOT %out = f32[1000]{0} conditional(%b, %here, %here), branch_computations={%small, %body}
}
"""


def test_the_page_shows_rows_that_were_recorded():
    root = pathlib.Path(__file__).parents[2]
    recorded = (root / "benchmarks/results/compiled.md").read_text().splitlines()
    page = (root / "docs/benchmarks.md").read_text().partition("## Compiled")[2]
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    assert not [row for row in rows if row not in recorded]


def test_bytes_of_types():
    assert bytes_of("(f32[2,3]{1,0:T(8,128)}, bf16[4]{0}, pred[])") == 24 + 8 + 1
    assert bytes_of("(f32[2]{0:S(1)}, s32[2]{0})", only_hbm=True) == 8
    assert bytes_of("f8e4m3fn[10]{0}") == 10


def test_loops_run_as_often_as_they_do_and_conditions_go_as_they_usually_do():
    usual, closed = Program.read(TEXT), Program.read(TEXT, closed=True)
    assert usual.cycles() == 3 * 50  # a result of 4,000 bytes is that of a rare way out
    assert closed.cycles() == 150
    assert usual.launches() == 3 + 1
    assert usual.moved() == 3 * 8000 + 4000 + (1000 + 4000) + 4000


def test_a_collective_counts_once_with_its_result():
    assert Program.read(TEXT).collectives() == ({"all-gather": 1}, 4000)


def test_a_kernel_waits_for_a_copy():
    text = TEXT.replace("ROOT %out = f32[1000]{0} conditional", "ROOT %out = f32[1000]{0} custom")
    assert simulated(Program.read(text)) > 4000 / RATE + LATENCY + START


def test_all_cases_say_what_both_sides_do():
    for count, several in cases.CASES.items():
        for name, case in several.items():
            assert cases.entries(case) > 0, name
            assert count > 1 or case.layout == "replicated", name


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_a_missing_compiler_is_named_with_the_command_that_installs_it():
    assert "optimize_loss[compiled]" in (targets.missing("tpu") or "")
