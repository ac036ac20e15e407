"""What can be set, read and deleted on an optimizer: a slip of the pen is an error."""

import copy
import pickle
from typing import Any

import pytest

import optimize_loss as ol
from optimize_loss import optimizers as optim
from tests.optimizers import custom_optimizers as custom

# For type checkers an optimizer has only the attributes of its class.
Adam: Any = optim.Adam
MomentumSGD: Any = custom.MomentumSGD
Optimizer: Any = optim.Optimizer


def built(optimizer):
    optimizer.build([ol.Variable(1.0, "v")])
    return optimizer


STATES = {
    "new": lambda: Adam(0.25),
    "built": lambda: built(Adam(0.25)),
    "copied": lambda: copy.deepcopy(Adam(0.25)),
    "loaded": lambda: pickle.loads(pickle.dumps(built(Adam(0.25)))),
    "from-config": lambda: Adam.from_config(Adam(0.25).get_config()),
    "custom": lambda: MomentumSGD(0.25),
    "custom-built": lambda: built(MomentumSGD(0.25)),
}

UNKNOWN = {
    "weight_decy": "`weight_decay`",
    "wd": "`weight_decay`",
    "learningrate": "`learning_rate`",
    "clip_norm": "`clipnorm`",
    "use_EMA": "`use_ema`",
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("state", STATES)
def test_an_unknown_attribute_is_refused(state, name):
    optimizer = STATES[state]()
    message = rf"`{name}` is not an attribute of \w+\. Did you mean {UNKNOWN[name]}\?"
    with pytest.raises(AttributeError, match=message):
        setattr(optimizer, name, 0.5)
    assert not hasattr(optimizer, name)
    with pytest.raises(AttributeError):
        delattr(optimizer, name)


@pytest.mark.parametrize("name", ["chain", "rate", "variables", "built"])
@pytest.mark.parametrize("state", STATES)
def test_what_is_computed_cannot_be_set(state, name):
    optimizer = STATES[state]()
    with pytest.raises(AttributeError, match=f"`{name}` of .* can be read, but not set"):
        setattr(optimizer, name, True)
    assert getattr(optimizer, name) is not True or "built" in state or state == "loaded"


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "clipnorm", "_held"])
@pytest.mark.parametrize("state", STATES)
def test_nothing_can_be_deleted(state, name):
    optimizer = STATES[state]()
    with pytest.raises(AttributeError, match=f"`{name}` must stay"):
        delattr(optimizer, name)
    assert float(optimizer.learning_rate) == 0.25


@pytest.mark.parametrize("state", STATES)
def test_lr_is_the_learning_rate(state):
    optimizer = STATES[state]()
    assert optimizer.lr is optimizer.learning_rate
    optimizer.lr = 0.5
    assert float(optimizer.learning_rate) == float(optimizer.lr) == 0.5
    with pytest.raises(ValueError, match="`learning_rate` must be at least 0"):
        optimizer.lr = -1.0
    v = ol.Variable(1.0, "v")
    optimizer = MomentumSGD(0.25) if "custom" in state else optim.SGD(0.25)
    optimizer.lr = 0.5
    optimizer.apply_gradients([(1.0, v)])
    assert float(v) == 0.5


def test_a_wrapper_has_the_lr_of_what_is_inside_or_none():
    inner = optim.SGD(0.25)
    scaled: Any = optim.LossScaleOptimizer(inner)
    scaled.lr = 0.5
    assert float(inner.learning_rate) == float(scaled.lr) == 0.5
    many: Any = optim.MultiOptimizer({"v": inner})
    with pytest.raises(AttributeError, match="has no `learning_rate` of its own"):
        many.lr = 0.5
    assert not hasattr(many, "lr")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("cls", [optim.SGD, MomentumSGD])
def test_an_option_of_a_copy_is_its_own(cls, copied):
    optimizer, params = cls(0.25, momentum=0.5), {"v": 1.0}
    state = optimizer.init(params)
    other = copied(optimizer)
    other.clipvalue = 0.5
    for each, wanted in ((optimizer, -0.25), (other, -0.125)):
        updates, _ = each.update({"v": 1.0}, each.init(params), params)
        assert float(updates["v"]) == wanted
    assert float(optimizer.update({"v": 1.0}, state, params)[0]["v"]) == -0.25


@pytest.mark.parametrize("state", ["new", "built"])
def test_what_is_inside_a_wrapper_cannot_be_exchanged(state):
    inner = optim.SGD(0.25)
    for wrapper, name, other in (
        (optim.LossScaleOptimizer(inner), "inner_optimizer", optim.SGD(0.5)),
        (optim.MultiOptimizer({"v": inner}), "optimizers", {"v": optim.SGD(0.5)}),
        (optim.MultiOptimizer({"v": inner}), "default_optimizer", optim.SGD(0.5)),
    ):
        before = getattr(wrapper, name)
        if state == "built":
            built(wrapper)
        with pytest.raises(AttributeError, match=f"`{name}` of .* can be read, but not set"):
            setattr(wrapper, name, other)
        assert getattr(wrapper, name) is before


def test_options_can_be_set_before_and_after_build():
    optimizer = Adam(0.25)
    optimizer.weight_decay = 0.1
    built(optimizer)
    optimizer.weight_decay, optimizer.beta_1, optimizer.name = 0.2, 0.5, "mine"
    assert optimizer.get_config()["weight_decay"] == 0.2
    with pytest.raises(ValueError, match="only its numbers can be changed"):
        optimizer.use_ema = True
    with pytest.raises(ValueError, match="`weight_decay` must be at least 0"):
        optimizer.weight_decay = -1.0
    assert (optimizer.weight_decay, optimizer.use_ema) == (0.2, False)


@pytest.mark.parametrize(
    "make", [lambda: optim.SGD(0.5, weight_decay=0.5), lambda: MomentumSGD(0.5)]
)
def test_an_option_can_be_set_back(make):
    optimizer, v = make(), ol.Variable(1.0, "v")
    name = "momentum" if isinstance(optimizer, MomentumSGD) else "weight_decay"
    first = getattr(optimizer, name)
    optimizer.apply_gradients([(1.0, v)])
    for value in (0.25, first, 0.25, first):
        setattr(optimizer, name, value)
        other, before = make(), [x.value for x in (*optimizer.variables, v)]
        setattr(other, name, value)
        w = ol.Variable(before[-1], "v")
        other.build([w])
        other.set_weights(before[:-1])
        for each, box in ((optimizer, v), (other, w)):
            each.apply_gradients([(1.0, box)])
        assert float(v) == float(w)


class Noting(custom.MomentumSGD):
    """Sets attributes wherever Keras lets it, in a mixin and in methods of its own too."""

    levels = 3

    def __init__(self, *args, **kwargs):
        self.before = 1
        super().__init__(*args, **kwargs)
        self.after = 2
        del self.before

    def build(self, var_list):
        self.calls = 0
        super().build(var_list)
        self.names = [v.name for v in var_list]
        self.passing = 1
        del self.passing

    def apply_gradients(self, grads_and_vars, **options):
        self.calls += 1
        self._last = len(self.names)
        return super().apply_gradients(grads_and_vars, **options)


def test_a_subclass_sets_its_own_attributes():
    noting: Any = Noting
    optimizer, v = noting(0.25), ol.Variable(1.0, "v")
    optimizer.after, optimizer.levels = 4, 5  # what the class has, can be set
    optimizer.build([v])
    optimizer.apply_gradients([(1.0, v)])
    assert (optimizer.after, optimizer.levels, optimizer.calls) == (4, 5, 1)
    assert not hasattr(optimizer, "before")
    assert not hasattr(optimizer, "passing")
    with pytest.raises(AttributeError, match=r"Did you mean `after`\? Set new attributes in"):
        optimizer.aftr = 5
    with pytest.raises(AttributeError, match="`momentums` must stay"):
        del optimizer.momentums


def test_a_property_of_a_subclass_can_be_set():
    class Halved(custom.MomentumSGD):
        @property
        def half_momentum(self):
            return self.momentum / 2

        @half_momentum.setter
        def half_momentum(self, value):
            self.momentum = 2 * value

    halved: Any = Halved
    optimizer = built(halved(0.25))
    optimizer.half_momentum = 0.25
    assert optimizer.momentum == 0.5
    assert "half_momentum" not in vars(optimizer)
    with pytest.raises(AttributeError, match="half_momentum"):
        del optimizer.half_momentum


def test_lr_may_be_an_option_of_a_subclass():
    class Declared(Optimizer):
        learning_rate: Any = None
        lr: float = 0.5

        def update_step(self, gradient, variable):
            variable.assign_sub(self.lr * gradient)

    class Assigned(Optimizer):
        def __init__(self, lr=0.5, **options):
            super().__init__(**options)
            self.lr = lr

        def update_step(self, gradient, variable):
            variable.assign_sub(self.lr * gradient)

    for cls in (Declared, Assigned):
        v = ol.Variable(1.0, "v")
        cls(lr=0.25).apply_gradients([(1.0, v)])
        assert float(v) == 0.75


def test_a_constructor_that_failed_can_be_called_again():
    class Picky(Optimizer):
        def __init__(self, size, **options):
            super().__init__(learning_rate=0.5, **options)
            if size < 0:
                raise ValueError("too small")
            self.size = size

    with pytest.raises(ValueError, match="too small"):
        Picky(-1)
    optimizer = Picky(3)
    with pytest.raises(AttributeError, match=r"Did you mean `size`\?"):
        optimizer.sise = 4
