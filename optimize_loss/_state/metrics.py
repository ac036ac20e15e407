"""What a training step reports, under contrib's tags."""

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._checks import InvalidType, check_choice, received
from optimize_loss._engine.order import merged
from optimize_loss._engine.selection import linked
from optimize_loss._engine.spelling import at_large
from optimize_loss.schedules import evaluate
from optimize_loss.transforms import Chain, Link, ObserveHistograms, ObserveNorm, ObserveNorms

OPTIMIZER_SUMMARIES = (
    "learning_rate",
    "loss",
    "gradients",
    "gradient_norm",
    "global_gradient_norm",
)
"""Names of the quantities that `summaries` can ask for."""

DEFAULT_SUMMARIES = ("loss", "learning_rate", "global_gradient_norm")

Links = dict[str, Any]


def check_summaries(summaries: Any) -> tuple[str, ...]:
    """Return the names of the quantities to report; None stands for the usual three.

    Raises:
      InvalidType: `summaries` is not a list of names.
      ValueError: a name is unknown.
    """
    if summaries is None:
        return DEFAULT_SUMMARIES
    if isinstance(summaries, str) or not hasattr(summaries, "__iter__"):
        raise InvalidType(f"`summaries` must be a list. {received('summaries', summaries)}")
    summaries = tuple(summaries)
    if not all(isinstance(name, str) for name in summaries):
        raise InvalidType(f"`summaries` must be names. {received('summaries', summaries)}")
    return tuple(check_choice("summaries", name, OPTIMIZER_SUMMARIES) for name in summaries)


def observed(summaries: tuple[str, ...], clip: Links) -> Links:
    """Return the links for clipping, with those around them that observe what is asked for."""
    links: Links = {}
    if {"gradient_norm", "global_gradient_norm"} & set(summaries):
        before = {"gradient_norm": ObserveNorm("global_norm/gradient_norm")}
        behind = {"clipped_gradient_norm": ObserveNorm("global_norm/clipped_gradient_norm")}
        links = merged(before, clip, behind if clip else {})
    else:
        links = dict(clip)
    if "gradient_norm" in summaries:
        links["gradient_norms"] = ObserveNorms("gradient_norm")
    if "gradients" in summaries:
        links["gradient_histograms"] = ObserveHistograms(metric="gradients")
    return links


def read(chain: Chain, state: dict[str, Any], taken: Collection[str]) -> dict[str, Any]:
    """Return what the links of a chain report, and the loss scale if it changes by itself.

    Scalars are arrays without dimensions, histograms pairs (counts, edges).

    Args:
      chain: the links.
      state: their state, after the step.
      taken: the metrics that are there already.

    Raises:
      ValueError: a link reports one of these.
    """
    scale = chain.dynamic_loss_scale(state)
    own = {} if scale is None else {"loss_scale": scale}
    found: dict[str, dict[str, Any]] = {}
    for name, link in linked(dict(chain.links)):
        reported = link.report(name, state[name]) if isinstance(link, Link) else {}
        for metric, value in reported.items():
            if metric in (*taken, *own):
                raise ValueError(
                    f"The link {name!r} must report under names that the step has not taken. "
                    f"Received: {metric!r}."
                )
            found.setdefault(metric, {})[name] = value
    each = (_one_or_each(chain, metric, values) for metric, values in found.items())
    return dict(itertools.chain(*each), **own)


def _one_or_each(chain: Chain, metric: str, values: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """Return a metric of the link that its name alone means, and one for each other link."""
    main = at_large(dict(chain.links), [*values])
    tags = {name: metric if [name] == main else f"{metric}/{name}" for name in values}
    return [(tags[name], value) for name, value in values.items()]


def rates(chain: Chain, state: dict[str, Any], step: jax.Array, given: Any) -> dict[str, Any]:
    """Return the learning rate of this step, and those of rules with an optimizer of their own.

    There is one for each link that has one where it is not clear which is that of the step.

    Args:
      chain: the links.
      state: their state, before the step.
      step: the global step.
      given: the rate that the optimizer was made with; reported where no link has one, because the
        rate of an optax transformation cannot be read.
    """
    found = chain.numbers_named("learning_rate", state, step)
    if found:
        return dict(_one_or_each(chain, "learning_rate", found))
    if callable(given):
        return {"learning_rate": evaluate("learning_rate", given, step, jnp.float32)}
    return {} if given is None else {"learning_rate": jnp.asarray(given, jnp.float32)}


def joined(metrics: dict[str, Any], own: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the metrics of a step and those of its loss, with `prefix` before each name.

    Raises:
      ValueError: the loss uses a name that the step has taken.
    """
    if twice := sorted(set(metrics) & set(own)):
        raise ValueError(f"`metrics` of the loss must have names of their own. Taken: {twice}.")
    return {prefix + name: value for name, value in {**metrics, **own}.items()}
