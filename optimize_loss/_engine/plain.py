"""What a chain means: link after link, parameter after parameter, with nothing shared.

This is the specification of `passes`, which does the same in one pass over the parameters. Tests
compare the two for every link. Parameters are float32 or wider, by name; no slots are encoded, and
no batch has a weight of 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from optimize_loss._engine.by_name import acts_on, by_numbers
from optimize_loss._engine.chain import Chain
from optimize_loss._engine.health import health
from optimize_loss._engine.kinds import Gate
from optimize_loss._engine.link import Link, Numbers, TreeLink, functions_of
from optimize_loss._engine.numbers import judged, numbers_at
from optimize_loss._engine.plan import lender, parts
from optimize_loss._engine.precision import keys
from optimize_loss._engine.selection import ForParameters, linked
from optimize_loss._engine.trees import Owner

Trees = dict[str, Any]


def plain(
    chain: Chain, updates: Trees, state: Trees, params: Trees, loss: Any = None, weight: Any = None
) -> tuple[Trees, Trees]:
    """Return the new parameters and the new state."""
    entries, new = dict(chain.links), dict(state)
    ours = {n: x for n, x in linked(entries) if isinstance(x, Link)}
    numbers = numbers_at(ours, state, state["step"])
    moved: Trees = {name: jnp.zeros_like(p) for name, p in params.items()}
    late: list[tuple[str, Link, dict[str, Numbers]]] = []
    for name, entry in entries.items():
        link = entry.link if isinstance(entry, ForParameters) else entry
        here = {n: p + moved[n] for n, p in params.items()}
        if not isinstance(link, Link):
            update: Any = optax.with_extra_args_support(link).update
            updates, new[name] = update(updates, state[name], here, value=loss)
            continue
        own = {n: updates[n] for n in _meant(entry, params)}
        total = _total(chain, name, link, own, state, numbers, (loss, weight))
        memory, slots = parts(link, state[name])[1:]
        ks: dict[str, Numbers] = {}
        k, old = dict[str, Any](), memory
        for names, mine in by_numbers(link, [*own], numbers[name]):
            k, memory = link.scalars(mine, old, total, state["step"])
            ks |= zip(names, _each(link, names, k, state["step"], params), strict=True)
        new[name] = {**state[name], **memory}
        if isinstance(link, TreeLink):
            changed, slots = link.run(own, slots, here, k)
            own = dict(changed)
            new[name] |= slots
        if "before" in functions_of(type(link)):
            moved |= {n: moved[n] + link.before(here[n], ks[n]) for n in own}
            here |= {n: params[n] + moved[n] for n in own}
        if "after" in functions_of(type(link)):
            late.append((name, link, ks))
        elif not isinstance(link, TreeLink):
            for n in own:
                mine = {slot: tree[n] for slot, tree in slots.items()}
                own[n], mine = link.leaf(own[n], mine, here[n], ks[n])
                _put(new[name], n, mine)
        updates = {**updates, **own}
        if isinstance(link, Gate):
            if not k["open"]:
                return params, new
            factor, loss = link.behind(k), k.get("loss_behind", loss)
            updates = updates if factor is None else {n: u * factor for n, u in updates.items()}
    moved = {n: moved[n] + update for n, update in updates.items()}
    for name, link, ks in late:
        for n, k in ks.items():
            mine = {slot: tree[n] for slot, tree in parts(link, state[name]).slots.items()}
            moved[n], mine = link.after(params[n], moved[n], mine, k)
            _put(new[name], n, mine)
    new["step"] = optax.safe_increment(state["step"])
    return {n: p + moved[n] for n, p in params.items()}, new


def _meant(entry: Any, params: Trees) -> list[str]:
    """Return the names of the parameters that a link is for."""
    link, names = entry, [*params]
    if isinstance(entry, ForParameters):
        link, marks = entry.link, entry.takes(names, [*params.values()])
        names = [name for name, takes in zip(names, marks, strict=True) if takes]
    return [name for name, acts in zip(names, acts_on(link, names), strict=True) if acts]


def _total(
    chain: Chain, name: str, link: Link, updates: Trees, state: Trees, numbers: Any, loss: Any
) -> Any:
    """Return what a link needs of the whole tree."""
    norm = jnp.sqrt(sum(jnp.sum(jnp.abs(u) ** 2) for u in updates.values()))
    match link.needs:
        case "global_norm":
            return norm
        case "finite":
            return jnp.array([jnp.isfinite(u).all() for u in updates.values()]).all()
        case "health":
            ours = {n: x for n, x in linked(dict(chain.links)) if isinstance(x, Link)}
            owners = [Owner((n,), None) for n in updates]
            return health(norm, loss, [*updates.values()], owners, judged(ours, numbers, state))
        case "learning_rate":
            return numbers[lender(dict(chain.links), name, "learning_rate")]["learning_rate"]
        case "loss":
            return loss[0]
        case "loss_and_weight":
            return loss


def _each(link: Link, names: Sequence[str], k: Numbers, step: Any, params: Trees) -> list[Numbers]:
    """Return what a link needs for each parameter."""
    found: list[Numbers] = [{**k, **own} for own in link.for_each(names, k)]
    if link.needs == "stored_param":
        return [{**own, "stored": params[n]} for n, own in zip(names, found, strict=True)]
    if link.needs == "random_bits":
        draws = keys([Owner((n,), None) for n in names], "", k["seed"], step)
        found = [{**own, "draw": draw} for own, draw in zip(found, draws, strict=True)]
    return found


def _put(state: Trees, name: str, slots: Mapping[str, Any]) -> None:
    """Put the slots of one parameter into the state of a link."""
    for slot, value in slots.items():
        state[slot] = {**state[slot], name: value}
