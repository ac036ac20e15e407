# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Inside a step
#
# Under `optimize_loss` lies a chain of links. This page takes one apart: which links there are, where their numbers are kept,
# and why the whole chain is one pass over the parameters.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import optimize_loss as ol
from optimize_loss import transforms as t

# %% [markdown]
# ## Links
#
# Each option becomes a link with a name. The gradients pass them in this order.

# %%
step = ol.optimize_loss(
    lambda p, x: jnp.mean((x @ p["kernel"] + p["bias"][None] - 1) ** 2),
    learning_rate=0.1,
    gradient_noise_scale=1e-3,
    gradient_multipliers={"bias": 2.0},
    clip_gradients=1.0,
)
for name, link in step.chain.links:
    print(f"{name:22} {link}")

# %% [markdown]
# A link is a value: a frozen dataclass, equal to any other with the same fields. A wrong field fails where it is written.

# %%
print(t.ClipByGlobalNorm(1.0) == t.ClipByGlobalNorm(1.0))
try:
    t.ClipByGlobalNorm(-1.0)
except ValueError as error:
    print(error)

# %% [markdown]
# ## Numbers
#
# What a link needs is in the state: its hyperparameters as numbers, its memory for each parameter as slots. All is named.

# %%
state = step.init({"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)})
for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    print(f"{name:45} {leaf.dtype}{list(leaf.shape)}")

# %% [markdown]
# As they are state, nothing that is a number is part of the program. A step is traced once; `set` changes what it reads. Where
# two links have a number of one name, the name of the link stands before it.

# %%
traces = []


def counted(params, x):
    traces.append("traced")
    return jnp.mean((x @ params["w"]) ** 2)


counting = ol.optimize_loss(counted, learning_rate=0.1, clip_gradients=1.0)
run = counting.init({"w": jnp.ones(3)})
for rate in (0.1, 0.01, 0.001):
    run, metrics = counting(run.set(learning_rate=rate, max_norm=10 * rate), jnp.ones((4, 3)))
print(f"traced {len(traces)} time for three rates")
assert len(traces) == 1

# %% [markdown]
# ## What a link does to a gradient
#
# Every chain is also an optax transformation: `init` and `update`. So a link can be looked at by itself. Here the
# gradients of 10000 parameters, from a distribution with heavy tails, pass a clip by value, the rule of Adam and that of
# Lion: this is the tenth update.

# %%
random = np.random.default_rng(0)
gradients = [{"w": jnp.asarray(random.standard_t(2, size=10_000), jnp.float32)} for _ in range(10)]
params = {"w": jnp.zeros(10_000)}
chains = {
    "as they are": None,
    "ClipByValue(3.0)": t.chain(clip=t.ClipByValue(3.0)),
    "ScaleByAdam()": t.chain(adam=t.ScaleByAdam()),
    "ScaleByLion()": t.chain(lion=t.ScaleByLion()),
}
figure, panels = plt.subplots(1, 4, figsize=(12, 3.2), layout="constrained", sharey=True)
for axes, (name, tx) in zip(panels, chains.items(), strict=True):
    updates, state = gradients[-1], tx and tx.init(params)
    for gradient in gradients if tx else ():
        updates, state = tx.update(gradient, state, params)
    axes.hist(np.clip(updates["w"], -6, 6), bins=np.linspace(-6.1, 6.1, 62), log=True)
    axes.set(title=name, xlabel="entry, cut at ±6", ylabel="entries", xlim=(-6.3, 6.3))
plt.show()

# %% [markdown]
# ## One pass
#
# Link by link, each would read and write every parameter. A chain computes numbers of the whole tree first (the norm that a
# clip needs), then scalars once, then runs one function per parameter with all links in it. `apply` also adds the update to the
# parameter there. XLA says what that saves: `temp` is memory that is needed besides parameters, gradients and slots.

# %%
import optax

size = 1_000_000
params = {"w": jnp.zeros(size)}  # gradients are alike
ours = t.chain(clip=t.ClipByGlobalNorm(1.0), adam=t.ScaleByAdam(), rate=t.ScaleByLearningRate(1e-3))
theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))


def update_ours(grads, params, state):
    return ours.apply(grads, state, params)


def update_theirs(grads, params, state):
    updates, state = theirs.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def temporary(update, tx):
    """Return the bytes a parameter that XLA allocates for an update."""
    program = jax.jit(update, donate_argnums=(1, 2))
    compiled = program.lower(params, params, tx.init(params)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / size


bytes_of = {
    "optimize_loss": temporary(update_ours, ours),
    "optax": temporary(update_theirs, theirs),
}
print({name: f"{value:.2f} bytes a parameter" for name, value in bytes_of.items()})

figure, axes = plt.subplots(figsize=(6, 1.6), layout="constrained")
bars = axes.barh(list(bytes_of), list(bytes_of.values()), color=["#0072B2", "#E69F00"])
axes.bar_label(bars, fmt="{:.2f}", padding=3)
axes.set(xlabel="temporary memory of an update (bytes a parameter)", ylabel="library", xlim=(0, 5))
plt.show()

# %% [markdown]
# ## Small parameters share an array
#
# A hundred biases would be a hundred arguments, and as many small loops. The state keeps them, with their slots, in one array.
# `state.params` shows your tree; `state.packed_params` what the step takes.

# %%
many = {f"layer_{i}": {"bias": jnp.zeros(16), "scale": jnp.ones(16)} for i in range(50)}
step = ol.optimize_loss(
    lambda p: sum(jnp.sum((v["bias"] + v["scale"]) ** 2) for v in p.values()), learning_rate=0.1
)
state = step.init(many)
shown = [len(jax.tree.leaves(tree)) for tree in (state.params, state.optimizer)]
kept = [len(jax.tree.leaves(tree)) for tree in state.packed]
print(f"parameters: {shown[0]} shown, {kept[0]} kept; optimizer: {shown[1]} shown, {kept[1]} kept")

figure, axes = plt.subplots(figsize=(6, 2.2), layout="constrained")
for offset, (label, counts) in zip(
    (-0.2, 0.2), {"shown": shown, "kept": kept}.items(), strict=True
):
    bars = axes.barh(np.arange(2) + offset, counts, 0.38, label=label)
    axes.bar_label(bars, padding=3)
axes.set_yticks([0, 1], ["params", "optimizer"])
axes.set(xlabel="arrays", ylabel="part of the state", xlim=(0, 1.15 * max(shown)))
axes.legend()
plt.show()

# %% [markdown]
# ## Gates
#
# Some links decide whether the links behind them run at all: a guard against bad batches, the sum over several batches. Where
# a gate is shut, parameters, slots and the count of updates stay.

# %%
step = ol.optimize_loss(
    lambda p, x: p["w"] * x, learning_rate=1.0, optimizer="SGD", skip="nonfinite", accumulate=2
)
state = step.init({"w": 0.0})
rows = []
for x in (1.0, 3.0, float("nan"), 2.0, 2.0):
    state, metrics = step(state, x)
    rows.append((x, float(state.params["w"]), int(state.step), int(metrics["skipped"])))
    print("batch {}: w = {}, {} updates, {} skipped".format(*rows[-1]))
assert rows[-1][1:] == (-4.0, 2, 1)
