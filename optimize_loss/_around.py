"""The links that `optimize_loss` puts around those of its rule: guard, accumulation, averages."""

import dataclasses
import itertools
from typing import Any

from optimize_loss._checks import (
    COUNT,
    DECAY,
    POSITIVE,
    InvalidType,
    check_choice,
    check_integer,
    check_number,
    received,
)
from optimize_loss.transforms import (
    Accumulate,
    AverageParams,
    DivideByDynamicLossScale,
    DivideByLossScale,
    Lookahead,
    ReduceOnPlateau,
    SkipNonFinite,
    SumOverAxis,
)
from optimize_loss.transforms._guard import Guard
from optimize_loss.transforms._places import linked
from optimize_loss.transforms._run_optax import RunOptax
from optimize_loss.transforms._sharpness import Sharpness

Links = dict[str, Any]
_SCALES = (DivideByLossScale, DivideByDynamicLossScale)


@dataclasses.dataclass(frozen=True)
class Around:
    """The options of `optimize_loss` of these names."""

    skip: Any = None
    loss_scale: Any = None
    accumulate: Any = None
    ema: Any = None
    lookahead: Any = None
    sam: Any = None
    plateau: Any = None

    def links(self, inner: Links) -> Links:
        """Return all links in a row: gates at the head, after sums over devices; averages last.

        Raises:
          InvalidType: an option is of the wrong kind.
          ValueError: an option has a wrong value, or `inner` has such a link, or one of its name.
        """
        made = self._made()
        for name, link in made.items():
            kinds = Guard if name == "skip" else _SCALES if name == "loss_scale" else type(link)
            if name in inner or any(isinstance(x, kinds) for _, x in linked(inner)):
                raise ValueError(
                    f"`{name}` must not be given where the optimizer has such a link, or one of "
                    f"this name. Received: {name}={getattr(self, name)!r}, and links {[*inner]}."
                )
        optaxes = [name for name, link in linked(inner) if isinstance(link, RunOptax)]
        if "plateau" in made and optaxes:
            raise ValueError(
                "`plateau` must be left out where a rule has an optax transformation for its "
                f"`optimizer`, whose rate it cannot lower. Received: {optaxes}."
            )
        rest = list(inner.items())
        sums = dict(itertools.takewhile(lambda pair: isinstance(pair[1], SumOverAxis), rest))
        rest = rest[len(sums) :]
        scales = dict(itertools.takewhile(lambda pair: isinstance(pair[1], _SCALES), rest))
        rest = dict(rest[len(scales) :])
        head = {name: made[name] for name in ("skip", "loss_scale") if name in made}
        gathers = {"accumulate": made["accumulate"]} if "accumulate" in made else {}
        order = ("plateau", "sam", "lookahead", "ema")
        last = {name: made[name] for name in order if name in made}
        return {**sums, **head, **scales, **gathers, **rest, **last}

    def _made(self) -> Links:
        """Return the link of each option that is given."""
        makers = {
            "skip": _guard,
            "loss_scale": _loss_scale,
            "accumulate": _accumulate,
            "ema": _ema,
            "lookahead": _lookahead,
            "sam": _sam,
            "plateau": _plateau,
        }
        given = {name: getattr(self, name) for name in makers}
        return {name: makers[name](x) for name, x in given.items() if x is not None}


def _guard(value: Any) -> Guard:
    if isinstance(value, Guard):
        return value
    if not isinstance(value, str):
        raise InvalidType(
            f'`skip` must be "nonfinite", `SkipNonFinite` or `Spike`. {received("skip", value)}'
        )
    check_choice("skip", value, ["nonfinite"])
    return SkipNonFinite()


def _loss_scale(value: Any) -> Any:
    if isinstance(value, _SCALES):
        return value
    if isinstance(value, str):
        check_choice("loss_scale", value, ["dynamic"])
        return DivideByDynamicLossScale()
    return DivideByLossScale(check_number("loss_scale", value, POSITIVE))


def _accumulate(value: Any) -> Accumulate:
    if isinstance(value, Accumulate):
        return value
    return Accumulate(check_integer("accumulate", value, COUNT))


def _ema(value: Any) -> AverageParams:
    if isinstance(value, AverageParams):
        return value
    if not callable(value):
        value = check_number("ema", value, DECAY)
    return AverageParams(value, bias_free=True)


def _lookahead(value: Any) -> Lookahead:
    if isinstance(value, Lookahead):
        return value
    return Lookahead(check_integer("lookahead", value, COUNT))


def _sam(value: Any) -> Sharpness:
    return Sharpness(value if callable(value) else check_number("sam", value, POSITIVE))


def _plateau(value: Any) -> ReduceOnPlateau:
    if not isinstance(value, ReduceOnPlateau):
        raise InvalidType(f"`plateau` must be a `ReduceOnPlateau`. {received('plateau', value)}")
    return value
