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
# # From TF contrib and Keras
#
# Code for `tf.contrib.layers.optimize_loss` and for Keras' optimizers keeps its words here. This page runs both, side by side
# with what is new. `docs/migration.md` has a table for each line.

# %%
import os

os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import optimize_loss as ol
from optimize_loss import optimizers

# %% [markdown]
# ## Data
#
# A noisy sine, and a small network for it.

# %%
random = np.random.default_rng(0)
x = random.uniform(-3, 3, (512, 1)).astype(np.float32)
y = (np.sin(2 * x) + 0.1 * random.standard_normal(x.shape)).astype(np.float32)


def init_net():
    random = np.random.default_rng(1)
    return {
        "hidden": {
            "kernel": random.standard_normal((1, 64)).astype(np.float32) * 2,
            "bias": random.uniform(-3, 3, 64).astype(np.float32),
        },
        "head": {
            "kernel": random.standard_normal((64, 1)).astype(np.float32) / 8,
            "bias": np.zeros(1, np.float32),
        },
    }


def predict(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return hidden @ params["head"]["kernel"] + params["head"]["bias"][None]


def loss(params, x, y):
    return jnp.mean((predict(params, x) - y) ** 2)


# %% [markdown]
# ## TF contrib
#
# The arguments, their order and their numbers are contrib's. In TensorFlow 1 this was
#
#     train_op = tf.contrib.layers.optimize_loss(
#         loss, tf.train.get_global_step(), 0.01, "Adam",
#         gradient_noise_scale=1e-3,
#         gradient_multipliers={"hidden/bias:0": 2.0},
#         clip_gradients=tf.contrib.layers.adaptive_clipping_fn(),
#         learning_rate_decay_fn=lambda lr, step: tf.train.exponential_decay(lr, step, 100, 0.8))
#     sess.run(train_op)

# %%
step = ol.optimize_loss(
    loss,
    0,
    0.01,
    "Adam",
    gradient_noise_scale=1e-3,
    gradient_multipliers={"hidden/bias:0": 2.0},
    clip_gradients=ol.adaptive_clipping_fn(),
    learning_rate_decay_fn=lambda lr, step: ol.schedules.exponential_decay(lr, step, 100, 0.8),
)
state, metrics = step.run(step.init(init_net()), ((x, y) for _ in range(500)), steps_per_call=50)
print(sorted(metrics))

# %% [markdown]
# ## Keras, by hand
#
# The classes have Keras' names, arguments and defaults. In Keras 2.15, `minimize` takes a function and variables:

# %%
w, b = ol.Variable([3.0, 1.0], name="w"), ol.Variable(2.0, name="b")
opt = optimizers.Adam(0.1, clipnorm=1.0)
opt.minimize(lambda: jnp.sum(w * w) + b * b, var_list=[w, b])
opt.apply_gradients([(jnp.array([1.0, 0.0]), w), (jnp.array(0.5), b)])
print(opt.iterations, w, b)

# %% [markdown]
# The same object serves trees of arrays, which are not changed but returned again, and `optimize_loss`:

# %%
params = optimizers.SGD(0.1).apply({"w": jnp.array([1.0, 2.0])}, {"w": jnp.zeros(2)})
print(params)

histories = {"contrib's arguments, Adam": metrics["loss"]}
for rule in (optimizers.AdamW(0.01), optimizers.Muon(0.01), optimizers.ScheduleFreeAdamW(0.01)):
    step = ol.optimize_loss(loss, optimizer=rule)
    _, metrics = step.run(step.init(init_net()), ((x, y) for _ in range(500)), steps_per_call=50)
    histories[type(rule).__name__] = metrics["loss"]

# %% [markdown]
# ## Keras' `fit`
#
# With Keras 3 on JAX, any of these trains a model through `fit`: all of Keras around it stays.

# %%
import keras

from optimize_loss.keras import KerasOptimizer

keras.utils.set_random_seed(0)
model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(64, "tanh"), keras.layers.Dense(1)])
model.compile(KerasOptimizer(optimizers.Muon(0.01)), loss="mse")
seen = model.fit(x, y, batch_size=64, epochs=60, verbose=0)
print(f"loss {seen.history['loss'][0]:.3f} → {seen.history['loss'][-1]:.3f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
for (name, curve), line in zip(histories.items(), ("-", "--", "-.", ":"), strict=True):
    left.semilogy(curve, line, label=name, lw=2)
left.set(title="training", xlabel="step (512 points each)", ylabel="mean squared error")
left.legend()
order = np.argsort(x[:, 0])
right.plot(x[order], y[order], ".", color="lightgrey", label="data")
right.plot(x[order], predict(state.params, x)[order], lw=2, label="contrib's arguments, Adam")
right.plot(x[order], model.predict(x, verbose=0)[order], "--", lw=2, label="Keras' fit, 480 steps")
right.set(title="fits", xlabel="x (radians)", ylabel="y (no unit)")
right.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# ## What differs
#
# Mostly what failed silently there fails loudly here. A multiplier for a parameter that does not exist was ignored:

# %%
try:
    ol.optimize_loss(loss, learning_rate=0.1, gradient_multipliers={"hiden/bias": 2.0}).init(
        init_net()
    )
except ValueError as error:
    print(error)
