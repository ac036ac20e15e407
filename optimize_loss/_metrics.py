"""What a training step reports, under contrib's tags."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._checks import InvalidType, check_choice, received
from optimize_loss._names import leaf_names
from optimize_loss.schedules import evaluate
from optimize_loss.transforms import (
    Chain,
    ClipByAdaptiveNorm,
    DivideByDynamicLossScale,
    ObserveHistograms,
    ObserveNorm,
    ObserveNorms,
    ReduceOnPlateau,
)
from optimize_loss.transforms._guard import guard_of

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
      InvalidType: `summaries` is no list of names.
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
        links = {"gradient_norm": ObserveNorm(), **clip}
        if clip:
            links["clipped_gradient_norm"] = ObserveNorm()
    else:
        links = dict(clip)
    if "gradient_norm" in summaries:
        links["gradient_norms"] = ObserveNorms()
    if "gradients" in summaries:
        links["gradient_histograms"] = ObserveHistograms()
    return links


def read(chain: Chain, state: dict[str, Any]) -> dict[str, Any]:
    """Return what the observing links of a chain have put into its state, by contrib's tags.

    Scalars are arrays without dimensions, histograms pairs (counts, edges).
    """
    metrics: dict[str, Any] = {}
    for name in ("gradient_norm", "clipped_gradient_norm"):
        if name in state:
            metrics[f"global_norm/{name}"] = state[name]["norm"]
    if "gradient_norms" in state:
        norms = state["gradient_norms"]["norm"]
        metrics |= _by_name("gradient_norm", norms, jax.tree.leaves(norms))
    if "gradient_histograms" in state:
        counts, edges = (state["gradient_histograms"][slot] for slot in ("counts", "edges"))
        pairs = zip(jax.tree.leaves(counts), jax.tree.leaves(edges), strict=True)
        metrics |= _by_name("gradients", counts, pairs)
    if guard := guard_of(chain.links):
        metrics |= {n: state[guard[0]][n] for n in ("skipped", "skipped_in_a_row")}
    for name, link in chain.links:
        if isinstance(link, ReduceOnPlateau):
            metrics["plateau_scale"] = state[name]["scale"]
        if isinstance(link, DivideByDynamicLossScale):  # of several, all that they divide by
            scale = state[name]["loss_scale"]
            metrics["loss_scale"] = scale * metrics.get("loss_scale", 1)
    if "loss_mean" in state:
        metrics["loss/mean"] = state["loss_mean"]["mean"]
    for name, _ in chain.links:
        link = chain.link(name)
        if isinstance(link, ClipByAdaptiveNorm) and link.report_summary:
            metrics["global_norm/adaptive_max_gradient_norm"] = state[name]["max_norm"]
    return metrics


def rates(chain: Chain, state: dict[str, Any], step: jax.Array, given: Any) -> dict[str, Any]:
    """Return the learning rate of this step: one for each link that has one, where several do.

    Args:
      chain: the links.
      state: their state, before the step.
      step: the global step.
      given: the rate that the optimizer was made with; reported where no link has one, as an
        optax transformation does not tell its rate.
    """
    found = chain.numbers_named("learning_rate", state, step)
    if len(found) > 1:
        return {f"learning_rate/{name}": rate for name, rate in found.items()}
    if found:
        return {"learning_rate": next(iter(found.values()))}
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


def _by_name(tag: str, tree: Any, values: Any) -> dict[str, Any]:
    return {f"{tag}/{name}": value for name, value in zip(leaf_names(tree), values, strict=True)}
