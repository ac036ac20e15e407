"""The benchmarks run, in tiny sizes, and what they count stays as it is."""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from benchmarks import __main__ as everything
from benchmarks import _compare, _report, _run, _worker, compile, dispatch, memory, step, update
from benchmarks._compare import Comparison, Name, Pool, Row
from benchmarks._problems import Problem
from benchmarks.peers import ours, with_optax

ROOT = pathlib.Path(__file__).parent.parent.parent
OPTIONS = ("--tiny", "--seconds", "0.001", "--torch", sys.executable)
PEERS = "optax,limit,torch-1"
RECORD = {"what", "measure", "peer", "target", "problem"}
MEASURED = RECORD | {"load", "note", "ours", "theirs", "met"}
TIMED = MEASURED | {"ratio", "quartiles", "cpu_ratio", "ratios"}


def few(rows):
    """Return one row of each kind: others differ in numbers, which are all tiny here."""
    kinds = {}
    for row in rows:
        p = row.problem
        kinds.setdefault((p.kind, p.packed, p.steps_per_call > 1, row.measure), row)
    return list(kinds.values())


FEW = {name: few(rows) for name, rows in everything.ALL.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return where all benchmarks left what they measured, each in one round."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        _run.main(FEW, (*OPTIONS, "--peers", PEERS, "--out", str(folder)), "")
    return folder


@pytest.mark.parametrize("name", everything.ALL)
def test_each_benchmark_leaves_a_record_of_every_row(folder, name):
    result = json.loads((folder / f"{name}-cpu.json").read_text())
    assert {"benchmark", "machine", "rounds", "missing", "minutes", "rows"} <= result.keys()
    rows = FEW[name]
    assert [(r["what"], r["peer"]) for r in result["rows"]] == [
        (row.what, peer) for row in rows for peer in row.targets
    ]
    assert result["missing"]["keras"] == "not asked for"
    for record in result["rows"]:
        if record["peer"] in result["missing"]:
            assert record.keys() == RECORD | {"skipped"}
        elif record["measure"] in _compare.UNITS:
            assert record.keys() == MEASURED
        else:
            assert record.keys() - {"temporary", "disagreement"} == TIMED
            assert record["ratio"] > 0
    runs = [r for r in result["rows"] if r["measure"] == "run" and "ratio" in r]
    agreeing = [r for r in runs if r["peer"] != "limit" or name == "update"]
    assert all(e < 1e-2 for r in agreeing for e in r["disagreement"].values())


def test_all_are_in_the_table_and_the_chart(folder):
    page = (folder / "table-cpu.md").read_text()
    assert all(f"## {name}\n" in page for name in everything.ALL)
    assert (folder / "chart-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_installed_is_told(capsys):
    pool = Pool({"ours": Name("ours"), "torch": Name("with_nothing")})
    assert pool.get("torch") is None
    assert "with_nothing" in pool.missing["torch"]
    assert "MISSING: torch" in capsys.readouterr().out


class Rehearsal(Pool):
    """Workers that answer from a list, and write down who was asked."""

    def __init__(self, errors=0.0):
        super().__init__({"ours": Name(""), "optax": Name(""), "float64": Name("")})
        self.workers = {}
        self.asked, self.errors = [], errors
        self.seconds = {"ours": iter((1, 1, 2, 4)), "optax": iter((1, 3, 4, 20))}

    def start(self, names):
        pass

    def get(self, name):
        return Asked(self, name)

    def prepare(self, name, problem):
        return ""


class Asked(_compare.Worker):
    def __init__(self, pool, name):
        self.pool, self.name = pool, name

    def ask(self, what, **arguments):
        if what == "first":
            return [0.0, 0.0]
        if what == "advance":
            return [1.0, 1.0 + (self.pool.errors if self.name == "optax" else 0)]
        self.pool.asked.append(self.name)
        return [next(self.pool.seconds[self.name]), 1.0]


ROW = Row("", Problem("vector", 8, 1), {"optax": 3.5})


def test_rounds_go_forward_then_backward_and_ratios_are_paired():
    pool = Rehearsal()
    [record] = Comparison(ROW, pool, rounds=3, seconds=1.0).results()
    forward, backward = ["ours", "optax"], ["optax", "ours"]
    assert pool.asked == [*forward, *forward, *backward, *forward]  # the first is to find how many
    assert record["ratios"] == [3, 2, 5]
    assert (record["ratio"], record["quartiles"], record["met"]) == (3, [2.5, 4], False)


def test_peers_that_do_not_agree_are_not_timed():
    with pytest.raises(AssertionError, match=r"not the float64 answer, by \{'optax'"):
        Comparison(ROW, Rehearsal(errors=0.1), rounds=3, seconds=1.0).results()


def test_a_peer_that_does_not_answer_is_ended_and_told_of(monkeypatch):
    monkeypatch.setattr(_worker, "PATIENCE", 0)
    pool = Pool({"ours": Name("float64"), "float64": Name("float64")})
    [record] = Comparison(
        dataclasses.replace(ROW, targets={"float64": 1.0}), pool, 1, 1.0
    ).results()
    pool.close()
    assert record["skipped"] == "float64 did not answer in 0 s"


def test_a_row_that_does_not_fit_in_memory_is_skipped(monkeypatch):
    monkeypatch.setattr(_compare, "memory_available", lambda: 1e-9)
    [record] = Comparison(ROW, Rehearsal(), rounds=3, seconds=1.0).results()
    assert record["skipped"].startswith("needs ")
    assert "needs" in _report.table([record])


@pytest.mark.parametrize("module", [compile, dispatch, memory, step, update])
def test_each_benchmark_runs_alone(module, monkeypatch):
    ran = []
    monkeypatch.setattr(_run, "main", lambda *arguments: ran.append(arguments))
    module.main(OPTIONS)
    [(benchmarks, options, description)] = ran
    assert benchmarks == {name: everything.ALL[name] for name in benchmarks}
    assert (options, description) == (OPTIONS, module.__doc__)


TRANSFORMER = Problem("transformer", leaves=2)


@pytest.fixture(params=[Problem("update", 1 << 18, 4), TRANSFORMER], ids=lambda p: p.kind)
def programs(request):
    """Return the compiled programs of both sides, and how many parameters they have."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        both = [peer(request.param).built("compile") for peer in (ours.Peer, with_optax.Peer)]
    return (*both, sum(p.size for p in request.param.params().values()))


def test_a_program_reads_and_writes_less_than_that_of_optax(programs, request):
    """By 8 bytes a parameter: a clipped gradient, written and read; packing may cost half of it."""
    mine, theirs, parameters = programs
    less = theirs.cost_analysis()["bytes accessed"] - mine.cost_analysis()["bytes accessed"]
    assert less / parameters >= (4 if "transformer" in request.node.name else 8)


def test_a_program_needs_no_more_than_that_of_optax(programs):
    mine, theirs, parameters = (*(p.memory_analysis() for p in programs[:2]), programs[2])
    assert mine.temp_size_in_bytes <= theirs.temp_size_in_bytes
    assert mine.alias_size_in_bytes >= 12 * parameters  # p, m and v


def test_a_step_takes_three_arrays_a_leaf_and_few_more():
    with jax.numpy_rank_promotion("allow"):
        lowered = ours.Peer(TRANSFORMER).built("lower")
    assert len(jax.tree.leaves(lowered.args_info)) <= 3 * len(TRANSFORMER.params()) + 10


@pytest.mark.parametrize("kind", ["digits", "vector"])
def test_many_takes_the_steps_that_single_steps_take(kind):
    """Every peer is checked against float64; ours goes by two ways."""
    one, many = (ours.Peer(Problem(kind, 12, 3, steps_per_call=k)) for k in (1, 5))
    with jax.numpy_rank_promotion("allow"):
        one.run(10)
        many.run(10)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, 1e-6, 1e-7),
        *(side.values() for side in (one, many)),
    )
