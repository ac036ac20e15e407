"""An argument that `optimize_loss` does not have: the error says where it belongs."""

import inspect
from typing import Any

import pytest

import optimize_loss as ol

build: Any = ol.optimize_loss


def loss(params, x):
    return params["w"] * x


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"lr": 0.1}, "Did you mean `learning_rate`? Received: lr=0.1."),
        ({"optimizr": "SGD"}, "Did you mean `optimizer`?"),
        ({"clip_norm": 1.0}, "Did you mean `clip_gradients`?"),
        ({"scheduler": None}, "Did you mean `learning_rate`?"),
        ({"weight_decay": 0.1}, "`optimizer=ol.optimizers.AdamW(learning_rate=…, weight_decay=…)`"),
        ({"wd": 0.1}, "Did you mean `weight_decay`? It is an option of the optimizer"),
        ({"momentum": 0.9}, "ol.optimizers.SGD(learning_rate=…, momentum=…)"),
        ({"momentum": 0.9, "optimizer": "RMSprop"}, "ol.optimizers.RMSprop(learning_rate=…, mom"),
        ({"momentum": 0.9, "optimizer": "Adam"}, "ol.optimizers.SGD(learning_rate=…, momentum=…)"),
        ({"beta_1": 0.9}, "ol.optimizers.Adam(learning_rate=…, beta_1=…)"),
        ({"freeze": True}, "It is a key of a rule: `rules={pattern: dict(freeze=…)}`."),
        ({"model_state": {}}, "It is an argument of `step.init`. Received: model_state={}."),
        ({"hooks": {}}, "It is an argument of `step.run`."),
        ({"zzz": 0}, "`, only ['loss', "),
    ],
)
def test_the_error_says_where_it_belongs(given, advice):
    with pytest.raises(ol.InvalidType) as caught:
        build(loss, **given)
    assert str(caught.value).startswith(f"`optimize_loss` has no argument `{next(iter(given))}`")
    assert advice in str(caught.value)


def test_every_option_of_an_optimizer_has_a_place():
    for name in ol.optimizers.names():
        for option in inspect.signature(getattr(ol.optimizers, name)).parameters:
            if option not in inspect.signature(ol.optimize_loss).parameters:
                with pytest.raises(ol.InvalidType, match=r"Did you mean|optimizer=ol\.optimizers"):
                    build(loss, **{option: 1})


def test_a_number_by_position_is_no_learning_rate():
    with pytest.raises(ol.InvalidType, match="learning rate is given as `learning_rate=…`"):
        ol.optimize_loss(loss, 0.1)


def test_the_signature_stays():
    parameters = inspect.signature(ol.optimize_loss).parameters
    assert [*parameters][:3] == ["loss", "global_step", "learning_rate"]
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_a_warning_points_to_the_call():
    with pytest.warns(UserWarning, match="is ignored") as caught:
        ol.optimize_loss(
            loss,
            optimizer=ol.optimizers.SGD(0.1),
            learning_rate_decay_fn=lambda rate, step: rate,
        )
    assert caught[0].filename == __file__
