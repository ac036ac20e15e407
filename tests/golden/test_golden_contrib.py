"""Every recorded run of contrib's `optimize_loss` replays, parameters and summaries alike.

What cannot apply:

- `multipliers_var_keys` keys the multipliers by variable objects. JAX arrays have no name and no
  hash, so the names stand in their place.
- `noise_mult_clip` drew its noise from TensorFlow's generator. The draws are recovered from the
  record, which proves order and truncation, and then take the place of ours.
- `sparse_RMSProp`: contrib leaves the mean of squares of rows that were not looked up alone.
  JAX's gradients are dense: all rows decay.
- `sparse_clip`, and the norms that the sparse records report: contrib takes the norm before
  duplicate rows are summed. JAX has summed them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol
from tests.golden import golden_data as golden

RECORD = golden.load("contrib.json")
CASES = {f"{c['system']}-{c['case']}": c for c in RECORD["cases"]}
SPARSE = {c["case"]: c for c in RECORD["sparse_cases"]}
NAMED_MULTIPLIERS = {"dense/kernel": 0.5, "scale": 2.0}
NEEDS_TENSORFLOW_DRAWS = {"contrib-1.15-noise_mult_clip"}
ROWS_NOT_SUMMED = {"sparse_RMSProp", "sparse_clip"}


def run_code(text):
    """Evaluate a line written for TensorFlow, with our functions and classes under its names."""
    names = {**vars(ol.schedules), **vars(ol.optimizers)}
    names |= {"adaptive_clipping_fn": ol.adaptive_clipping_fn, "gs": 0}
    return eval(text, names)


def options(case):
    kwargs = dict(case["kwargs"])
    if str(kwargs["optimizer"]).startswith("lambda"):
        kwargs["optimizer"] = run_code(kwargs["optimizer"])
    if kwargs["learning_rate"] == "tf.constant(0.1)":
        kwargs["learning_rate"] = jnp.float32(0.1)
    if decay := kwargs.get("learning_rate_decay_fn"):
        kwargs["learning_rate_decay_fn"] = run_code(f"lambda lr, gs: {decay}")
    if isinstance(kwargs.get("clip_gradients"), str):
        kwargs["clip_gradients"] = run_code(kwargs["clip_gradients"])
    if isinstance(kwargs.get("gradient_multipliers"), str):
        kwargs["gradient_multipliers"] = NAMED_MULTIPLIERS
    if case["system"].startswith(("contrib-seed0", "contrib-0.9")):
        kwargs.setdefault("moving_average_decay", 0.9)  # the default of those versions
    return kwargs


def replay(**kwargs):
    """Return parameters after every step, and metrics of every step."""
    step = ol.optimize_loss(golden.loss, **kwargs)
    state = step.init(golden.initial_params())
    rows, metrics, steps = [golden.flat(state.params)], [], []
    for x, y in zip(*golden.batches(), strict=True):
        state, seen = step(state, x, y)
        rows.append(golden.flat(state.params))
        metrics.append(seen)
        steps.append(int(state.step))
    return np.stack(rows), metrics, steps


def our_tag(tag):
    """Return our name for a tag of contrib: no scope, no output number."""
    tag = tag.removeprefix("OptimizeLoss/")
    return "learning_rate" if tag == "learning_rate_1" else tag.removesuffix("_0")


@pytest.mark.parametrize("name", sorted(CASES.keys() - NEEDS_TENSORFLOW_DRAWS))
def test_replays(name):
    case = CASES[name]
    rows, metrics, steps = replay(**options(case))
    np.testing.assert_allclose(rows, np.float32(case["params"]), **golden.CLOSE)
    assert steps == case["global_step"]
    np.testing.assert_allclose([m["loss"] for m in metrics], case["losses"], **golden.CLOSE)
    for recorded, seen in zip(case.get("summaries", []), metrics, strict=False):
        for tag, value in recorded.items():
            np.testing.assert_allclose(seen[our_tag(tag)], value, **golden.CLOSE, err_msg=tag)
    for value, seen in zip(case.get("loss_ema_after_step", []), metrics, strict=False):
        np.testing.assert_allclose(seen["loss/mean"], value, **golden.CLOSE)
    histograms = {our_tag(tag) for tag in case.get("histogram_tags", [])}
    assert histograms == {tag for tag in metrics[0] if tag.startswith("gradients/")}


@pytest.mark.parametrize(
    "name", [n for n in sorted(CASES) if "adaptive_stats_after_step" in CASES[n]]
)
def test_adaptive_statistics_replay(name):
    case = CASES[name]
    step = ol.optimize_loss(golden.loss, **options(case))
    state = step.init(golden.initial_params())
    batches = zip(*golden.batches(), case["adaptive_stats_after_step"], strict=True)
    for x, y, recorded in batches:
        state, _ = step(state, x, y)
        for tag, value in recorded.items():
            memory = tag.rpartition("/")[2].removesuffix(":0")
            ours = state.optimizer["clip_gradients"][memory]
            np.testing.assert_allclose(ours, value, **golden.CLOSE, err_msg=memory)


def test_noise_comes_first_and_stays_within_two_deviations():
    case = CASES["contrib-1.15-noise_mult_clip"]
    rows = np.array(case["params"])
    norms = [s["OptimizeLoss/global_norm/gradient_norm"] for s in case["summaries"]]
    multipliers = np.concatenate([np.full(12, 0.5), np.ones(3), [2.0]])
    grad = jax.jit(jax.grad(golden.loss))
    draws, other_order = [], []
    for before, after, norm, x, y in zip(
        rows[:-1], rows[1:], norms, *golden.batches(), strict=True
    ):
        noisy = (before - after) / 0.1 * norm / 0.5  # undo the rate and the clip to 0.5
        kernel, bias, scale = np.split(np.float32(before), [12, 15])
        dense = {"kernel": jnp.asarray(kernel.reshape(4, 3)), "bias": jnp.asarray(bias)}
        clean = golden.flat(grad({"dense": dense, "scale": jnp.asarray(scale[0])}, x, y))
        draws.append((noisy / multipliers - clean) / 0.3)
        other_order.append((noisy - multipliers * clean) / 0.3)
    assert 1.9 < np.abs(draws).max() < 2.001
    assert abs(np.std(draws) - 0.88) < 0.05
    assert np.abs(other_order).max() > 2.5


def sparse_batches(problem):
    return np.array(problem["idx"], np.int32), np.array(problem["tgt"], np.float32)


@pytest.mark.parametrize("name", sorted(SPARSE.keys() - ROWS_NOT_SUMMED))
def test_sparse_records_replay_through_dense_gradients(name):
    case, problem = SPARSE[name], RECORD["problem"]["sparse"]

    def loss(params, index, target):
        return jnp.sum((params["emb"][index] - target) ** 2) / 2

    step = ol.optimize_loss(loss, **case["kwargs"])
    state = step.init({"emb": jnp.float32(problem["table"])})
    rows, losses = [np.asarray(state.params["emb"])], []
    for index, target in zip(*sparse_batches(problem), strict=True):
        state, metrics = step(state, index, target)
        rows.append(np.asarray(state.params["emb"]))
        losses.append(metrics["loss"])
    np.testing.assert_allclose(rows, np.float32(case["table"]), **golden.CLOSE)
    np.testing.assert_allclose(losses, case["losses"], **golden.CLOSE)


TF1 = {c["case"]: c for c in golden.load("tf1.json")["cases"]}


@pytest.mark.parametrize("name", sorted(TF1))
def test_tf1_optimizers_replay(name):
    case = TF1[name]
    kwargs = dict(case["kwargs"])
    make = getattr(ol.optimizers, case["optimizer"])
    decay = None
    if recorded := dict(case["decay"] or {}):
        assert recorded.pop("schedule") == "exponential_decay"
        decay = functools.partial(ol.schedules.exponential_decay, **recorded)
    rows, metrics, _ = replay(
        learning_rate=kwargs.pop("learning_rate"),
        optimizer=lambda lr: make(lr, **kwargs),
        learning_rate_decay_fn=decay,
    )
    np.testing.assert_allclose(rows, np.float32(case["params"]), **golden.CLOSE)
    np.testing.assert_allclose([m["loss"] for m in metrics], case["losses"], **golden.CLOSE)
