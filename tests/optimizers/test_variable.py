"""A `Variable` behaves as the array in it, and keeps what is assigned to it or says why not."""

import copy
import json
import math
import operator
import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer

import optimize_loss as ol

Variable = ol.Variable
X = np.array([1.0, 2.0], np.float32)
Y = np.array([3.0, 0.5], np.float32)

BINARY = {
    name: getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lt", "le", "gt", "ge")
}
PARTNERS = {
    "int": 3,
    "float": 2.5,
    "numpy-scalar": np.float32(2.5),
    "numpy": Y,
    "jax": jnp.asarray(Y),
    "variable": None,  # a Variable of Y
}


def partner(kind):
    return Variable(Y, "y") if kind == "variable" else PARTNERS[kind]


def plain(kind):
    return Y if kind == "variable" else PARTNERS[kind]


@pytest.mark.parametrize("kind", PARTNERS)
@pytest.mark.parametrize("name", BINARY)
def test_arithmetic_both_ways(name, kind):
    operation = BINARY[name]
    for got, wanted in (
        (operation(Variable(X), partner(kind)), operation(X, plain(kind))),
        (operation(partner(kind), Variable(X)), operation(plain(kind), X)),
    ):
        assert isinstance(got, jax.Array)
        assert got.dtype == (jnp.bool_ if wanted.dtype == bool else jnp.float32)
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("kind", ["numpy", "jax", "variable"])
def test_matmul_both_ways(kind):
    assert float(Variable(X) @ partner(kind)) == 4.0
    assert float(partner(kind) @ Variable(X)) == 4.0


@pytest.mark.parametrize("name", ["and_", "or_", "xor", "lshift", "rshift"])
def test_bits_both_ways(name):
    operation = getattr(operator, name)
    assert int(operation(Variable(6), 3)) == operation(6, 3)
    assert int(operation(6, Variable(3))) == operation(6, 3)


def test_unary_operators_and_conversions():
    v, n = Variable([-1.5, 2.25]), Variable(3)
    for operation in (operator.neg, operator.pos, operator.abs, round):
        np.testing.assert_array_equal(operation(v), operation(v.value))
    assert [x.tolist() for x in divmod(v, 2)] == [x.tolist() for x in divmod(v.value, 2)]
    assert [int(x) for x in divmod(7, n)] == [2, 1]
    assert not ~Variable(True)
    assert (int(n), float(n), complex(n), bool(n), operator.index(n)) == (3, 3.0, 3 + 0j, True, 3)
    assert list(range(n)) == [0, 1, 2]
    assert math.sqrt(Variable(4.0)) == 2.0
    assert len(v) == 2
    assert [float(x) for x in v] == [-1.5, 2.25]
    assert float(v[1]) == float(v[Variable(1)]) == 2.25
    assert v[:1].shape == (1,)
    with pytest.raises(TypeError):
        len(n)


FUNCTIONS = {
    "sin": jnp.sin,
    "sum": jnp.sum,
    "where": lambda x: jnp.where(x > 1, x, 0.0),
    "maximum": lambda x: jnp.maximum(x, 1.5),
    "dot": lambda x: jnp.dot(x, x),
    "einsum": lambda x: jnp.einsum("i,i->", x, x),
    "norm": jnp.linalg.norm,
    "stack": lambda x: jnp.stack([x, x]),
    "concatenate": lambda x: jnp.concatenate([x, x]),
    "asarray": jnp.asarray,
    "zeros_like": jnp.zeros_like,
    "relu": jax.nn.relu,
    "softmax": jax.nn.softmax,
    "one_hot": lambda x: jax.nn.one_hot(jnp.astype(x, int), 3),
    "cast": lambda x: jnp.asarray(x, jnp.bfloat16),
    "device_put": jax.device_put,
    "method": lambda x: x.sum(),
    "at": lambda x: x.at[0].set(7.0),
    "transpose": lambda x: x.T,
    "dtype": lambda x: jnp.zeros(x.shape, x.dtype),
    "jit": jax.jit(lambda x: x * 2),
    "grad": jax.grad(lambda x: jnp.sum(x * x)),
    "vmap": jax.vmap(lambda x: x * 2),
    "numpy": np.sin,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_see_the_value(name):
    function = FUNCTIONS[name]
    got, wanted = function(Variable(X)), function(jnp.asarray(X))
    np.testing.assert_array_equal(got, wanted)
    assert got.dtype == wanted.dtype
    assert not isinstance(got, Variable)


def test_what_jax_makes_like_a_variable_is_placed_as_it_is():
    assert not jnp.zeros_like(Variable(X)).committed
    placed = Variable(jax.device_put(X, jax.devices()[0]))
    assert jnp.zeros_like(placed).sharding == placed.sharding


def test_trees_take_the_value_out():
    v = Variable(X, "v")
    assert jax.tree.leaves({"v": v})[0] is v.value
    assert isinstance(jax.tree.map(lambda x: x, {"v": v})["v"], jax.Array)
    state = ol.optimize_loss(lambda p: jnp.sum(p["v"]), learning_rate=0.1).init({"v": v})
    np.testing.assert_array_equal(state.params["v"], X)


def test_strict_promotion_holds_for_variables_too():
    with pytest.raises(jax.dtypes.TypePromotionError):
        _ = Variable(1.0) + Variable(1)
    with pytest.raises(jax.dtypes.TypePromotionError):
        _ = jnp.ones(2, jnp.bfloat16) * Variable(X)
    with pytest.raises(ValueError, match="rank"):
        _ = Variable(X) + jnp.ones((2, 2))
    assert (Variable(X) + 1).dtype == jnp.float32  # Python's numbers fit in


# Attributes.


def test_name_shape_and_dtype():
    v = Variable([[1, 2]], name="dense/kernel", dtype=jnp.float16)
    assert (v.name, v.path, v.shape, v.dtype) == ("dense/kernel",) * 2 + ((1, 2), jnp.float16)
    assert (v.ndim, v.size, v.trainable, v.constraint) == (2, 2, True, None)
    assert Variable(1.0).name == Variable(1.0, name="").name == "Variable"
    assert not Variable(1.0, trainable=False).trainable
    assert v.read_value() is v.value
    assert v.numpy().tolist() == [[1, 2]]
    assert str(Variable(X)) == "[1. 2.]"
    assert f"{Variable(1.5):.2f}" == "1.50"
    assert repr(v) == "Variable(Array([[1., 2.]], dtype=float16), name='dense/kernel')"


def test_the_value_is_a_strongly_typed_copy():
    given = X.copy()
    v = Variable(given)
    given[0] = 9
    assert v.numpy().tolist() == [1.0, 2.0]
    assert not Variable(1.0).value.weak_type
    donated = jnp.ones(2)
    w = Variable(donated)
    donated.delete()
    assert w.numpy().tolist() == [1.0, 1.0]
    taken = w.numpy()
    taken[0] = 9
    assert w.numpy().tolist() == [1.0, 1.0]
    assert Variable(w).value is not w.value


def test_same_ones_are_equal_and_others_are_not():
    v, w = Variable(1.0), Variable(1.0)
    assert v == v
    assert v != w
    assert {v: "v", w: "w"}[v] == "v"
    assert v in [w, v]
    assert [w, v].index(v) == 1
    assert (Variable(X) == 1.0).tolist() == [True, False]
    assert (Variable(X) != 1.0).tolist() == [False, True]
    assert (Variable(X) == 1.0).tolist() == [True, False]
    assert v._unique_id != w._unique_id


def positive(x):
    return jnp.abs(x)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))]
)
def test_a_copy_is_another_variable(copied):
    v = Variable(X, "v", trainable=False, constraint=positive)
    w = copied(v)
    assert w != v
    assert w._unique_id != v._unique_id
    assert (w.name, w.trainable, w.constraint) == ("v", False, positive)
    w.assign([5.0, 6.0])
    assert v.numpy().tolist() == [1.0, 2.0]
    assert w.numpy().tolist() == [5.0, 6.0]


def test_what_is_no_attribute_is_said_so():
    with pytest.raises(AttributeError, match="_private"):
        _ = Variable(X)._private
    with pytest.raises(AttributeError, match="nothing"):
        _ = Variable(X).nothing
    with pytest.raises(AttributeError):
        Variable(X).value = jnp.ones(2)  # pyright: ignore[reportAttributeAccessIssue]


WRONG = {
    "none": (lambda: Variable(None), "`initial_value` must be an array or a number. Received"),
    "text": (lambda: Variable("a"), "Received: initial_value='a'."),
    "object": (lambda: Variable(object()), "`initial_value` must be an array or a number."),
    "ragged": (lambda: Variable([[1], [1, 2]]), "`initial_value` must be an array or a number."),
    "name": (lambda: Variable(1.0, name=3), "`name` must be text. Received: name=3."),  # pyright: ignore
    "dtype": (lambda: Variable(1.0, dtype="real"), "`dtype` must be a dtype. Received: dtype='re"),
    "constraint": (lambda: Variable(1.0, constraint=3), "`constraint` must be a function of the"),  # pyright: ignore
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    make, message = WRONG[name]
    with pytest.raises(ol.InvalidType) as caught:
        make()
    assert message in str(caught.value)


# Assignment.


def test_assign_returns_the_variable():
    v = Variable(X)
    assert v.assign(Y) is v
    assert v.assign_add(1) is v
    assert v.assign_sub(Variable([1.0, 2.0])) is v
    assert v.numpy().tolist() == [3.0, -0.5]


ASSIGNED = {
    "list": ([1, 2], jnp.float32),
    "numpy-float64": (np.array([1.0, 2.0]), jnp.float32),
    "integers": (jnp.array([1, 2]), jnp.float32),
    "narrower": (jnp.array([1.0, 2.0], jnp.bfloat16), jnp.float32),
    "wider": (jnp.array([1.0, 2.0]), jnp.float16),
    "variable": (Variable([1.0, 2.0]), jnp.float32),
    "real": (jnp.array([1.0, 2.0]), jnp.complex64),
}


@pytest.mark.parametrize("name", ASSIGNED)
def test_assign_keeps_the_dtype(name):
    value, dtype = ASSIGNED[name]
    for v in (
        Variable([5.0, 5.0], dtype=dtype).assign(value),
        Variable([0.0, 0.0], dtype=dtype).assign_add(value),
    ):
        assert v.dtype == dtype
        assert not v.value.weak_type
        np.testing.assert_array_equal(v.value, jnp.array([1, 2], dtype))


REFUSED = {
    "shape": (X, jnp.ones(3), ol.TreeMismatch, "must keep its shape (2,). Received: shape (3,)."),
    "scalar": (X, 1.0, ol.TreeMismatch, "The variable 'w' must keep its shape (2,). Received: s"),
    "complex": (X, X * 1j, ol.InvalidType, "must keep its dtype float32. Received: complex64."),
    "bool": (X, X > 0, ol.InvalidType, "must keep its dtype float32. Received: bool."),
    "float": ([1, 2], X, ol.InvalidType, "must keep its dtype int32. Received: float32."),
    "number": (True, 1, ol.InvalidType, "must keep its dtype bool. Received: int32."),
    "text": (X, "a", ol.InvalidType, "`value` must be an array or a number. Received: value='a'."),
    "none": (X, None, ol.InvalidType, "`value` must be an array or a number."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_changes(name):
    before, value, error, message = REFUSED[name]
    v = Variable(before, "w")
    with pytest.raises(error) as caught:
        v.assign(value)
    assert message in str(caught.value)
    np.testing.assert_array_equal(v.value, before)


def test_assign_add_refuses_what_assign_does():
    v = Variable(X, "w")
    assert v.assign_add(1.0).numpy().tolist() == [2.0, 3.0]  # this is added to each
    for wrong, error in (
        ([1j, 0], ol.InvalidType),
        (None, ol.InvalidType),
        (X > 0, ol.InvalidType),
    ):
        for method in (v.assign_add, v.assign_sub):
            with pytest.raises(error):
                method(wrong)
    with pytest.raises((ValueError, TypeError)):
        v.assign_add(jnp.ones(3))
    with pytest.raises(ol.InvalidType, match=r"must keep its dtype int32. Received: float32"):
        Variable(1).assign_add(1.5)
    assert v.numpy().tolist() == [2.0, 3.0]


# In JAX's transformations: made inside, a variable is local; from outside, it is not assigned to.


def inside(x):
    v = Variable(x)
    v.assign_add(1.0)
    v.assign(v * 2)
    return v.value


def test_variables_made_inside_work():
    assert float(jax.jit(inside)(1.0)) == 4.0
    assert float(jax.grad(inside)(1.0)) == 2.0
    assert jax.vmap(inside)(jnp.arange(3.0)).tolist() == [2.0, 4.0, 6.0]
    assert jax.lax.map(inside, jnp.arange(3.0)).tolist() == [2.0, 4.0, 6.0]
    assert float(jax.jit(jax.grad(lambda x: inside(x) ** 2))(1.0)) == 16.0
    assert jax.eval_shape(inside, 1.0).shape == ()


OUTSIDE = {
    "jit": lambda f: jax.jit(f)(1.0),
    "grad": lambda f: jax.grad(f)(1.0),
    "vmap": lambda f: jax.vmap(f)(jnp.ones(2)),
    "scan": lambda f: jax.lax.map(f, jnp.ones(2)),
    "cond": lambda f: jax.jit(lambda x: jax.lax.cond(x > 0, f, lambda x: x, x))(1.0),
    "eval_shape": lambda f: jax.eval_shape(f, 1.0),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_variables_from_outside_keep_nothing_traced(name):
    v = Variable(5.0, "outer")
    with pytest.raises(ol.InvalidType) as caught:
        OUTSIDE[name](lambda x: v.assign(x).value)
    assert "The variable 'outer' was made outside of the JAX transformation" in str(caught.value)
    assert "Make it inside, or use the functions `init` and `update`" in str(caught.value)
    assert float(v) == 5.0


@pytest.mark.parametrize("constant", [2.0, np.float32(2.0), jnp.float32(2.0)], ids=type)
def test_under_jit_constants_are_refused_too(constant):
    """They would be assigned while tracing, once, and not whenever the program runs."""
    v = Variable(5.0)
    with pytest.raises(ol.InvalidType, match="was made outside"):
        jax.jit(lambda x: v.assign(constant).value * x)(1.0)
    assert float(v) == 5.0


def test_a_loop_inside_does_not_assign_to_what_is_outside_of_it():
    def run(x):
        v = Variable(x)
        return jax.lax.map(lambda y: v.assign(y).value, jnp.ones(2))

    with pytest.raises(ol.InvalidType, match="was made outside"):
        jax.jit(run)(1.0)


def test_constants_made_while_tracing_are_known():
    kept = []

    @jax.jit
    def run(x):
        kept.append(Variable(1.0))
        return x

    run(1.0)
    assert float(kept[0]) == 1.0
    kept[0].assign(2.0)


# Gradients with respect to variables.


def opt():
    return ol.optimizers.SGD(0.1)


def test_compute_gradients():
    v, w = Variable(X, "v"), Variable(2.0, "w")
    (gv, first), (gw, second) = opt().compute_gradients(lambda: jnp.sum(v * v) * w, [v, w])
    assert (first, second) == (v, w)
    assert gv is not None
    assert gw is not None
    assert gv.tolist() == [4.0, 8.0]
    assert float(gw) == 5.0
    assert v.numpy().tolist() == [1.0, 2.0]
    assert not isinstance(v.value, Tracer)


def test_the_gradient_is_none_where_the_loss_does_not_depend():
    v, w = Variable(1.0), Variable(2.0)
    found = opt().compute_gradients(lambda: v + 0 * 2.0, [v, w])
    assert [g if g is None else float(g) for g, _ in found] == [1.0, None]


def test_values_come_back_when_the_loss_raises():
    v, w = Variable(1.0), Variable(2.0)

    def loss():
        assert isinstance(v.value, Tracer)
        raise RuntimeError("in the loss")

    with pytest.raises(RuntimeError, match="in the loss"):
        opt().compute_gradients(loss, [v, w])
    assert (float(v), float(w)) == (1.0, 2.0)


def test_one_variable_and_functions_of_none_may_be_given():
    v = Variable(3.0)
    optimizer = opt()
    ways: Any = (v, [v], (v,), iter([v]), lambda: [v])
    for var_list in ways:
        optimizer.minimize(lambda: v * 2.0, var_list)
    np.testing.assert_allclose(v.value, 3.0 - 5 * 0.2, rtol=1e-6)


def test_variables_may_be_made_by_the_first_call_of_the_loss():
    made = []

    def loss():
        if not made:
            made.append(Variable(2.0))
        return made[0] * made[0]

    optimizer = opt()
    optimizer.minimize(loss, lambda: made)
    np.testing.assert_allclose(made[0].value, 1.6, rtol=1e-6)


def test_a_loss_may_be_a_variable_and_may_have_axes():
    v = Variable(X)
    (gradient, _) = opt().compute_gradients(lambda: v, [v])[0]
    assert gradient is not None
    assert gradient.tolist() == [1.0, 1.0]


def test_other_variables_may_count_in_a_loss():
    v, calls = Variable(1.0), Variable(0)

    def loss():
        calls.assign_add(1)
        return v * v

    optimizer = opt()
    for _ in range(3):
        optimizer.minimize(loss, [v])
    assert int(calls) == 3


def test_a_loss_that_keeps_what_is_traced_is_loud():
    v, kept = Variable(1.0), Variable(0.0, "kept")
    with pytest.raises(ol.InvalidType, match="The variable 'kept' was made outside"):
        opt().minimize(lambda: kept.assign(v * v).value, [v])
    assert (float(v), float(kept)) == (1.0, 0.0)


def test_a_compiled_loss_that_reads_variables_is_loud_and_not_stale():
    v, optimizer = Variable(2.0), opt()
    loss = jax.jit(lambda: v * v)
    optimizer.minimize(loss, [v])
    with pytest.raises(ol.InvalidType, match=r"`loss` must not call a function under `jax.jit`"):
        optimizer.minimize(loss, [v])
    passed = jax.jit(lambda x: x * x)
    for _ in range(2):
        optimizer.minimize(lambda: passed(v), [v])
    np.testing.assert_allclose(v.value, 2 * 0.8**3, rtol=1e-6)


def test_a_loss_that_was_compiled_before_has_no_gradient():
    v = Variable(2.0)
    loss = jax.jit(lambda: v * v)
    assert float(loss()) == 4.0
    with pytest.raises(ValueError, match="No gradients"):
        opt().minimize(loss, [v])


WRONG_TAPE: Any = 1
BAD_LOSSES = {
    "value": (lambda v: opt().minimize(v * v, [v]), "`loss` must be a function without arguments"),
    "tape": (lambda v: opt().minimize(lambda: v, [v], WRONG_TAPE), "has no tape"),
    "arrays": (
        lambda v: opt().minimize(lambda: v, [v.value]),
        "`var_list` must be a list of `opti",
    ),
    "twice": (lambda v: opt().minimize(lambda: v, [v, v]), "`var_list` must have each variable on"),
}


@pytest.mark.parametrize("name", BAD_LOSSES)
def test_bad_arguments_of_minimize(name):
    call, message = BAD_LOSSES[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call(Variable(1.0, "v"))


def test_complex_variables_go_downhill():
    v = Variable(1.0 + 1.0j)
    optimizer = opt()
    for _ in range(3):
        optimizer.minimize(lambda: jnp.abs(v.value) ** 2, [v])
    assert abs(complex(v)) < abs(1 + 1j)


# Constraints and names.


def test_a_constraint_holds_after_every_update():
    v = Variable([1.0, -1.0], constraint=lambda x: jnp.clip(x, 0.0, 0.9))
    w = Variable([1.0, -1.0])
    optimizer = opt()
    optimizer.apply_gradients([(jnp.zeros(2), v), (jnp.zeros(2), w)])
    assert v.numpy().tolist() == [np.float32(0.9), 0.0]
    assert w.numpy().tolist() == [1.0, -1.0]


def test_a_constraint_that_fails_leaves_everything_as_it_was():
    v, w = Variable(1.0, "v"), Variable(1.0, "w", constraint=lambda x: jnp.stack([x, x]))
    optimizer = ol.optimizers.Adam(0.1)
    with pytest.raises(ol.TreeMismatch, match=r"'w' must keep its shape \(\)"):
        optimizer.apply_gradients([(1.0, v), (1.0, w)])
    assert (float(v), float(w), int(optimizer.iterations)) == (1.0, 1.0, 0)
    assert all(not np.any(slot.numpy()) for slot in optimizer.variables)


def test_equal_names_are_numbered():
    made = [Variable(float(i)) for i in range(3)] + [Variable(3.0, "Variable_1")]
    optimizer = ol.optimizers.SGD(0.1, momentum=0.9)
    optimizer.build(made)
    numbered = ["Variable", "Variable_1", "Variable_2", "Variable_1_1"]
    assert [v.name for v in optimizer.variables[1:]] == [f"momentum/sum/{n}" for n in numbered]
    optimizer.apply_gradients([(float(i), v) for i, v in enumerate(made)])
    np.testing.assert_allclose([float(v) for v in made], [0.0, 0.9, 1.8, 2.7], rtol=1e-6)


def test_a_variable_can_be_printed_and_written():
    v = Variable(1.5)
    assert json.dumps({"v": float(v)}) == '{"v": 1.5}'
    assert f"{v} and {v!r}".startswith("1.5 and Variable(Array(1.5")
