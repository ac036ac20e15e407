"""Every example and every name of the documentation page of `tf.keras.optimizers.Optimizer`.

The page is that of TensorFlow 2.15. Its examples stand here as they stand there, with `ol` for
`tf.keras`, `jnp` for `tf`, and `compute_gradients` in place of the tape, which JAX does not have.
"""

import inspect
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optimize_loss as ol
from tests.cases import on_eight_devices

Optimizer: Any = ol.optimizers.Optimizer

SGD = ol.optimizers.SGD


def values(*variables):
    return [float(v.numpy()) for v in variables]


def exactly(*numbers):
    """The numbers as float32 has them."""
    return [float(np.float32(x)) for x in numbers]


# Usage.


def test_usage():
    opt = SGD(learning_rate=0.1)
    var1, var2 = ol.Variable(1.0), ol.Variable(2.0)
    loss = lambda: 3 * var1 * var1 + 2 * var2 * var2
    assert opt.minimize(loss, var_list=[var1, var2]) is None
    np.testing.assert_allclose(values(var1, var2), [0.4, 1.2], rtol=1e-6)
    assert opt.iterations == 1


def test_processing_gradients_before_applying_them():
    opt = SGD(learning_rate=0.1)
    var1, var2 = ol.Variable(1.0), ol.Variable(2.0)

    loss = lambda: 3 * var1 * var1 + 2 * var2 * var2
    grads = [grad for grad, _ in opt.compute_gradients(loss, [var1, var2])]

    assert grads[0] is not None
    grads[0] = grads[0] + 1

    opt.apply_gradients(zip(grads, [var1, var2], strict=True))
    np.testing.assert_allclose(values(var1, var2), [0.3, 1.2], rtol=1e-6)


def test_dynamic_learning_rate():
    start = np.random.default_rng(0).random(size=(1,))
    var = ol.Variable(start)
    learning_rate = ol.schedules.ExponentialDecay(
        initial_learning_rate=0.01, decay_steps=20, decay_rate=0.1
    )
    opt = SGD(learning_rate=learning_rate)
    loss = lambda: 3 * var
    opt.minimize(loss, var_list=[var])
    np.testing.assert_allclose(var.numpy(), start - 0.03, rtol=1e-6)
    opt.minimize(loss, var_list=[var])
    np.testing.assert_allclose(var.numpy(), start - 0.03 * (1 + 0.1 ** (1 / 20)), rtol=1e-6)
    np.testing.assert_allclose(opt.learning_rate, 0.01 * 0.1 ** (1 / 20), rtol=1e-6)


def test_gradients_clipping():
    opt = SGD(learning_rate=1, clipvalue=1)
    var1, var2 = ol.Variable(2.0), ol.Variable(2.0)
    loss = lambda: 2 * var1 + 2 * var2
    grads = [grad for grad, _ in opt.compute_gradients(loss, [var1, var2])]
    assert [g.item() for g in grads if g is not None] == [2.0, 2.0]
    opt.apply_gradients(zip(grads, [var1, var2], strict=True))
    assert values(var1, var2) == [1.0, 1.0]


def test_using_weight_decay():
    opt = SGD(1, weight_decay=0.004)
    grads, var1, var2 = jnp.zeros(()), ol.Variable(2.0), ol.Variable(2.0)
    opt.exclude_from_weight_decay(var_list=[var2])
    opt.apply_gradients(zip([grads, grads], [var1, var2], strict=True))
    assert values(var1, var2) == exactly(1.992, 2.0)


def test_using_exponential_moving_average():
    opt = SGD(learning_rate=1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3)
    var1, var2 = ol.Variable(2.0), ol.Variable(2.0)
    loss = lambda: var1 + var2
    grads = [grad for grad, _ in opt.compute_gradients(loss, [var1, var2])]
    opt.apply_gradients(zip(grads, [var1, var2], strict=True))
    assert values(var1, var2) == [1.0, 1.0]
    opt.apply_gradients(zip(grads, [var1, var2], strict=True))
    assert values(var1, var2) == [0.0, 0.0]
    opt.apply_gradients(zip(grads, [var1, var2], strict=True))
    assert values(var1, var2) == [-0.125, -0.125]

    opt.apply_gradients(zip(grads, [var1, var2], strict=True))
    assert values(var1, var2) == [-1.125, -1.125]
    opt.finalize_variable_values([var1, var2])
    assert values(var1, var2) == [-0.625, -0.625]


@pytest.mark.parametrize(("ema_momentum", "average"), [(1.0, 2.0), (0.0, 0.0)])
def test_the_ends_of_the_moving_average(ema_momentum, average):
    """The page: 1 keeps the values before training; 0 is as good as no average."""
    opt = SGD(learning_rate=1, use_ema=True, ema_momentum=ema_momentum)
    var = ol.Variable(2.0)
    for _ in range(2):
        opt.apply_gradients([(1.0, var)])
    assert values(var) == [0.0]
    opt.finalize_variable_values([var])
    assert values(var) == [average]


# Distribution: a replica is a device along an axis of a mesh.

REPLICAS = {"sum": False, "skip": True}


def on_replica(gradient, skip):
    """Return what one replica has after one step, as imperative code and as functions."""
    opt = SGD(0.1, axis_name="replicas")
    var = ol.Variable(1.0)
    opt.apply_gradients([(gradient[0], var)], skip_gradients_aggregation=skip)

    tree = SGD(0.1, axis_name="replicas")
    if skip:
        (new,) = tree.apply_gradients([(gradient[0], 1.0)], skip_gradients_aggregation=True)
    else:
        new = tree.apply({"v": gradient[0]}, {"v": 1.0})["v"]

    clipped = SGD(0.1, axis_name="replicas", clipvalue=2.5)
    other = ol.Variable(1.0)
    clipped.apply_gradients([(gradient[0], other)], skip_gradients_aggregation=skip)
    return jnp.stack([var.value, new, other.value])[None]


def replicas():
    mesh = jax.make_mesh((2,), ("replicas",), (AxisType.Auto,), devices=jax.devices()[:2])
    gradients = jnp.array([1.0, 2.0])
    found = {}
    for name, skip in REPLICAS.items():
        mapped = jax.shard_map(
            lambda g, skip=skip: on_replica(g, skip),
            mesh=mesh,
            in_specs=P("replicas"),
            out_specs=P("replicas"),
        )
        found[name] = np.asarray(jax.jit(mapped)(gradients)).tolist()
    return json.dumps(found)


@pytest.mark.slow
def test_replicas_sum_their_gradients_unless_told_to_skip_that():
    found = on_eight_devices(__name__, "replicas")
    # Of both: imperatively, by trees, and with a clip, which comes after the sum.
    np.testing.assert_allclose(found["sum"], [[0.7, 0.7, 0.75]] * 2, rtol=1e-6)
    np.testing.assert_allclose(found["skip"], [[0.9] * 3, [0.8] * 3], rtol=1e-6)


def test_replicas_of_vmap():
    gradients = jnp.array([[1.0], [2.0]])
    for skip, expected in ((False, [[0.7, 0.7, 0.75]] * 2), (True, [[0.9] * 3, [0.8] * 3])):
        mapped = jax.vmap(lambda g, skip=skip: on_replica(g, skip), axis_name="replicas")
        np.testing.assert_allclose(mapped(gradients)[:, 0], expected, rtol=1e-6)


def test_the_old_name_of_skipping():
    def replica(gradient):
        opt, var = SGD(0.1, axis_name="replicas"), ol.Variable(1.0)
        opt.apply_gradients([(gradient, var)], experimental_aggregate_gradients=False)
        return var.value

    mapped = jax.vmap(replica, axis_name="replicas")
    np.testing.assert_allclose(mapped(jnp.array([1.0, 2.0])), [0.9, 0.8], rtol=1e-6)


def test_aggregation_can_be_overridden():
    class Mean(SGD):
        def aggregate_gradients(self, grads_and_vars):
            return [(jax.lax.pmean(g, "replicas"), v) for g, v in grads_and_vars]

    def replica(gradient):
        opt, var = Mean(0.1), ol.Variable(1.0)
        opt.apply_gradients([(gradient, var)])
        return var.value, Mean(0.1).apply({"v": gradient}, {"v": 1.0})["v"]

    for got in jax.vmap(replica, axis_name="replicas")(jnp.array([1.0, 2.0])):
        np.testing.assert_allclose(got, [0.85, 0.85], rtol=1e-6)


def test_an_axis_that_is_not_there_is_loud():
    opt = SGD(0.1, axis_name="replicas")
    with pytest.raises(NameError, match="replicas"):
        opt.apply_gradients([(1.0, ol.Variable(1.0))])


# Names: what the page lists is there, with the same parameters in the same order.

PAGE = {
    "add_variable": "(shape, dtype=None, initializer='zeros', name=None)",
    "add_variable_from_reference": (
        "(model_variable, variable_name, shape=None, initial_value=None)"
    ),
    "aggregate_gradients": "(grads_and_vars)",
    "apply_gradients": ("(grads_and_vars, name=None, skip_gradients_aggregation=False, **kwargs)"),
    "build": "(var_list)",
    "compute_gradients": "(loss, var_list, tape=None)",
    "exclude_from_weight_decay": "(var_list=None, var_names=None)",
    "finalize_variable_values": "(var_list)",
    "from_config": "(config, custom_objects=None)",
    "get_config": "()",
    "load_own_variables": "(store)",
    "minimize": "(loss, var_list, tape=None)",
    "save_own_variables": "(store)",
    "set_weights": "(weights)",
    "update_step": "(gradient, variable)",
}
CONSTRUCTOR = (
    "(name, weight_decay=0, clipnorm=None, clipvalue=None, global_clipnorm=None, use_ema=False, "
    "ema_momentum=0.99, ema_overwrite_frequency=None, jit_compile=True, **kwargs)"
)

# What is otherwise, and what stands there in ours.
OTHERWISE = {
    ("add_variable", "shape"): "()",  # a scalar, as the page says, if it is not given
    ("apply_gradients", "**kwargs"): "experimental_aggregate_gradients=True",  # Keras' only one
    ("Optimizer", "name"): "None",  # the class' name
    ("Optimizer", "weight_decay"): "None",  # as the page says in words; 0 does the same
    ("Optimizer", "**kwargs"): None,  # an unknown option is an error, as it is in Keras
}


def parts(signature):
    """Return the default of each parameter as text, "" where there is none."""
    found = {}
    for part in signature.strip("()").split(", "):
        name, _, default = part.partition("=")
        if name and name != "self":
            found[name] = default
    return found


def own(function):
    parameters = inspect.signature(function).parameters.values()
    bare = [p.replace(annotation=p.empty) for p in parameters if p.name != "self"]
    positional = [p for p in bare if p.kind is not p.KEYWORD_ONLY]
    return parts(str(inspect.Signature(positional)))


@pytest.mark.parametrize("name", [*PAGE, "Optimizer"])
def test_signatures_are_those_of_the_page(name):
    theirs = parts(PAGE.get(name, CONSTRUCTOR))
    ours = own(getattr(ol.optimizers.Optimizer, name, ol.optimizers.Optimizer))
    expected = {}
    for parameter, default in theirs.items():
        default = OTHERWISE.get((name, parameter), default)
        if parameter == "**kwargs":
            expected |= parts(default or "")
        else:
            expected[parameter] = default
    assert list(ours.items()) == list(expected.items())


def test_options_of_the_constructor_are_keywords_everywhere():
    theirs = parts(CONSTRUCTOR).keys() - {"**kwargs"} | {"mesh"}
    for name in ol.optimizers.names():
        if "Optimizer" in name and name not in ("LossScaleOptimizer", "MultiOptimizer"):
            continue  # of TensorFlow 1
        parameters = inspect.signature(getattr(ol.optimizers, name)).parameters
        assert theirs <= parameters.keys()
        assert "learning_rate" in parameters or name in ("LossScaleOptimizer", "MultiOptimizer")


def test_attributes_are_those_of_the_page():
    opt = SGD(0.5)
    assert isinstance(opt.iterations, ol.Variable)
    assert opt.iterations == 0
    assert float(opt.learning_rate) == 0.5
    assert opt.variables == [opt.iterations]
    opt.build([ol.Variable(1.0, "w")])
    assert [v.name for v in opt.variables] == ["iteration", "momentum/sum/w"]
    assert opt.variables() == opt.variables


def test_the_constructor_takes_what_the_page_lists():
    class Descent(Optimizer):
        def update_step(self, gradient, variable):
            variable.assign_sub(gradient * self.learning_rate)

    opt = Descent("mine", 0.5, None, None, 1.0, True, 0.5, 2, False, learning_rate=0.1)
    assert opt.get_config() == {
        "name": "mine",
        "learning_rate": 0.1,
        "weight_decay": 0.5,
        "clipnorm": None,
        "clipvalue": None,
        "global_clipnorm": 1.0,
        "use_ema": True,
        "ema_momentum": 0.5,
        "ema_overwrite_frequency": 2,
        "jit_compile": False,
    }
    assert SGD(0.1, weight_decay=0).apply([1.0], [2.0]) == SGD(0.1).apply([1.0], [2.0])
    with pytest.raises(ValueError, match="At most one of `clipnorm`, `global_clipnorm`"):
        SGD(clipnorm=1.0, global_clipnorm=1.0)


def test_the_steps_of_apply_gradients_come_in_the_order_of_keras():
    """Clip, decay, rule, average and overwrite, count, constrain: 1 - .1·.5·1 - .1·clip(3)."""
    opt = SGD(0.1, clipvalue=1.0, weight_decay=0.5, use_ema=True, ema_momentum=0.5)
    seen = []

    def constraint(value):
        seen.append(float(value))
        return jnp.minimum(value, 0.5)

    var = ol.Variable(1.0, constraint=constraint)
    returned = opt.apply_gradients([(3.0, var)])
    assert returned is opt.iterations
    assert int(returned) == 1
    np.testing.assert_allclose(seen, [0.85], rtol=1e-6)
    assert values(var) == [0.5]
    opt.finalize_variable_values([var])
    np.testing.assert_allclose(values(var), [(1 + 0.85) / 2], rtol=1e-6)
