"""An optimizer becomes JSON and back, and takes the same next step, bit for bit."""

import copy
import inspect
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimize_loss as ol

optim, schedules = ol.optimizers, ol.schedules
INVALID, VALUE = ol.InvalidType, ValueError

PARAMS = {
    "bias": np.array([0.5, -1.0], np.float32),
    "kernel": np.arange(6, dtype=np.float32).reshape(3, 2) / 4 - 0.5,
}
GRADS = [{n: np.float32(np.cos(p + t)) for n, p in PARAMS.items()} for t in range(4)]

HALVING = schedules.ExponentialDecay(0.5, 2, 0.5, staircase=True)
COSINE = schedules.CosineDecay(0.1, 3, alpha=0.25, warmup_target=0.5, warmup_steps=2)
SCHEDULES = {
    "ExponentialDecay": HALVING,
    "InverseTimeDecay": schedules.InverseTimeDecay(0.5, 2, 0.5, name="slow"),
    "PiecewiseConstantDecay": schedules.PiecewiseConstantDecay([1, 2], [0.5, 0.25, 0.125]),
    "PolynomialDecay": schedules.PolynomialDecay(0.5, 3, 0.25, power=2.0, cycle=True),
    "CosineDecay": COSINE,
    "CosineDecayRestarts": schedules.CosineDecayRestarts(0.5, 2, t_mul=1.5, m_mul=0.5, alpha=0.1),
    "WarmupStableDecay": schedules.WarmupStableDecay(0.5, 1, 1, 2, end_learning_rate=0.1),
    "InverseSquareRootDecay": schedules.InverseSquareRootDecay(0.5, 2, 0.125),
    "OneCycle": schedules.OneCycle(0.5, 4, pct_start=0.5, div_factor=2.0),
    "WarmUpDecay": schedules.WarmUpDecay(0.75),
    "Join": schedules.Join([COSINE, schedules.Join([HALVING, HALVING], [1])], [2]),
}

ALL = {
    "name": "mine",
    "weight_decay": 0.125,
    "global_clipnorm": 0.75,
    "use_ema": True,
    "ema_momentum": 0.75,
    "ema_overwrite_frequency": 3,
}
AROUND = {"gradient_accumulation_steps": 2, "loss_scale_factor": 4.0}
ADAM = {"learning_rate": 0.3, "beta_1": 0.75, "beta_2": 0.875, "epsilon": 1e-3}
OWN: dict[str, dict[str, Any]] = {
    "Adadelta": {"learning_rate": 0.7, "rho": 0.875, "epsilon": 1e-4},
    "AdadeltaOptimizer": {"learning_rate": 0.7, "rho": 0.875, "epsilon": 1e-4},
    "Adafactor": {
        "learning_rate": 0.3,
        "beta_2_decay": -0.5,
        "epsilon_1": 1e-20,
        "epsilon_2": 1e-2,
        "clip_threshold": 0.5,
        "relative_step": False,
    },
    "Adagrad": {"learning_rate": 0.3, "initial_accumulator_value": 0.3, "epsilon": 1e-3},
    "AdagradDAOptimizer": {
        "learning_rate": 0.3,
        "initial_gradient_squared_accumulator_value": 0.3,
        "l1_regularization_strength": 0.01,
        "l2_regularization_strength": 0.02,
    },
    "AdagradOptimizer": {"learning_rate": 0.3, "initial_accumulator_value": 0.3},
    "Adam": {**ADAM, "amsgrad": True},
    "AdamOptimizer": {"learning_rate": 0.3, "beta1": 0.75, "beta2": 0.875, "epsilon": 1e-3},
    "AdamW": {**ADAM, "amsgrad": True},
    "Adamax": ADAM,
    "Ftrl": {
        "learning_rate": 0.3,
        "learning_rate_power": -0.75,
        "initial_accumulator_value": 0.3,
        "l1_regularization_strength": 0.01,
        "l2_regularization_strength": 0.02,
        "l2_shrinkage_regularization_strength": 0.03,
        "beta": 0.04,
    },
    "FtrlOptimizer": {
        "learning_rate": 0.3,
        "learning_rate_power": -0.75,
        "initial_accumulator_value": 0.3,
        "l1_regularization_strength": 0.01,
        "l2_regularization_strength": 0.02,
        "l2_shrinkage_regularization_strength": 0.03,
        "beta": 0.04,
    },
    "GradientDescentOptimizer": {"learning_rate": 0.3},
    "Lamb": ADAM,
    "Lion": {"learning_rate": 0.3, "beta_1": 0.75, "beta_2": 0.875},
    "MomentumOptimizer": {"learning_rate": 0.3, "momentum": 0.75, "use_nesterov": True},
    "Muon": {
        "learning_rate": 0.3,
        "adam_beta_1": 0.75,
        "adam_weight_decay": None,
        "exclude_layers": ["b.as"],
        "exclude_embeddings": False,
        "muon_a": 3.0,
        "adam_lr_ratio": 0.5,
        "momentum": 0.75,
        "ns_steps": 2,
        "nesterov": False,
        "rms_rate": None,
    },
    "Nadam": ADAM,
    "ProximalAdagradOptimizer": {
        "learning_rate": 0.3,
        "initial_accumulator_value": 0.3,
        "l1_regularization_strength": 0.01,
        "l2_regularization_strength": 0.02,
    },
    "ProximalGradientDescentOptimizer": {
        "learning_rate": 0.3,
        "l1_regularization_strength": 0.01,
        "l2_regularization_strength": 0.02,
    },
    "RMSPropOptimizer": {
        "learning_rate": 0.3,
        "decay": 0.75,
        "momentum": 0.5,
        "epsilon": 1e-3,
        "centered": True,
    },
    "RMSprop": {
        "learning_rate": 0.3,
        "rho": 0.75,
        "momentum": 0.5,
        "epsilon": 1e-3,
        "centered": True,
    },
    "SGD": {"learning_rate": 0.3, "momentum": 0.75, "nesterov": True},
    "ScheduleFreeAdamW": {
        "learning_rate": 0.3,
        "beta_1": 0.75,
        "beta_2": 0.875,
        "epsilon": 1e-3,
        "warmup_steps": 3,
    },
}


def nested():
    adam = optim.Adam(COSINE, beta_1=0.5, weight_decay=0.1, name="a")
    inner = optim.MultiOptimizer({"bias": adam}, default_optimizer=optim.SGD(0.3, momentum=0.5))
    return {
        "LossScaleOptimizer": optim.LossScaleOptimizer(
            optim.Nadam(HALVING, clipnorm=0.5, use_ema=True), 8.0, 2, name="scaled"
        ),
        "MultiOptimizer": inner,
        "both": optim.LossScaleOptimizer(
            optim.MultiOptimizer(
                {"b*": optim.Adam(0.1), "k*|c*": optim.SGD(HALVING, momentum=0.5)},
                clipvalue=0.75,
                use_ema=True,
                name="many",
            ),
            initial_scale=2.0,
            dynamic_growth_steps=1,
        ),
    }


def made(name):
    if name in nested():
        return nested()[name]
    around = AROUND if name in ("SGD", "MomentumOptimizer") else {}
    return getattr(optim, name)(**{**OWN[name], **ALL, **around})


def steps(optimizer, some_grads=GRADS):
    """Return the parameters after some steps."""
    params = PARAMS
    for grads in some_grads:
        params = optimizer.apply(jax.tree.map(optimizer.scale_loss, grads), params)
    return params


def assert_equal(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def through_json(config):
    text = json.dumps(config)
    assert "NaN" not in text
    assert "Infinity" not in text
    return json.loads(text)


def test_the_table_is_of_all_optimizers():
    assert OWN.keys() | {"LossScaleOptimizer", "MultiOptimizer"} == set(optim.names())
    names = {n for n in schedules.__all__ if isinstance(getattr(schedules, n), type)}
    assert SCHEDULES.keys() == names - {"Decayed", "LearningRateSchedule"}


@pytest.mark.parametrize("name", OWN)
def test_the_table_has_no_defaults(name):
    parameters = inspect.signature(getattr(optim, name)).parameters
    for option, value in OWN[name].items():
        assert parameters[option].default != value, option
    if name == "Muon":
        return
    shared = {*ALL, *AROUND, "jit_compile", "clipnorm", "clipvalue", "mesh", "axis_name"}
    assert parameters.keys() - shared == OWN[name].keys()


@pytest.mark.parametrize("name", [*OWN, *nested()])
def test_the_next_step_is_the_same(name):
    optimizer = made(name)
    config = through_json(optimizer.get_config())
    before = copy.deepcopy(config)
    described = through_json(optim.serialize(optimizer))
    assert described["config"] == config
    cls = type(optimizer)
    expected = steps(optimizer)
    for other in (cls.from_config(config), optim.deserialize(described), optim.get(described)):
        assert type(other) is cls
        assert other.get_config() == optimizer.get_config()
        assert_equal(steps(other), expected)
    assert config == before
    moved = [not np.array_equal(expected[n], PARAMS[n]) for n in PARAMS]
    assert all(moved)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_come_back(name):
    schedule = SCHEDULES[name]
    described = through_json(optim.serialize(schedule))
    assert described["class_name"] == name
    before = copy.deepcopy(described)
    assert optim.deserialize(described) == schedule
    config = through_json(optim.SGD(schedule, momentum=0.5).get_config())
    other = optim.SGD.from_config(config)
    assert other.rate == schedule
    assert_equal(steps(other), steps(optim.SGD(schedule, momentum=0.5)))
    assert described == before
    as_a_number = optim.Adam(0.1, beta_1=schedule) if name == "WarmUpDecay" else None
    if as_a_number is not None:
        config = through_json(as_a_number.get_config())
        assert_equal(steps(optim.Adam.from_config(config)), steps(as_a_number))


def test_the_form_is_that_of_keras():
    assert optim.serialize(optim.SGD(HALVING)) == {
        "module": "optimize_loss.optimizers",
        "class_name": "SGD",
        "registered_name": None,
        "config": {
            "name": "SGD",
            "learning_rate": {
                "module": "optimize_loss.schedules",
                "class_name": "ExponentialDecay",
                "registered_name": None,
                "config": {
                    "initial_learning_rate": 0.5,
                    "decay_steps": 2,
                    "decay_rate": 0.5,
                    "staircase": True,
                    "name": None,
                },
            },
            "weight_decay": None,
            "clipnorm": None,
            "clipvalue": None,
            "global_clipnorm": None,
            "use_ema": False,
            "ema_momentum": 0.99,
            "ema_overwrite_frequency": None,
            "jit_compile": True,
            "momentum": 0.0,
            "nesterov": False,
        },
    }


def test_the_current_rate_is_what_is_written():
    optimizer = optim.SGD(0.1)
    kept = optimizer.learning_rate
    optimizer.learning_rate = np.float32(0.001)
    assert optimizer.get_config()["learning_rate"] == 0.001  # and not 0.0010000000474974513
    kept.assign(1 / 3)
    config = through_json(optimizer.get_config())
    other = optim.SGD.from_config(config)
    assert float(other.learning_rate) == float(optimizer.learning_rate)
    with jax.enable_x64(True):
        assert optim.SGD(1 / 3).get_config()["learning_rate"] == 1 / 3


def test_numbers_of_numpy_and_jax_become_plain():
    config = optim.Adam(np.float32(0.01), beta_1=jnp.float32(0.5), epsilon=np.float64(1e-3))
    plain = config.get_config()
    assert {type(x) for x in plain.values()} <= {str, float, bool, type(None)}
    assert optim.serialize(np.int64(3)) == 3
    assert optim.serialize(jnp.bfloat16(0.5)) == 0.5
    assert optim.serialize((1, [2.0, None, True, "a"])) == [1, [2.0, None, True, "a"]]
    assert optim.serialize({"a": ol.Variable(0.1)}) == {"a": 0.1}


def test_an_axis_comes_back_and_a_mesh_stays():
    assert "axis_name" not in optim.SGD().get_config()
    optimizer = optim.SGD(0.1, axis_name=("data", "model"))
    config = through_json(optimizer.get_config())
    assert optim.SGD.from_config(config).axis_name == ("data", "model")
    mesh = jax.make_mesh((1,), ("x",))
    assert optim.SGD(mesh=mesh).get_config() == optim.SGD().get_config()


# Classes of the user's.


class Fading(optim.Optimizer):
    def __init__(self, learning_rate=0.1, fade=None, inner=None, name="Fading", **kwargs):
        super().__init__(name=name, **kwargs)
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.fade = fade
        self.inner = inner

    def update_step(self, gradient, variable):
        rate = jnp.asarray(self.learning_rate, variable.dtype)
        if self.fade is not None:
            rate = rate * self.fade(self.iterations)
        variable.assign_sub(rate * gradient)


class Root:
    """A schedule with a configuration, as for Keras."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate / jnp.sqrt(jnp.asarray(step, jnp.float32) + 1.0)

    def get_config(self):
        return {"rate": self.rate}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


OBJECTS = {"Fading": Fading, "Root": Root}


def test_custom_objects():
    root: Any = Root(0.5)
    optimizer = Fading(root, fade=HALVING, inner=optim.Adam(Root(0.25)), weight_decay=0.1)
    described = through_json(optim.serialize(optimizer))
    assert described["module"] == described["config"]["learning_rate"]["module"] == __name__
    before = copy.deepcopy(described)
    for other in (
        optim.deserialize(described, OBJECTS),
        optim.get(described, OBJECTS),
        Fading.from_config(described["config"], custom_objects={"Root": Root}),
    ):
        assert isinstance(other.rate, Root)
        assert isinstance(other.inner, optim.Adam)
        assert isinstance(other.inner.rate, Root)
        assert_equal(steps(other), steps(Fading(root, fade=HALVING, weight_decay=0.1)))
    assert described == before
    with pytest.raises(ValueError, match=r"`class_name` must be an optimizer.*'Fading'"):
        optim.deserialize(described)
    with pytest.raises(ValueError, match=r"in `custom_objects`. Received: class_name='Root'"):
        Fading.from_config(described["config"])
    assert type(optim.get("fading", OBJECTS)) is Fading


def test_custom_classes_inside_ours():
    optimizer = optim.LossScaleOptimizer(
        optim.MultiOptimizer({"bias": Fading(0.5)}, default_optimizer=optim.SGD(Root(0.5)))
    )
    described = through_json(optim.serialize(optimizer))
    assert_equal(steps(optim.deserialize(described, OBJECTS)), steps(optimizer))


def test_options_without_get_config_are_read_from_attributes():
    class Named(Fading):
        def __init__(self, learning_rate=0.1, power=2.0, mesh=None):
            super().__init__(learning_rate, name="fixed", mesh=mesh)
            self._power = power

    config = Named(0.5, power=3.0).get_config()
    assert config == {"learning_rate": 0.5, "power": 3.0}  # what the constructor takes
    assert Named.from_config(config)._power == 3.0
    with pytest.raises(INVALID, match="`weight_decay` is not an option of Named"):
        Named.from_config({**config, "weight_decay": 0.1})

    class Lost(Fading):
        def __init__(self, learning_rate=0.1, power=2.0, **kwargs):
            super().__init__(learning_rate, **kwargs)
            self.exponent = power

    with pytest.raises(NotImplementedError, match=r"`get_config` of Lost must be defined.*`power`"):
        Lost().get_config()


def test_declared_options_need_no_get_config():
    class Tilted(optim.SGD):
        tilt: ol.transforms.Positive = 1.0

        def links(self):
            rate = ol.transforms.ScaleByLearningRate(self.rate)
            return {"clip": ol.transforms.ClipByValue(self.tilt), "rate": rate}

    optimizer = Tilted(0.5, tilt=0.25)
    config = through_json(optimizer.get_config())
    assert config["tilt"] == 0.25
    assert_equal(steps(Tilted.from_config(config)), steps(optimizer))
    with pytest.raises(ValueError, match="`tilt` must be above 0"):
        Tilted.from_config({"tilt": -1.0})


# What has no configuration, and what is none.

UNSERIALIZABLE = {
    "function": lambda: optim.SGD(lambda step: 0.1).get_config(),
    "beta": lambda: optim.Adam(beta_1=lambda step: 0.1).get_config(),
    "optax": lambda: optim.SGD(optax.constant_schedule(0.1)).get_config(),
    "decayed": lambda: optim.SGD(schedules.Decayed(0.1, lambda r, s: r)).get_config(),
    "join": lambda: optim.SGD(schedules.Join([HALVING, lambda s: 0.1], [1])).get_config(),
    "inside": lambda: optim.LossScaleOptimizer(optim.SGD(lambda s: 0.1)).get_config(),
    "pattern": lambda: optim.MultiOptimizer({re.compile("b"): optim.SGD()}).get_config(),
    "layers": lambda: optim.Muon(exclude_layers=[re.compile("b")]).get_config(),
    "array": lambda: optim.serialize(jnp.ones(2)),
    "complex": lambda: optim.serialize(1j),
    "set": lambda: optim.serialize({1, 2}),
    "class": lambda: optim.serialize(int),
}


@pytest.mark.parametrize("name", UNSERIALIZABLE)
def test_what_has_no_configuration_raises(name):
    with pytest.raises(ol.InvalidType, match=r"A configuration holds .* Received: "):
        UNSERIALIZABLE[name]()


BAD_CONFIGS = {
    "unknown": (
        lambda: optim.deserialize({"class_name": "Adem", "config": {}}),
        VALUE,
        "Received: class_name='Adem'. Nearest: ['Adam', ",
    ),
    "no-config": (
        lambda: optim.deserialize({"class_name": "Adam"}),
        INVALID,
        "`config` must be a dict with `class_name` and `config`.",
    ),
    "list": (lambda: optim.deserialize([]), INVALID, "Received: config=[]."),
    "null": (
        lambda: optim.deserialize({"class_name": "Adam", "config": None}),
        INVALID,
        "`config` must be a dict. Received: config=None.",
    ),
    "null-schedule": (
        lambda: optim.deserialize({"class_name": "CosineDecay", "config": None}),
        INVALID,
        "`config` must be a dict. Received: config=None.",
    ),
    "class": (
        lambda: optim.deserialize({"class_name": 3, "config": {}}),
        INVALID,
        "`class_name` must be text. Received: class_name=3.",
    ),
    "schedule": (
        lambda: optim.SGD.from_config(
            {"learning_rate": {"class_name": "CosineDecy", "config": {}}}
        ),
        VALUE,
        "Nearest: ['CosineDecay', ",
    ),
    "option": (
        lambda: optim.SGD.from_config({"momentom": 0.5}),
        INVALID,
        "`momentom` is not an option of SGD. Did you mean `momentum`?",
    ),
    "schedule-option": (
        lambda: optim.deserialize({"class_name": "ExponentialDecay", "config": {"decay": 1}}),
        INVALID,
        "`decay` is not an option of ExponentialDecay. Did you mean `decay_rate`?",
    ),
    "value": (
        lambda: optim.SGD.from_config({"momentum": 1.5}),
        VALUE,
        "`momentum` must be in [0, 1]. Received: momentum=1.5.",
    ),
    "text": (lambda: optim.SGD.from_config("sgd"), INVALID, "Received: config='sgd'."),
    "custom": (
        lambda: Fading.from_config({"fader": 1}),
        INVALID,
        "`fader` is not an option of Fading",
    ),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configurations(name):
    read, error, message = BAD_CONFIGS[name]
    with pytest.raises(error) as caught:
        read()
    assert message in str(caught.value)


BAD_OPTIONS = {
    "nearest": (lambda: optim.SGD(momentom=0.9), "`momentum`? Options: ['learning_rate', "),
    "initials": (
        lambda: optim.Adam(lr=0.1),
        "`lr` is not an option of Adam. Did you mean `learning_rate`?",
    ),
    "decay": (lambda: optim.Adam(wd=0.1), "Did you mean `weight_decay`?"),
    "custom": (
        lambda: Fading(learningrate=0.1),
        "of Fading. Did you mean `learning_rate`?",
    ),
    "unlike": (
        lambda: optim.SGD(xyz=1),
        "`xyz` is not an option of SGD. Options: [",
    ),
    "base": (lambda: optim.Optimizer(0.1), "`name` must be text; a learning rate is given by key"),
    "name": (lambda: optim.SGD(name=3), "`name` must be text"),
    "none": (lambda: optim.Adam(beta_1=None), "`beta_1` must be in [0, 1). Received: beta_1=None."),
    "flag": (lambda: optim.SGD(nesterov="yes"), "`nesterov` must be True or False."),
    "mesh": (lambda: optim.SGD(mesh=8), "`mesh` must be a `jax.sharding.Mesh`. Received: mesh=8."),
    "axis": (lambda: optim.SGD(axis_name=0), "`axis_name` must be the name of an axis, or a tuple"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(name):
    make, message = BAD_OPTIONS[name]
    with pytest.raises(ol.InvalidType) as caught:
        make()
    assert message in str(caught.value)


# By name.


@pytest.mark.parametrize("name", ["Adam", "adam", "ADAM", "adamw", "schedulefreeadamw", "rmsProp"])
def test_get_takes_names_in_any_case(name):
    assert type(optim.get(name)).__name__.lower() == name.lower()
    described = {"class_name": name, "config": {"learning_rate": 0.5}}
    assert type(optim.get(described)).__name__.lower() == name.lower()


def test_get_gives_back_what_it_is_given():
    optimizer = optim.Adam(0.5)
    assert optim.get(optimizer) is optimizer
    assert optim.get(None) is None


BAD_NAMES = {
    "unknown": ("adem", VALUE, "`identifier` must be one of ['Adadelta', "),
    "nearest": ("sdg", VALUE, "Received: identifier='sdg'. Nearest: 'SGD'."),
    "number": (3, INVALID, "`identifier` must be a name, a configuration or an optimizer."),
    "schedule": (
        {"class_name": "WarmUpDecay", "config": {"decay": 0.5}},
        INVALID,
        "`identifier` must be a name, a configuration or an optimizer.",
    ),
    "class": (optim.Adam, INVALID, "`identifier` must be a name, a configuration or an optimizer."),
    "needs": ("momentumoptimizer", INVALID, "no default for ['learning_rate', 'momentum']."),
    "inner": ("LossScaleOptimizer", INVALID, "no default for ['inner_optimizer']."),
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(name):
    identifier, error, message = BAD_NAMES[name]
    with pytest.raises(error) as caught:
        optim.get(identifier)
    assert message in str(caught.value)


PATTERNS = {
    "*Adam*": ["Adam", "AdamOptimizer", "AdamW", "Adamax", "Nadam", "ScheduleFreeAdamW"],
    "ada?": ["Adam"],
    "*prop": ["RMSprop"],
    "lion": ["Lion"],
    "Adem": [],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_names(pattern):
    assert optim.names(pattern) == PATTERNS[pattern]


def test_all_names():
    assert optim.names() == sorted(optim.names())
    assert {"SGD", "Adam", "Muon", "MultiOptimizer"} <= set(optim.names())
    assert "Optimizer" not in optim.names()
    assert "Fading" not in optim.names()
    assert all(issubclass(getattr(optim, name), optim.Optimizer) for name in optim.names())
