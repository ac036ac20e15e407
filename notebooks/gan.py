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
# # Two losses: a GAN
#
# A generator learns to draw points from a ring of eight clusters. A critic says how far its points are from the data, and is trained
# at the same time, five times as often. Each has a loss and an optimizer; `ol.together` makes one step of both.

# %%
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import optimize_loss as ol

STEPS, BATCH = 8000, 128

# %% [markdown]
# ## Data


# %%
def real(random, count):
    angles = 2 * np.pi * random.integers(8, size=count) / 8
    centres = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return (centres + 0.05 * random.standard_normal((count, 2))).astype(np.float32)


def batches(steps):
    random = np.random.default_rng(0)
    for _ in range(steps):
        yield real(random, BATCH)


# %% [markdown]
# ## Two networks in one tree of parameters


# %%
def init_net(random, sizes):
    layers = {}
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        kernel = random.standard_normal((n, m)) * np.sqrt(2 / n)
        layers[f"layer_{i}"] = {
            "kernel": kernel.astype(np.float32),
            "bias": np.zeros(m, np.float32),
        }
    return layers


def net(layers, x):
    *hidden, last = layers.values()
    for layer in hidden:
        x = jax.nn.leaky_relu(x @ layer["kernel"] + layer["bias"][None])
    return x @ last["kernel"] + last["bias"][None]


random = np.random.default_rng(1)
params = {
    "critic": init_net(random, (2, 64, 64, 1)),
    "generator": init_net(random, (8, 64, 64, 2)),
}

# %% [markdown]
# ## Two losses
#
# Both are functions of all parameters. The critic's is the difference of its mean over points that were drawn and over real ones.
# Where its slope is at most 1, the negative of that is at most the Wasserstein distance of the two (Arjovsky et al., 2017,
# https://arxiv.org/abs/1701.07875). There it is kept in a box; here a penalty pulls its slope to 1 between the two, which
# trains faster (Gulrajani et al., 2017, https://arxiv.org/abs/1704.00028).


# %%
def draw(params, key, count):
    return net(params["generator"], jax.random.normal(key, (count, 8)))


def critic_loss(params, x, *, key):
    key, between = jax.random.split(key)
    fake = draw(params, key, len(x))
    mix = jax.random.uniform(between, (len(x), 1))
    slopes = jax.vmap(jax.grad(lambda point: net(params["critic"], point[None])[0, 0]))
    norms = jnp.linalg.norm(slopes(mix * x + (1 - mix) * fake), axis=1)
    distance = net(params["critic"], x).mean() - net(params["critic"], fake).mean()
    penalty = jnp.mean((norms - 1) ** 2)
    return 0.1 * penalty - distance, ol.Aux(metrics={"distance": distance})


def generator_loss(params, x, *, key):
    return -net(params["critic"], draw(params, key, len(x))).mean()


# %% [markdown]
# ## One step of both
#
# The critic is trained in every step, the generator in every fifth. Each step takes one batch. `explain` tells which optimizer
# moves which parameter.

# %%
adam = ol.optimizers.Adam(2e-3, beta_1=0.5, beta_2=0.9)
step = ol.together(
    critic=ol.optimize_loss(critic_loss, optimizer=adam, variables="critic/**"),
    generator=ol.optimize_loss(generator_loss, optimizer=adam, variables="generator/**", ema=0.99),
    every={"generator": 5},
)
for row in step.explain(params).rows:
    print(f"{row.name:26} {row.moved_by}")

# %% [markdown]
# ## Training
#
# A hook draws points every thousand steps, from the average of the generator's parameters.

# %%
points = jax.jit(draw, static_argnums=2)
seen = {}


def look(state, metrics):
    seen[int(state.step)] = np.asarray(points(state.eval_params, jax.random.key(2), 1000))


state = step.init(params)
look(state, {})
state, metrics = step.run(
    state, batches(STEPS), steps_per_call=50, hooks=[ol.every(STEPS // 4, look)]
)
print({tag: value[-1] for tag, value in metrics.items() if "generator" in tag})

# %% [markdown]
# ## What came of it
#
# The generator's points move to the clusters. The distance, as the critic sees it, falls. In steps without its turn
# the generator has no loss: its metrics are NaN there.

# %%
figure, axes = plt.subplots(
    2, len(seen), figsize=(14, 5.6), layout="constrained", height_ratios=(3, 2)
)
data = real(np.random.default_rng(3), 1000)
for axis, (n, drawn) in zip(axes[0], seen.items(), strict=True):
    axis.plot(*data.T, ".", ms=2, color="0.75", label="data")
    axis.plot(*drawn.T, ".", ms=2, label="generator")
    axis.set(
        title=f"step {n}",
        xlabel="x",
        ylabel="y",
        xlim=(-1.6, 1.6),
        ylim=(-1.6, 1.6),
        aspect="equal",
    )
axes[0, 0].legend(loc="upper right", markerscale=4)
grid = axes[1, 0].get_gridspec()
for axis in axes[1]:
    axis.remove()
left, right = figure.add_subplot(grid[1, :3]), figure.add_subplot(grid[1, 3:])
left.plot(np.abs(metrics["critic/distance"]), lw=0.6)
left.set(title="critic", xlabel="step", ylabel="distance", yscale="log")
turns = np.flatnonzero(~np.isnan(metrics["generator/loss"]))
right.plot(turns + 1, metrics["generator/loss"][turns], lw=0.6)
right.set(title=f"generator: {len(turns)} updates", xlabel="step", ylabel="loss")
plt.show()

# %% [markdown]
# How near is it? For each point that was drawn, the distance to the nearest cluster; and how many points each cluster has.

# %%
centres = np.exp(2j * np.pi * np.arange(8) / 8)
drawn = seen[max(seen)] @ np.array([1, 1j])
apart = np.abs(drawn[:, None] - centres)
print(f"within 0.2 of a cluster: {np.mean(apart.min(1) < 0.2):.0%}")
print("points of each cluster:", np.bincount(apart.argmin(1), minlength=8))
