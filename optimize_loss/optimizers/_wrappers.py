"""Optimizers around optimizers: a dynamic loss scale, and different rules by name."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from optimize_loss._checks import InvalidType, received
from optimize_loss._names import Pattern, check_pattern, first_matches
from optimize_loss.optimizers._base import Optimizer
from optimize_loss.optimizers._options import options_of
from optimize_loss.optimizers._variable import Variable, different_names
from optimize_loss.transforms import (
    Count,
    DivideByDynamicLossScale,
    ForParameters,
    PositiveStart,
)

_OF_THE_SHELL = ("name", "jit_compile", "mesh", "axis_name")


def _check_inner(optimizer: Any, argument: str) -> None:
    if not isinstance(optimizer, Optimizer):
        raise InvalidType(f"`{argument}` must be an `Optimizer`. {received(argument, optimizer)}")


def _refuse_options(outer: Optimizer, argument: str) -> None:
    """Raise if an option was given that belongs to the optimizer inside."""
    for name, default in options_of(Optimizer).items():
        if name not in (*_OF_THE_SHELL, "learning_rate") and getattr(outer, name) != default:
            raise ValueError(
                f"`{name}` must be given to `{argument}`, not to {type(outer).__name__}. "
                f"{received(name, getattr(outer, name))}"
            )


class LossScaleOptimizer(Optimizer):
    """Dynamic loss scale."""

    learning_rate: Any = dataclasses.field(default=None, init=False)
    inner_optimizer: Optimizer
    initial_scale: PositiveStart = 2.0**15
    dynamic_growth_steps: Count = 2000

    def __post_init__(self):
        _check_inner(self.inner_optimizer, "inner_optimizer")
        _refuse_options(self, "inner_optimizer")
        if self.inner_optimizer.loss_scale_factor is not None:
            raise ValueError(
                "`inner_optimizer` must have no `loss_scale_factor`: its gradients would be "
                f"divided twice. {received('inner_optimizer', self.inner_optimizer)}"
            )
        super().__post_init__()

    def links(self):
        """Return the loss scale, then the links of the optimizer inside."""
        scale = DivideByDynamicLossScale(self.initial_scale, self.dynamic_growth_steps)
        return {"loss_scale": scale, **self.inner_optimizer._links_behind_aggregation()}

    def _rates(self) -> dict[str, Any]:
        return self.inner_optimizer._rates()

    def _get_learning_rate(self) -> Any:
        return self.inner_optimizer.learning_rate

    def _set_learning_rate(self, value: Any) -> None:
        self.inner_optimizer.learning_rate = value
        self._chain_changed()


@dataclasses.dataclass(frozen=True)
class Group:
    """Tells the parameters for which the pattern at `index` is the first that matches.

    The index behind the last pattern means all other parameters.
    """

    patterns: tuple[Pattern, ...]
    index: int
    has_default: bool

    def takes(self, names: Sequence[str], leaves: Sequence[Any]) -> list[bool]:
        """Return for each parameter whether it is meant; raise if one is nobody's."""
        chosen = first_matches("optimizers", self.patterns, names)
        if not self.has_default and (
            left := [n for n, c in zip(names, chosen, strict=True) if c is None]
        ):
            raise ValueError(
                f"`optimizers` must have a pattern for every parameter, or `default_optimizer` be "
                f"given. Received: {list(self.patterns)}. Parameters without one: {left[:5]}."
            )
        wanted = (*self.patterns, None)[self.index]
        return [c is wanted for c in chosen]


class MultiOptimizer(Optimizer):
    """Different optimizers for different parameters."""

    learning_rate: Any = dataclasses.field(default=None, init=False)
    optimizers: Mapping[Pattern, Optimizer]
    default_optimizer: Optimizer | None = None

    def __post_init__(self):
        if not isinstance(self.optimizers, Mapping) or not self.optimizers:
            raise InvalidType(
                "`optimizers` must map names or patterns to optimizers, and have at least one. "
                f"{received('optimizers', self.optimizers)}"
            )
        for pattern, inner in self.optimizers.items():
            _check_inner(inner, f"optimizers[{check_pattern('optimizers', pattern)!r}]")
        if self.default_optimizer is not None:
            _check_inner(self.default_optimizer, "default_optimizer")
        super().__post_init__()

    def _inner(self) -> dict[str, tuple[Group, Optimizer]]:
        """Return the optimizers with their parameters, by a name for their links."""
        inner = list(self.optimizers.values())
        if self.default_optimizer is not None:
            inner.append(self.default_optimizer)
        names = different_names([x.name or type(x).__name__ for x in inner])
        has_default = self.default_optimizer is not None
        groups = [Group(tuple(self.optimizers), i, has_default) for i in range(len(inner))]
        return dict(zip(names, zip(groups, inner, strict=True), strict=True))

    def links(self):
        """Return the links of all optimizers, each for its parameters."""
        return {
            f"{name}.{link_name}": ForParameters(group, link)
            for name, (group, inner) in self._inner().items()
            for link_name, link in inner._links_behind_aggregation().items()
        }

    def _rates(self) -> dict[str, Variable]:
        return {
            f"{name}.{path}": box
            for name, (_, inner) in self._inner().items()
            for path, box in inner._rates().items()
        }

    def _get_learning_rate(self) -> Any:
        raise AttributeError(
            "A MultiOptimizer has no `learning_rate` of its own: see those of its `optimizers`."
        )

    def _set_learning_rate(self, value: Any) -> None:
        self._get_learning_rate()
