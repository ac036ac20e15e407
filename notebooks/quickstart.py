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
# # Quickstart
#
# A loss and an optimizer become one compiled training step. Here a small network learns where two spirals lie. It takes a
# few seconds on a laptop, and needs `pip install 'optimize_loss[demo]'` for the pictures.

# %%
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import optimize_loss as ol

# %% [markdown]
# ## Data
#
# Two spirals of 500 points each, with a little noise. A label is 0 or 1.

# %%
random = np.random.default_rng(0)
labels = np.repeat([0.0, 1.0], 500).astype(np.float32)
angles = np.sqrt(random.uniform(size=1000)) * 3 * np.pi
radii = angles / (3 * np.pi)
turned = angles + np.pi * labels
points = np.stack([radii * np.cos(turned), radii * np.sin(turned)], axis=1)
points = (points + 0.015 * random.standard_normal(points.shape)).astype(np.float32)

# %% [markdown]
# ## A loss
#
# Any function of the parameters and a batch that returns a number. Parameters are any tree of arrays: here a dict.


# %%
def init_net(sizes, seed):
    random = np.random.default_rng(seed)
    return {
        f"layer_{i}": {
            "kernel": (random.standard_normal((n, m)) * np.sqrt(2 / n)).astype(np.float32),
            "bias": np.zeros(m, np.float32),
        }
        for i, (n, m) in enumerate(itertools.pairwise(sizes))
    }


def logits(params, x):
    *hidden, last = params.values()
    for layer in hidden:
        x = jax.nn.gelu(x @ layer["kernel"] + layer["bias"][None])
    return (x @ last["kernel"] + last["bias"][None])[:, 0]


def loss(params, x, y):
    z = logits(params, x)
    return jnp.mean(jax.nn.softplus(z) - y * z)  # cross-entropy, in nats


# %% [markdown]
# ## A step
#
# Everything that a step needs is one call. `init` gives the state before the first step: one tree with all that changes.

# %%
step = ol.optimize_loss(
    loss,
    learning_rate=ol.schedules.CosineDecay(
        0.0, decay_steps=900, warmup_target=1e-2, warmup_steps=100
    ),
    optimizer="AdamW",
    clip_gradients=1.0,
)
state = step.init(init_net([2, 64, 64, 1], seed=0))
print(step.explain(state.params, steps=1000))

# %% [markdown]
# `explain` says what will happen before anything does. It warns that AdamW decays the biases, and of a warm-up that begins
# at zero. Rules give parameters something of their own, by name:

# %%
schedule = ol.schedules.CosineDecay(1e-4, decay_steps=900, warmup_target=1e-2, warmup_steps=100)
step = ol.optimize_loss(
    loss,
    learning_rate=schedule,
    optimizer="AdamW",
    clip_gradients=1.0,
    rules={"**/bias": dict(weight_decay=0.0)},
)
state = step.init(init_net([2, 64, 64, 1], seed=0))
print(step.explain(state.params, steps=1000))

# %%
ol.plot.schedule(schedule, steps=1000)

# %% [markdown]
# ## Training
#
# `run` takes a batch a step from any iterable, several steps a call of the device, and returns the metrics of all.


# %%
def batches(seed):
    random = np.random.default_rng(seed)
    while True:
        chosen = random.integers(len(points), size=128)
        yield points[chosen], labels[chosen]


state, metrics = step.run(state, batches(1), steps=1000, steps_per_call=50)
right = (np.asarray(logits(state.params, points)) > 0) == (labels > 0.5)
print(f"step {state.step}, loss {metrics['loss'][-1]:.4f}, {right.mean():.1%} of the points right")
assert right.mean() > 0.97

# %% [markdown]
# `ol.plot` draws metrics, schedules, ratios of updates to weights, sweeps and range tests. Each returns a figure, which a
# notebook shows at the end of a cell.

# %%
ol.plot.metrics(metrics)

# %%
grid = np.stack(np.meshgrid(np.linspace(-1.2, 1.2, 200), np.linspace(-1.2, 1.2, 200)), axis=-1)
chance = jax.nn.sigmoid(logits(state.params, jnp.asarray(grid.reshape(-1, 2), jnp.float32)))
figure, axes = plt.subplots(figsize=(5.4, 4.4), layout="constrained")
shown = axes.imshow(
    chance.reshape(200, 200),
    extent=(-1.2, 1.2, -1.2, 1.2),
    origin="lower",
    cmap="RdBu",
    vmin=0,
    vmax=1,
)
axes.scatter(*points.T, c=labels, cmap="RdBu", edgecolors="white", linewidths=0.6, s=18)
axes.set(title="what the network says", xlabel="x (no unit)", ylabel="y (no unit)")
figure.colorbar(shown, label="probability of spiral 1")
plt.show()

# %% [markdown]
# ## Which rate?
#
# A range test raises the rate a little with each batch, until the loss diverges. It suggests a rate, and leaves the state as
# it was.

# %%
step = ol.optimize_loss(loss, learning_rate=1e-3, optimizer="AdamW", clip_gradients=1.0)
state = step.init(init_net([2, 64, 64, 1], seed=0))
found = step.find_learning_rate(state, batches(2), lowest=1e-5, highest=1.0)
print(f"suggested rate {found.suggestion:.4f}")
found.plot()

# %% [markdown]
# Numbers are state: `set` changes a hyperparameter, over a schedule or not, and compiles nothing. So a sweep over numbers is
# one program. Here six rates and two decays of the weights, side by side, for 200 steps each.

# %%
source = batches(2)
stacked = [np.stack(part) for part in zip(*(next(source) for _ in range(200)), strict=True)]
rates = found.suggestion * np.array([0.03, 0.1, 0.3, 1.0, 3.0, 10.0])
sweep = step.sweep(state, *stacked, learning_rate=rates, weight_decay=[0.0, 0.1])
print("best:", sweep.points[sweep.best])
sweep.plot()

# %% [markdown]
# `sweep.state()` is the state of the best run. It trains on, here with a tenth of the rate.

# %%
state = sweep.state().set(learning_rate=0.1 * sweep.points[sweep.best]["learning_rate"])
state, metrics = step.run(state, batches(3), steps=300, steps_per_call=50)
print(f"step {state.step}, loss {metrics['loss'][-50:].mean():.4f}")

# %% [markdown]
# ## Next
#
# - `inside_a_step.py`: what the step consists of.
# - `long_runs.py`: rules, bad batches, averages, checkpoints.
# - `from_tensorflow_and_keras.py`: the same in the words of TF contrib and Keras.
