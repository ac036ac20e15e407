"""Pairs of gradients and variables: forms that are taken, and forms that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol
from tests.optimizers.stepped import (
    GB,
    GRADS,
    GW,
    INVALID,
    SHAPE,
    TREE,
    VALUE,
    B,
    W,
    assert_equal,
    optim,
    pairs,
    stepped,
    values,
    variables,
)

# What to update.


def test_unknown_variables_are_loud():
    optimizer, made = stepped(optim.Adam(0.1))
    with pytest.raises(ValueError, match=r"'ww' is not one of those .* Nearest: \['w'"):
        optimizer.apply_gradients([(GW, ol.Variable(W, "ww"))])
    with pytest.raises(ValueError, match="'w' is not one of those"):  # a name is not a variable
        optimizer.apply_gradients([(GW, ol.Variable(W, "w"))])
    with pytest.raises(ValueError, match="'x' is not one of those"):
        optimizer.finalize_variable_values([made[0], ol.Variable(1.0, "x")])
    assert int(optimizer.iterations) == 1


MALFORMED = {
    "numbers": ([1, 2], INVALID, "`grads_and_vars` must be pairs of a gradient and a variable"),
    "triples": ([(1, 2, 3)], INVALID, "`grads_and_vars` must be pairs"),
    "no-list": (5, INVALID, "Received: grads_and_vars=5."),
    "mixed": (
        [(GW, ol.Variable(W)), (GB, B)],
        INVALID,
        "`var_list` must be a list of `optimize_lo",
    ),
    "twice": (
        [(GW, v := ol.Variable(W)), (GW, v)],
        VALUE,
        "`var_list` must have each variable once",
    ),
    "none": ([(None, ol.Variable(W, "w"))], VALUE, "No gradients: the gradient of every parameter"),
    "shape": ([(GB, ol.Variable(W, "w"))], SHAPE, "'w' must have the parameter's shape (2,)"),
    "text": (
        [("a", ol.Variable(B, "b"))],
        INVALID,
        "The gradient of 'b' must be an array of numbe",
    ),
    "complex": ([(GW * 1j, ol.Variable(W, "w"))], INVALID, "The update of 'w' must be real"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_pairs_change_nothing_and_build_nothing(name):
    given, error, message = MALFORMED[name]
    optimizer = optim.Adam(0.1)
    with pytest.raises(error) as caught:
        optimizer.apply_gradients(given)
    assert message in str(caught.value)
    assert not optimizer.built
    assert optimizer.variables == [optimizer.iterations]
    stepped(optimizer)


def test_gradients_come_in_many_forms():
    wanted = values(stepped(optim.SGD(0.5))[1])
    for form in (jnp.asarray, np.float64, ol.Variable, lambda g: np.asarray(g, np.float16)):
        made = variables()
        optim.SGD(0.5).apply_gradients([(form(g), v) for g, v in pairs(made)])
        assert_equal(values(made), wanted)
    made = [ol.Variable(1.0)]
    optim.SGD(0.5).apply_gradients([(1, made[0])])
    assert float(made[0]) == 0.5


def test_arrays_in_pairs_come_back_as_new_values():
    optimizer, (w, b) = optim.SGD(0.1, momentum=0.9), (W, B)
    _, made = stepped(optim.SGD(0.1, momentum=0.9), times=3)
    for _ in range(3):
        w, b = optimizer.apply_gradients([(GW, w), (GB, b)])
    assert_equal([w, b], values(made))
    assert_equal([W], [np.array([1.0, -2.0], np.float32)])


def test_apply_takes_variables_too():
    _, expected = stepped(optim.Adam(0.1), times=4)
    optimizer, (w, b) = optim.Adam(0.1), variables()
    assert optimizer.apply([GW, GB], [w, b]) is optimizer.iterations
    optimizer.apply((GW, GB), [w, b])
    optimizer.apply([GW, GB])
    optimizer.apply({"x": {"w": GW}, "b": GB}, {"x": {"w": w}, "b": b})
    assert_equal(values([w, b]), values(expected))
    for grads in ([GW], [GW, GB, GB], {"w": GW}):
        with pytest.raises(ol.TreeMismatch, match="`grads` must have the structure of `params`"):
            optimizer.apply(grads, [w, b])


def test_apply_goes_on_with_the_same_names():
    optimizer, p = optim.Adam(0.1), TREE
    p = optimizer.apply(GRADS, p)
    with pytest.raises(ValueError, match=r"other parameters: it has no .'x'.. Nearest"):
        optimizer.apply({"x": GW}, {"x": W})
    with pytest.raises(ValueError, match=r"for more parameters. Missing: \['b'\]"):
        optimizer.apply({"w": GW}, {"w": W})
    with pytest.raises(ol.TreeMismatch, match=r"parameter of shape \(3,\)"):
        optimizer.apply({"w": np.ones(3), "b": GB}, {"w": np.ones(3), "b": B})
    with pytest.raises(ol.TreeMismatch, match=r"`grads` must have .* Missing: \['b'\]"):
        optimizer.apply({"w": GW}, p)
    with pytest.raises(ValueError, match="used with trees; use another one for variables"):
        optimizer.apply_gradients([(GW, ol.Variable(W, "w"))])
    assert int(optimizer.iterations) == 1
    p = optimizer.apply(GRADS, p)
    _, expected = stepped(optim.Adam(0.1), times=2)
    assert_equal([p["w"], p["b"]], values(expected))


def test_apply_needs_parameters():
    for optimizer in (optim.SGD(), optim.SGD()):
        with pytest.raises(ValueError, match="`params` must be given unless"):
            optimizer.apply([GW])
        optimizer.apply([GW], [W])


def test_apply_leaves_integers_and_what_has_no_gradient_alone():
    optimizer = optim.SGD(0.5, momentum=0.5)
    tree = {"w": W, "n": 3, "b": B}
    with pytest.warns(UserWarning, match="There is no gradient for .'b'."):
        new = optimizer.apply({"w": GW, "n": None, "b": None}, tree)
    assert_equal([new["w"], new["n"], new["b"]], [W - GW / 2, 3, B])
    new = optimizer.apply({"w": GW, "n": np.int32(1), "b": GB}, new)
    assert_equal([new["w"], new["n"], new["b"]], [W - GW / 2 - GW * 0.75, 3, B - GB / 2])
    assert [v.name for v in optimizer.variables[1:]] == ["momentum/sum/w", "momentum/sum/b"] or [
        v.name for v in optimizer.variables[1:]
    ] == ["momentum/sum/b", "momentum/sum/w"]


def test_a_tree_may_have_any_containers():
    optimizer = optim.SGD(0.5)
    tree = ({"layers": [W, B]}, B)
    new = optimizer.apply(({"layers": [GW, GB]}, GB), tree)
    assert jax.tree.structure(new) == jax.tree.structure(tree)
    assert_equal(jax.tree.leaves(new), [W - GW / 2, B - GB / 2, B - GB / 2])
