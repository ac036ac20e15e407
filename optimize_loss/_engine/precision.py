"""The form in which links store their moments: float32, or 16 or 8 bits.

Links compute in float32 and do not depend on this. They name their moments; if a chain has a
`Precision`, the pass decodes these before the leaf function and encodes them after it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from optimize_loss._checks import SEED as SEED_RULE
from optimize_loss._checks import InvalidType, check_choice, check_integer, received
from optimize_loss._engine.bits import (
    HALF,
    block_scales,
    float_of,
    from_e4m3,
    spread,
    to_bfloat16,
    to_e4m3,
)
from optimize_loss._engine.link import Link, TreeLink
from optimize_loss._engine.members import Members
from optimize_loss._engine.trees import Params
from optimize_loss._names import Pattern, check_pattern, first_matches
from optimize_loss._random import quick_bits, streams

FORMATS = ("float32", "bfloat16", "float8")
SMALL = 4096  # entries up to which what is asked for in 8 bits has 16

Key = tuple[jax.Array, jax.Array]
Slots = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Precision:
    """The precision of stored moments and parameters: an option of `optimize_loss` and of chains.

    All arithmetic is in float32; the precision only affects the arrays that are stored between
    updates.

    - "bfloat16": two moments, such as Adam's m and v, share a uint32 array, a single one is
      uint16: half the memory. They are rounded stochastically, so slowly decaying means stay
        unbiased; the update reads the stored values.
    - "float8": a quarter. A moment is an e4m3 number, that of squares its root, with a scale for
      every 256 entries in C order; two share a uint16 array. They are rounded to nearest, and the
      update reads them before rounding. Parameters of at most 4096 entries use "bfloat16". Infinity
      or NaN turns its block into NaN.
    - "float32": as without this option.

    Complex and float64 moments do not change; neither do other slots, such as averages of
    parameters, and sums. If a block of 256 entries is sharded over several devices, they exchange
    its entries.

    The random bits are a function of the seed, the names of the parameter and the link, the number
    of updates made and the index of the entry. They do not depend on other parameters, devices or
    calls.

    Args:
      state: a format for all moments; or {pattern: format}, of which the first pattern that matches
        a parameter decides.
      params: how to round parameters of 16 bits or fewer: stochastically, which is right on
        average, or to nearest, which loses updates of less than half a unit in the last place.
        Other parameters are not affected.
      seed: the seed of the random bits, an integer in [0, 2**32); None for that of `optimize_loss`,
        or 0. It is compiled into the program.
      rest: the format of parameters that no pattern of `state` matches.

    Raises:
      InvalidType: an argument is of the wrong kind.
      ValueError: a format is unknown.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> step = ol.optimize_loss(lambda p, x: jnp.sum(p["w"] * x), learning_rate=0.1,
      ...                         precision=ol.Precision({"w": "bfloat16"}))
      >>> state, _ = step(step.init({"w": jnp.zeros(3)}), jnp.ones(3))
      >>> state.optimizer["adam"]["m+v_bf16"]["w"].dtype
      dtype('uint32')

    References:
      P. Zamirai et al., "Revisiting BFloat16 Training", 2021, https://arxiv.org/abs/2010.06192;
      T. Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022,
      https://arxiv.org/abs/2110.02861.
    """

    state: Any = "bfloat16"
    params: Literal["stochastic", "nearest"] = "stochastic"
    seed: int | None = None
    rest: str = "float32"

    def __post_init__(self):
        if not isinstance(self.state, str):
            object.__setattr__(self, "state", _pairs(self.state))
        for _, name in self.by_pattern:
            check_choice("state", name, FORMATS)
        check_choice("rest", self.rest, FORMATS)
        check_choice("params", self.params, ["stochastic", "nearest"])
        if self.seed is not None:
            object.__setattr__(self, "seed", check_integer("seed", self.seed, SEED_RULE))

    @property
    def by_pattern(self) -> tuple[tuple[Pattern, str], ...]:
        """The formats by pattern."""
        return (("**", self.state),) if isinstance(self.state, str) else self.state

    def formats(self, params: Params) -> list[str]:
        """Return the format for each leaf; those in a bucket have one in common.

        Raises:
          ValueError: a pattern decides for no parameter.
        """
        if isinstance(self.state, str):
            chosen = dict.fromkeys(params.each()[0], self.state)
        else:
            names, found = params.each()[0], dict(self.state)
            first = first_matches("precision", found, names)
            pairs = zip(names, first, strict=True)
            chosen = {n: self.rest if p is None else found[p] for n, p in pairs}
        sizes = [x.size if b is None else b.sizes[0] for x, b in _leaves(params)]
        asked = [chosen[members[0]] for members in params.members]
        small = {"float8": "bfloat16"}
        return [small.get(a, a) if n <= SMALL else a for a, n in zip(asked, sizes, strict=True)]


def check_precision(precision: Any, seed: int) -> Precision | None:
    """Return an option `precision`, with the seed of `optimize_loss` unless it has its own.

    Raises:
      InvalidType: it is no name of a format and no `Precision`.
      ValueError: the name is unknown.
    """
    if isinstance(precision, str):
        check_choice("precision", precision, FORMATS)
        precision = None if precision == "float32" else Precision(precision)
    if precision is None:
        return None
    if not isinstance(precision, Precision):
        raise InvalidType(
            f"`precision` must be one of {list(FORMATS)}, or a `Precision`. "
            f"{received('precision', precision)}"
        )
    return precision if precision.seed is not None else dataclasses.replace(precision, seed=seed)


def _pairs(state: Any) -> tuple[tuple[Pattern, str], ...]:
    """Return a mapping, or pairs, as pairs of a pattern and a text."""
    items = tuple(state.items()) if isinstance(state, Mapping) else state
    if not isinstance(items, tuple) or not all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], str) for pair in items
    ):
        raise InvalidType(
            f"`state` must be one of {list(FORMATS)}, or map patterns to them. "
            f"{received('state', state)}"
        )
    return tuple((check_pattern("a key of state", pattern), name) for pattern, name in items)


def _leaves(params: Params) -> Any:
    return zip(params.leaves, params.buckets, strict=True)


@dataclasses.dataclass(frozen=True)
class Codec:
    """How a link's moments of one parameter become the arrays that are stored, and back.

    Attributes:
      groups: slots that share an array, one or two; (name, whether it is of squares) of each.
      by_entry: whether an entry is stored independently of others.
      shows_stored: whether updates are made of the new slots as they are stored.
    """

    groups: tuple[tuple[tuple[str, bool], ...], ...]
    by_entry: ClassVar[bool] = True
    shows_stored: ClassVar[bool] = False

    @property
    def moments(self) -> list[str]:
        """The slots that are encoded."""
        return [name for group in self.groups for name, _ in group]

    def encoded(self, slots: Slots, key: Key | None = None) -> dict[str, jax.Array]:
        """Return all slots as they are stored; rounded to nearest without a key."""
        stored = {name: x for name, x in slots.items() if name not in self.moments}
        for i, group in enumerate(self.groups):
            name = "+".join(name for name, _ in group)
            parts = [slots[part] for part, _ in group]
            stored |= self._join(name, parts, [s for _, s in group], _each(key, i))
        return stored

    def decoded(self, stored: Slots) -> dict[str, jax.Array]:
        """Return all slots as the link has them."""
        slots = dict(stored)
        for group in self.groups:
            name = "+".join(name for name, _ in group)
            parts = self._split(name, slots, [s for _, s in group])
            slots |= zip((name for name, _ in group), parts, strict=True)
        return slots

    def _join(self, name: str, parts: list[jax.Array], squares: list[bool], key: Any) -> Any:
        raise NotImplementedError

    def _split(self, name: str, slots: dict[str, jax.Array], squares: list[bool]) -> Any:
        raise NotImplementedError


class BFloat16(Codec):
    """Moments as bfloat16, rounded stochastically."""

    shows_stored = True

    def _join(self, name, parts, squares, key):
        shape = parts[0].shape
        random = jnp.uint32(HALF << 16 | HALF)
        random = random if key is None else quick_bits(key, shape)
        upper = to_bfloat16(parts[0], random & jnp.uint32(0xFFFF))
        if len(parts) == 1:
            return {f"{name}_bf16": (upper >> jnp.uint32(16)).astype(jnp.uint16)}
        lower = to_bfloat16(parts[1], random >> jnp.uint32(16))
        both = (upper & jnp.uint32(0xFFFF0000)) | (lower >> jnp.uint32(16))
        return {f"{name}_bf16": both}

    def _split(self, name, slots, squares):
        bits = slots.pop(f"{name}_bf16").astype(jnp.uint32)
        lower = float_of(bits << jnp.uint32(16))
        if len(squares) == 1:
            return [lower]
        return [float_of(bits & jnp.uint32(0xFFFF0000)), lower]


class Float8(Codec):
    """Moments as e4m3 in blocks with a scale; squares as their roots."""

    by_entry = False

    def _join(self, name, parts, squares, key):
        roots = [jnp.sqrt(x) if s else x for x, s in zip(parts, squares, strict=True)]
        scales = [block_scales(x) for x in roots]
        codes = [
            to_e4m3(x / spread(s, x)).astype(jnp.uint16) for x, s in zip(roots, scales, strict=True)
        ]
        both = codes[0].astype(jnp.uint8)
        if len(codes) == 2:
            both = codes[0] << jnp.uint16(8) | codes[1]
        return {f"{name}_f8": both, f"{name}_scale": jnp.stack(scales)}

    def _split(self, name, slots, squares):
        both = slots.pop(f"{name}_f8").astype(jnp.uint32)
        scales = slots.pop(f"{name}_scale")
        shifts = [jnp.uint32(8), jnp.uint32(0)][-len(squares) :]
        roots = [
            from_e4m3(both >> shift & jnp.uint32(0xFF)) * spread(scale, both)
            for shift, scale in zip(shifts, scales, strict=True)
        ]
        return [x * x if s else x for x, s in zip(roots, squares, strict=True)]


_CODECS = {"bfloat16": BFloat16, "float8": Float8}


@functools.lru_cache(maxsize=1024)
def codec_for(link: Link, form: str, shape: tuple[int, ...], dtype: Any) -> Codec | None:
    """Return the codec for the moments of a link that are float32 like the parameter."""
    if form not in _CODECS:
        return None
    slots = jax.eval_shape(link.slots, jax.ShapeDtypeStruct(shape, dtype))
    found = [
        (name, name in link.squares)
        for name, slot in slots.items()
        if name in (*link.means, *link.squares) and (slot.shape, slot.dtype) == (shape, jnp.float32)
    ]
    pairs = tuple(tuple(found[i : i + 2]) for i in range(0, len(found), 2))
    return _CODECS[form](pairs) if pairs else None


def codecs(
    link: Any, takes: Sequence[bool], formats: Sequence[str], params: Params
) -> tuple[Codec | None, ...]:
    """Return how a link's slots of each parameter are stored; None for as they are."""
    if isinstance(link, TreeLink) or not isinstance(link, Link):
        return (None,) * len(takes)
    return tuple(
        codec_for(link, form, x.shape, x.dtype) if mine and form != "float32" else None
        for x, mine, form in zip(params.leaves, takes, formats, strict=True)
    )


def check_used(precision: Precision | None, places: Sequence[Any], params: Params) -> None:
    """Raise a `ValueError` if a precision changes nothing of how these parameters are trained."""
    if precision is None:
        return
    active = [place for place in places if any(place.takes)]
    if active and not any(map(_acts, active)):
        raise ValueError(
            f"`precision` must have something to act on. Received: {precision!r}, for links "
            "without moments in float32 of these parameters, "
            f"{[place.name for place in places]}, and no parameter of 16 bits to round."
        )


def _acts(place: Any) -> bool:
    """Return whether slots of a link are encoded, or it rounds parameters."""
    return any(place.codecs) or getattr(place.link, "needs", None) == "random_bits"


def keys(
    owners: Sequence[tuple[tuple[str, ...], Members | None]], prefix: str, seed: Any, step: Any
) -> list[Key]:
    """Return for each leaf what keys the random bits of its entries.

    Args:
      owners: for each leaf the names of the parameters in it, and the bucket if it is one.
      prefix: a prefix of the names; each prefix has its own bits.
      seed: an integer below 2**32, or a uint32.
      step: the number of updates made.
    """
    names = [prefix + name for members, _ in owners for name in members]
    first, second = streams(jnp.asarray(seed, jnp.uint32), names, step)
    found, start = [], 0
    for members, bucket in owners:
        if bucket is None:
            found.append((first[start], second[start]))
        else:
            sizes = np.array(bucket.sizes)
            own = slice(start, start + len(members))
            starts = (np.cumsum(sizes) - sizes).astype(np.uint32)
            which = np.repeat(np.arange(len(sizes)), sizes)
            found.append(((first[own] - starts)[which], second[own][which]))
        start += len(members)
    return found


def _each(key: Key | None, i: int) -> Key | None:
    """Return the key of the group of this number."""
    return None if key is None else (key[0], key[1] ^ jnp.uint32(i * 0x9E3779B9 % 2**32))
