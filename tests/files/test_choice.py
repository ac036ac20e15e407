"""Hyperparameters that a file and the code have otherwise: which of them a restored state has."""

import json
import warnings

import numpy as np
import pytest

from optimize_loss._files.named import is_key, key_kind, on_host, outline
from optimize_loss._files.safetensors import write
from tests.files.saved import T, links, ol, params
from tests.files.saved import built as built_of

RATE = "optimizer/rate/learning_rate"
SCHEDULE = ol.schedules.ExponentialDecay(0.1, 5, 0.5)
OTHER = ol.schedules.ExponentialDecay(0.2, 5, 0.5)


def made(rate):
    return built_of(links(rate=T.ScaleByLearningRate(rate)))


def rate_of(state):
    """Return the learning rate of the next step."""
    return float(state.chain.numbers_named("learning_rate", state.links, state.step)["rate"])


# the code of the run, what is set in it, the code now; the rate restored; of the file; warned of
CASES = {
    "nothing": (0.5, None, 0.5, 0.5, None, ""),
    "edited": (0.5, None, 0.25, 0.25, False, ""),
    "set": (0.5, 0.125, 0.5, 0.125, True, "those of the file are taken"),
    "set-then-edited": (0.5, 0.125, 0.25, 0.25, False, "those of the code are taken"),
    "set-to-the-edit": (0.5, 0.25, 0.25, 0.25, None, ""),
    "schedule": (SCHEDULE, None, SCHEDULE, 0.1, None, ""),
    "schedule-edited": (SCHEDULE, None, OTHER, 0.2, None, ""),
    "schedule-to-number": (SCHEDULE, None, 0.25, 0.25, False, ""),
    "number-to-schedule": (0.5, None, SCHEDULE, 0.1, False, ""),
    "set-over-schedule": (SCHEDULE, 0.125, SCHEDULE, 0.125, True, "those of the file are taken"),
    "set-and-schedule-gone": (SCHEDULE, 0.125, 0.25, 0.25, False, "those of the code are taken"),
}


def restored(path, now, warning="", **options):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        state, report = ol.restore(path, made(now).init(params(1)), strict=True, **options)
    assert [warning in str(x.message) for x in seen] == ([True] if warning else [])
    assert all(x.filename == __file__ for x in seen)
    assert RATE in report.matched
    return state, report


@pytest.mark.parametrize("case", CASES)
def test_the_latest_number_counts(path, case):
    before, put, now, wanted, of_file, warning = CASES[case]
    state = made(before).init(params())
    ol.save(path, state if put is None else state.set(learning_rate=put))
    state, report = restored(path, now, warning)
    np.testing.assert_allclose(rate_of(state), wanted, rtol=1e-6)
    assert report.from_file == ((RATE,) if of_file else ())
    assert report.from_code == ((RATE,) if of_file is False else ())


def test_all_can_come_from_one_place(path):
    ol.save(path, made(0.5).init(params()).set(learning_rate=0.125))
    state, report = restored(path, 0.25, numbers="file")
    assert (rate_of(state), report.from_file, report.from_code) == (0.125, (RATE,), ())
    assert "numbers as in the file: optimizer/rate/learning_rate" in str(report)
    state, report = restored(path, 0.5, numbers="code")
    assert (rate_of(state), report.from_file, report.from_code) == (0.5, (), (RATE,))
    assert "numbers as in the code: optimizer/rate/learning_rate" in str(report)
    with pytest.raises(ValueError, match=r"`numbers` must be one of.*'latest'"):
        ol.restore(path, made(0.5).init(params()), numbers="newest")


def test_a_pair_is_one_number(path):
    average = lambda decay: built_of(links(ema=T.AverageParams(decay)))
    ol.save(path, average(0.5).init(params()))
    state, report = ol.restore(path, average(0.75).init(params()))
    assert report.from_code == ("optimizer/ema/decay",)
    assert state.optimizer["ema"]["decay"].tolist() == [0.75, 0.25]


def test_an_older_file_counts_as_set_in_its_run(path):
    state = made(0.5).init(params())
    kinds = {name: key_kind(x) for name, x in outline(state).items() if is_key(x)}
    write(path, on_host(state), {"keys": json.dumps(kinds), "versions": "{}"})
    state, report = restored(path, 0.25, "those of the file are taken")
    assert (rate_of(state), report.from_file) == (0.5, (RATE,))
