"""What is compiled: a step of ours, and the step that does the same, written by hand with optax."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optimize_loss as ol
from benchmarks._losses import cross_entropy, digits, transformer
from optimize_loss import transforms as t

Params = dict[str, Any]
RATE, DECAY, CLIP = 1e-3, 1e-2, 1.0


@jax.custom_vjp
def given(params: Params, grads: Params) -> jax.Array:
    """A loss whose gradients are given, and cost nothing: what is left of a step is the update."""
    return jnp.zeros(())


given.defvjp(lambda params, grads: (jnp.zeros(()), grads), lambda grads, _: (grads, None))


@dataclasses.dataclass(frozen=True)
class Model:
    """Parameters and a batch, as shapes, and their loss; `given` takes gradients for a batch."""

    params: Callable[[], Params]
    loss: Callable[..., jax.Array] = given
    batch: Callable[[], tuple[Any, ...]] | None = None

    def batches(self) -> tuple[Any, ...]:
        return (self.params(),) if self.batch is None else self.batch()


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
      model: what is trained.
      ours: the options of `optimize_loss`.
      optax: the transformation that does the same.
      layout: "replicated", "zero1" or "fsdp"; of parameters and slots on several devices.
      after: what the step by hand does beside the update: `(params, grads) -> metrics`.
      many: how many steps a call, or None for a single step.
      closed: whether conditions usually go the cheap way, as between updates of an accumulation.
    """

    model: Model
    ours: Mapping[str, Any]
    optax: Callable[[], optax.GradientTransformation]
    layout: str = "replicated"
    after: Callable[[Params, Params], Any] | None = None
    many: int | None = None
    closed: bool = False


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def leaves(count: int, *shape: int) -> Callable[[], Params]:
    return lambda: {f"p{i:03}": array(*shape) for i in range(count)}


FOUR = Model(leaves(4, 1250, 2000))  # 1e7 parameters
SIXTEEN = Model(leaves(16, 512, 768))  # 6.3e6
MATRICES = Model(leaves(12, 512, 512))
PARTED = Model(leaves(24, 512, 512))  # for eight devices


def _mlp(*sizes: int) -> Params:
    weights = {f"w{i}": array(*sizes[i : i + 2]) for i in range(3)}
    return weights | {f"b{i}": array(sizes[i + 1]) for i in range(3)}


MLP = Model(
    lambda: _mlp(64, 128, 128, 10), digits, lambda: (array(64, 64), array(64, dtype=jnp.int32))
)
WIDE = Model(  # 5.3e6, with a batch that is spread over the devices
    lambda: _mlp(512, 2048, 2048, 16), digits, lambda: (array(64, 512), array(64, dtype=jnp.int32))
)


def _transformer(layers: int, width: int, dtype: Any = jnp.float32) -> Params:
    def a(*shape: int) -> jax.ShapeDtypeStruct:
        return array(*shape, dtype=dtype)

    params = {"embed": a(64, width), "scale": a(width), "shift": a(width)}
    for i in range(layers):
        params |= {f"{i}/{name}": a(width, width) for name in ("q", "k", "v", "out")}
        params |= {f"{i}/up": a(width, 4 * width), f"{i}/down": a(4 * width, width)}
        params |= {f"{i}/up_bias": a(4 * width), f"{i}/down_bias": a(width)}
        params |= {f"{i}/{n}_{j}": a(width) for n in ("scale", "shift") for j in (1, 2)}
    return params


def of_transformer(layers: int, width: int, dtype: Any = jnp.float32) -> Model:
    tokens = array(8, 65, dtype=jnp.int32)
    return Model(lambda: _transformer(layers, width, dtype), transformer, lambda: (tokens,))


def _scanned(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    def layer(x: jax.Array, p: Params) -> tuple[jax.Array, None]:
        hidden = jax.nn.gelu(x @ p["up"] + p["up_bias"])
        return x + hidden @ p["down"] + p["down_bias"], None

    x, _ = jax.lax.scan(layer, x, {n: params[n] for n in ("up", "up_bias", "down", "down_bias")})
    return cross_entropy(x @ params["head"], y)


def _stacked(layers: int = 4, width: int = 64) -> Params:
    wide = 4 * width
    matrices = {"up": array(layers, width, wide), "down": array(layers, wide, width)}
    biases = {"up_bias": array(layers, wide), "down_bias": array(layers, width)}
    return {**matrices, **biases, "head": array(width, 64)}


SCANNED = Model(_stacked, _scanned, lambda: (array(64, 64), array(64, dtype=jnp.int32)))
TINY = Model(
    leaves(300, 8, 8),
    lambda params, x: sum((jnp.sum(jnp.sin(p * x)) for p in params.values()), jnp.zeros(())),
    lambda: (array(),),
)


def _convnet(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    for i in range(3):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, params[f"k{i}"], (2, 2), "SAME", None, None, numbers)
        x = jax.nn.relu(x + params[f"b{i}"])
    return cross_entropy(x.mean((1, 2)) @ params["head"], y)


def _kernels() -> Params:
    sizes = (3, 32, 64, 128)
    kernels = {f"k{i}": array(3, 3, *sizes[i : i + 2]) for i in range(3)}
    biases = {f"b{i}": array(sizes[i + 1]) for i in range(3)}
    return {**kernels, **biases, "head": array(128, 10)}


CONVNET = Model(_kernels, _convnet, lambda: (array(32, 32, 32, 3), array(32, dtype=jnp.int32)))


def adamw(clip: bool = True) -> Callable[[], optax.GradientTransformation]:
    rule = optax.adamw(RATE, weight_decay=DECAY)
    return lambda: optax.chain(optax.clip_by_global_norm(CLIP), rule) if clip else rule


def averaging(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """Return a transformation that also keeps the average of the parameters, as users write it."""

    def init(params: Any) -> Any:
        return tx.init(params), jax.tree.map(jnp.zeros_like, params)

    def update(updates: Any, state: Any, params: Any = None, **rest: Any) -> Any:
        updates, inner = tx.update(updates, state[0], params)
        new = optax.apply_updates(params, updates)
        return updates, (inner, optax.incremental_update(new, state[1], 1 - decay))

    return optax.GradientTransformation(init, update)


def chain(**links: Any) -> dict[str, Any]:
    """Return the options of a step with these links, which reports the loss alone."""
    return {"learning_rate": RATE, "optimizer": t.chain(**links), "summaries": ["loss"]}


ADAMW = chain(adam=t.ScaleByAdam(epsilon=1e-8), decay=t.AddWeightDecay(DECAY))
CLIPPED = {**ADAMW, "clip_gradients": CLIP}


def _norms(params: Params, grads: Params) -> Any:
    trees = {"norm": grads, "param_norm": params}
    return {name: jax.tree.map(jnp.linalg.norm, tree) for name, tree in trees.items()}


def _whole(model: Model, layout: str = "replicated") -> Case:
    return Case(model, CLIPPED, adamw(), layout)


UPDATES = {
    "AdamW": Case(FOUR, ADAMW, adamw(clip=False)),
    "AdamW, clip": _whole(FOUR),
    "SGD, momentum": Case(
        FOUR, chain(momentum=t.ScaleByMomentum(0.9)), lambda: optax.sgd(RATE, 0.9)
    ),
    "Lion": Case(
        FOUR,
        chain(lion=t.ScaleByLion(), decay=t.AddWeightDecay(DECAY)),
        lambda: optax.lion(RATE, weight_decay=DECAY),
    ),
    "LAMB": Case(
        SIXTEEN,
        {"optimizer": ol.optimizers.Lamb(RATE), "summaries": ["loss"]},
        lambda: optax.lamb(RATE),
    ),
    "Adafactor": Case(
        SIXTEEN,
        {"optimizer": ol.optimizers.Adafactor(RATE), "summaries": ["loss"]},
        lambda: optax.adafactor(RATE),
    ),
    "Muon": Case(
        MATRICES,
        {"optimizer": ol.optimizers.Muon(RATE), "summaries": ["loss"]},
        lambda: optax.contrib.muon(RATE),
    ),
    "bfloat16": Case(FOUR, {**ADAMW, "precision": "bfloat16"}, adamw(clip=False)),
    "float8": Case(FOUR, {**ADAMW, "precision": "float8"}, adamw(clip=False)),
    "noise": Case(
        FOUR,
        {**ADAMW, "gradient_noise_scale": 1e-3},
        lambda: optax.chain(optax.add_noise(1e-6, 0.0, jax.random.key(0)), adamw(clip=False)()),
    ),
    "guard": Case(
        FOUR,
        {**ADAMW, "skip": "nonfinite"},
        lambda: optax.apply_if_finite(adamw(clip=False)(), 10),
    ),
    "accumulate": Case(
        FOUR,
        {**ADAMW, "accumulate": 4},
        lambda: optax.MultiSteps(adamw(clip=False)(), 4).gradient_transformation(),
        closed=True,
    ),
    "ema": Case(FOUR, {**ADAMW, "ema": 0.999}, lambda: averaging(adamw(clip=False)(), 0.999)),
    "all summaries": Case(
        SIXTEEN,
        {**ADAMW, "summaries": list(ol.OPTIMIZER_SUMMARIES)},
        adamw(clip=False),
        after=_norms,
    ),
}
STEPS = {
    "MLP": _whole(MLP),
    "MLP, many": Case(MLP, CLIPPED, adamw(), many=10),
    "transformer 4 × 64": _whole(of_transformer(4, 64)),
    "transformer 4 × 256": _whole(of_transformer(4, 256)),
    "transformer 8 × 512": _whole(of_transformer(8, 512)),
    "transformer 4 × 256, bfloat16": _whole(of_transformer(4, 256, jnp.bfloat16)),
    "layers in a scan": _whole(SCANNED),
    "300 tiny leaves": _whole(TINY),
    "convnet": _whole(CONVNET),
}
EIGHT = {
    f"{name}, {layout}": Case(PARTED, ours, made, layout)
    for layout in ("replicated", "zero1", "fsdp")
    for name, ours, made in (
        ("AdamW, clip", CLIPPED, adamw()),
        ("LAMB", UPDATES["LAMB"].ours, UPDATES["LAMB"].optax),
        ("Lion", UPDATES["Lion"].ours, UPDATES["Lion"].optax),
    )
}
EIGHT |= {f"MLP, {layout}": _whole(WIDE, layout) for layout in ("replicated", "zero1", "fsdp")}
CASES = {1: UPDATES | STEPS, 8: EIGHT}


def entries(case: Case) -> int:
    """Return the number of parameters."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(case.model.params()))
