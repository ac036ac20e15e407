"""Two variables, and optimizers that have made steps with them."""

import numpy as np

import optimize_loss as ol

T, optim = ol.transforms, ol.optimizers
VALUE, INVALID, SHAPE = ValueError, ol.InvalidType, ol.TreeMismatch
W, B = np.array([1.0, -2.0], np.float32), np.float32(0.5)
GW, GB = np.array([0.25, 1.0], np.float32), np.float32(-1.0)
ADORNED = {
    "weight_decay": 0.1,
    "clipnorm": 0.5,
    "use_ema": True,
    "ema_momentum": 0.5,
    "ema_overwrite_frequency": 2,
    "gradient_accumulation_steps": 2,
}


def variables():
    return [ol.Variable(W, "w"), ol.Variable(B, "b")]


def pairs(made):
    return list(zip((GW, GB), made, strict=True))


def stepped(optimizer, times=1):
    """Return an optimizer after some steps, and its variables."""
    made = variables()
    for _ in range(times):
        optimizer.apply_gradients(pairs(made))
    return optimizer, made


def values(made):
    return [np.asarray(v.value) for v in made]


def assert_equal(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_close(got, wanted, rtol=1e-6):
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7)


def state_of(optimizer):
    """Return all that an optimizer keeps, as numpy arrays."""
    return [v.numpy() for v in optimizer.variables], optimizer.get_config()


def assert_same_state(got, wanted):
    assert_equal(got[0], wanted[0])
    assert got[1] == wanted[1]


TREE, GRADS = {"w": W, "b": B}, {"w": GW, "b": GB}
