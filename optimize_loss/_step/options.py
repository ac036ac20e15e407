"""From the options of `optimize_loss` to links, checked."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from optimize_loss._checks import (
    COUNT,
    DECAY,
    NOT_NEGATIVE,
    POSITIVE,
    STEP,
    InvalidType,
    Rule,
    check_choice,
    check_integer,
    check_number,
    check_takes,
    received,
)
from optimize_loss._engine.bucket import LARGEST_IN_A_BUCKET
from optimize_loss._engine.link import is_transformation
from optimize_loss._engine.order import arranged
from optimize_loss._engine.selection import linked
from optimize_loss._names import Pattern, check_patterns
from optimize_loss._state.rules import Rules
from optimize_loss.schedules import Decayed, WarmUpDecay
from optimize_loss.transforms import (
    Accumulate,
    AddNoise,
    AverageLoss,
    AverageParams,
    Chain,
    ClipByAdaptiveNorm,
    ClipByFunction,
    ClipByGlobalNorm,
    DivideByDynamicLossScale,
    DivideByLossScale,
    ForParameters,
    Lookahead,
    MultiplyGradients,
    ReduceOnPlateau,
    SkipNonFinite,
)
from optimize_loss.transforms._guard import Guard
from optimize_loss.transforms._run_optax import RunOptax
from optimize_loss.transforms._sharpness import Sharpness

Links = dict[str, Any]


def adaptive_clipping_fn(
    std_factor: float = 2.0,
    decay: float = 0.95,
    static_max_norm: float | None = None,
    global_step: Any = None,
    report_summary: bool = False,
    epsilon: float = 1e-8,
    name: str | None = None,
) -> ClipByAdaptiveNorm:
    """Return a link for `clip_gradients`: shrink gradients whose norm is unusual for this run.

    Args:
      std_factor: how many standard deviations of the log-norm count as usual, at least 0.
      decay: of the running means of the log-norm and of its square, in [0, 1).
      static_max_norm: where given, the norm is also kept to at most this.
      global_step: where not None, the means follow the first steps: the decay at step n is
        min(decay, n / (n + 1)). Its value is not read: the state counts the steps.
      report_summary: whether to report `global_norm/adaptive_max_gradient_norm`.
      epsilon: the smallest norm and the smallest variance, above 0.
      name: not used; contrib named variables by it.

    Example:
      >>> import optimize_loss as ol
      >>> ol.adaptive_clipping_fn(std_factor=3.0).std_factor
      3.0

    References:
      `tf.contrib.layers.adaptive_clipping_fn`; `ClipByAdaptiveNorm` has the formula.
    """
    return ClipByAdaptiveNorm(
        std_factor=std_factor,
        decay=decay if global_step is None else WarmUpDecay(decay),
        static_max_norm=static_max_norm,
        epsilon=epsilon,
        report_summary=report_summary,
    )


def check_rate(rate: Any, decay: Any, global_step: Any) -> Any:
    """Return the learning rate: None, a number, a schedule, or a number that a function decays."""
    if decay is not None and not callable(decay):
        raise InvalidType(
            "`learning_rate_decay_fn` must be a function of (learning_rate, step). "
            f"{received('learning_rate_decay_fn', decay)}"
        )
    if rate is not None:
        rate = _number("learning_rate", rate, NOT_NEGATIVE)
    if decay is None:
        return rate
    check_takes(
        "`learning_rate_decay_fn` must take (learning_rate, step) alone, as in `lambda rate, step: "
        "cosine_decay(rate, step, 1000)`; a schedule of the step is given as `learning_rate`.",
        decay,
        rate,
        0,
    )
    if global_step is None:
        raise ValueError("`global_step` is required for `learning_rate_decay_fn`.")
    if callable(rate):
        raise ValueError(
            "`learning_rate` must be a number when there is a `learning_rate_decay_fn`. "
            f"{received('learning_rate', rate)}"
        )
    if rate is None:
        warnings.warn(
            "`learning_rate_decay_fn` is ignored, as `learning_rate` is None.", stacklevel=4
        )
        return None
    return Decayed(rate, decay)


def gradient_links(noise_scale: Any, rules: Rules, seed: Any, multipliers: Any) -> Links:
    """Return the links that come before clipping."""
    links: Links = {}
    if noise_scale is not None:
        _number("gradient_noise_scale", noise_scale, NOT_NEGATIVE)
    scale = rules.number("noise_scale", rules.having("noise_scale"), noise_scale)
    if scale is not None:
        links["gradient_noise"] = AddNoise(scale, seed)
    if multipliers is not None and multipliers != {}:
        links["gradient_multipliers"] = MultiplyGradients(multipliers)
    return links


def clip_links(clip: Any) -> Links:
    """Return the link for `clip_gradients`, if any."""
    if clip is None:
        return {}
    if clip is adaptive_clipping_fn:
        raise InvalidType(
            "`clip_gradients` must be the result of `adaptive_clipping_fn()`: call it."
        )
    if isinstance(clip, ForParameters) or is_transformation(clip):
        return {"clip_gradients": clip}
    if callable(clip) and not isinstance(clip, type):
        return {"clip_gradients": ClipByFunction(clip)}
    if isinstance(clip, bool | str) or not hasattr(clip, "__float__"):
        raise InvalidType(
            "`clip_gradients` must be a number, a link, or a function of "
            f"[(gradient, parameter), …]. {received('clip_gradients', clip)}"
        )
    return {"clip_gradients": ClipByGlobalNorm(check_number("clip_gradients", clip, POSITIVE))}


def mean_of_loss(decay: Any) -> Links:
    """Return the link for `moving_average_decay`, if any."""
    if decay is None:
        return {}
    check_number("moving_average_decay", decay, DECAY)
    return {"loss_mean": AverageLoss(decay, "loss/mean")}


def check_known(links: Chain) -> Chain:
    """Return links, none with a traced number: a step is compiled without it.

    Raises:
      InvalidType: there is one.
    """
    for path in links.traced_numbers:
        name, number = path.split("/", 1)
        check_number(number, links.link(name).numbers()[number])
    return links


def check_first_step(step: Any) -> int:
    """Return the first global step; 0 where there is none."""
    if step is None:
        return 0
    try:
        return check_integer("global_step", step, STEP)
    except InvalidType as error:
        raise InvalidType(
            f"{error} The second argument by position is the step, as in contrib: the learning "
            "rate is given as `learning_rate=…`, and the optimizer as `optimizer=…`."
        ) from error


def check_variables(variables: Any) -> tuple[Pattern, ...] | None:
    """Return the patterns of the parameters to train; None for all.

    Raises:
      ValueError: the list is empty.
    """
    if variables is None:
        return None
    patterns = check_patterns("variables", variables)
    if not patterns:
        raise ValueError("There are no variables to optimize: `variables` is empty.")
    return patterns


def check_bucket(bucket: Any) -> int | None:
    """Return the most entries of a parameter that shares an array; None for none."""
    if isinstance(bucket, str) and bucket == "auto":
        return LARGEST_IN_A_BUCKET
    return None if bucket is None else check_integer("bucket", bucket, COUNT)


def check_functions(name: str, functions: Any) -> tuple[Callable[..., Any], ...]:
    """Return a list of functions as a tuple; None is empty."""
    functions = () if functions is None else functions
    if not isinstance(functions, Iterable) or not all(map(callable, functions := tuple(functions))):
        raise InvalidType(f"`{name}` must be a list of functions. {received(name, functions)}")
    return functions


def check_name(name: Any) -> str:
    """Return the prefix of metrics for `name`."""
    if name is not None and not isinstance(name, str):
        raise InvalidType(f"`name` must be text. {received('name', name)}")
    return f"{name}/" if name else ""


@dataclasses.dataclass(frozen=True)
class Around:
    """The options of `optimize_loss` of these names."""

    skip: Any = None
    loss_scale: Any = None
    accumulate: Any = None
    plateau: Any = None
    sam: Any = None
    lookahead: Any = None
    ema: Any = None

    def links(self, inner: Links) -> Links:
        """Return all links in a row.

        Raises:
          InvalidType: an option is of the wrong kind.
          ValueError: an option has a wrong value, or `inner` has such a link, or one of its name.
        """
        given = {name: value for name, value in vars(self).items() if value is not None}
        for name, value in given.items():
            if name in inner or any(isinstance(x, _KINDS[name]) for _, x in linked(inner)):
                raise ValueError(
                    f"`{name}` must not be given where the optimizer has such a link, or one of "
                    f"this name. Received: {name}={value!r}, and links {[*inner]}."
                )
        if self.plateau is not None:
            _check_lowered(inner)
        return arranged(inner, {name: _link(name, value) for name, value in given.items()})


# The links that the options of `Around` make, and may be.
_KINDS: dict[str, Any] = {
    "skip": Guard,
    "loss_scale": DivideByLossScale | DivideByDynamicLossScale,
    "accumulate": Accumulate,
    "plateau": ReduceOnPlateau,
    "sam": Sharpness,
    "lookahead": Lookahead,
    "ema": AverageParams,
}


def _link(name: str, value: Any) -> Any:
    return value if isinstance(value, _KINDS[name]) else _MAKERS[name](value)


def _check_lowered(links: Links) -> None:
    """Raise if a link has a rate that a plateau cannot lower."""
    if optaxes := [name for name, link in linked(links) if isinstance(link, RunOptax)]:
        raise ValueError(
            "`plateau` must be omitted if a rule has an optax transformation as its "
            f"`optimizer`, whose rate it cannot lower. Received: {optaxes}."
        )


def _skip(value: Any) -> Guard:
    if not isinstance(value, str):
        raise InvalidType(
            f'`skip` must be "nonfinite", `SkipNonFinite` or `Spike`. {received("skip", value)}'
        )
    check_choice("skip", value, ["nonfinite"])
    return SkipNonFinite()


def _loss_scale(value: Any) -> Any:
    if isinstance(value, str):
        check_choice("loss_scale", value, ["dynamic"])
        return DivideByDynamicLossScale()
    return DivideByLossScale(check_number("loss_scale", value, POSITIVE))


def _plateau(value: Any) -> ReduceOnPlateau:
    raise InvalidType(f"`plateau` must be a `ReduceOnPlateau`. {received('plateau', value)}")


def _number(name: str, value: Any, rule: Rule) -> Any:
    """Return a number that a rule allows, or a schedule, which is checked when it runs."""
    return value if callable(value) else check_number(name, value, rule)


_MAKERS: dict[str, Callable[[Any], Any]] = {
    "skip": _skip,
    "loss_scale": _loss_scale,
    "accumulate": lambda value: Accumulate(check_integer("accumulate", value, COUNT)),
    "plateau": _plateau,
    "sam": lambda value: Sharpness(_number("sam", value, POSITIVE)),
    "lookahead": lambda value: Lookahead(check_integer("lookahead", value, COUNT)),
    "ema": lambda value: AverageParams(_number("ema", value, DECAY), bias_free=True),
}
