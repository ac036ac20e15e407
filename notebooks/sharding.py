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
# # Sharding on eight devices
#
# The same step runs on one device and on many. This page makes eight devices of one processor, spreads the batch over them,
# then the optimizer's slots too. The first cell must run before JAX is used.

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optimize_loss as ol

mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
everywhere, spread = (
    NamedSharding(mesh, PartitionSpec()),
    NamedSharding(mesh, PartitionSpec("data")),
)
print(len(jax.devices()), "devices")

# %% [markdown]
# ## A network and its data


# %%
def init_net():
    random = np.random.default_rng(0)
    sizes = [(16, 256), (256, 256), (256, 1)]
    return {
        f"layer_{i}": {
            "kernel": (random.standard_normal(size) / np.sqrt(size[0])).astype(np.float32),
            "bias": np.zeros(size[1], np.float32),
        }
        for i, size in enumerate(sizes)
    }


def loss(params, x, y):
    *hidden, last = params.values()
    for layer in hidden:
        x = jax.nn.gelu(x @ layer["kernel"] + layer["bias"][None])
    return jnp.mean(((x @ last["kernel"] + last["bias"][None])[:, 0] - y) ** 2)


def batches(seed=1):
    random = np.random.default_rng(seed)
    while True:
        x = random.standard_normal((64, 16), dtype=np.float32)
        yield x, np.sin(x[:, 0] + x[:, 1])


# %% [markdown]
# ## Data parallel
#
# Parameters lie on every device, a batch is cut into eight parts. Nothing else changes: XLA sums the gradients.

# %%
options = dict(learning_rate=1e-2, optimizer="Adam", clip_gradients=1.0)
step = ol.optimize_loss(loss, **options)
histories, states = {}, {}
states["one device"], metrics = step.run(step.init(init_net()), batches(), steps=100)
histories["one device"] = metrics["loss"]

params = jax.device_put(init_net(), everywhere)
states["batch spread"], metrics = step.run(step.init(params), batches(), steps=100, sharding=spread)
histories["batch spread"] = metrics["loss"]

# %% [markdown]
# ## Slots spread, too
#
# Adam keeps two numbers for each parameter, on every device. With `shard_state`, each device keeps and updates an eighth of
# them (ZeRO-1). An array that small parameters share lies on every device; `bucket=None` gives those of this example their own.

# %%
sharded = ol.optimize_loss(loss, **options, shard_state="data", bucket=None)
states["batch and slots spread"], metrics = sharded.run(
    sharded.init(params), batches(), steps=100, sharding=spread
)
histories["batch and slots spread"] = metrics["loss"]


def bytes_by_device(tree):
    total = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            total[shard.device] += shard.data.nbytes
    return np.array(list(total.values()))


for name, state in states.items():
    pair = jax.device_get((state.params, states["one device"].params))
    differences = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), *pair)
    worst = max(jax.tree.leaves(differences))
    print(f"{name:24} loss {histories[name][-1]:.5f}, parameters differ by at most {worst:.1e}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.8), layout="constrained")
for (name, curve), line in zip(histories.items(), ("-", "--", ":"), strict=True):
    left.semilogy(curve, line, lw=2, label=name)
left.set(title="training", xlabel="step (64 samples)", ylabel="mean squared error")
left.legend()
for i, (name, state) in enumerate(states.items()):
    right.bar(
        np.arange(8) + 0.27 * (i - 1),
        bytes_by_device(state.packed_optimizer) / 1024,
        0.25,
        label=name,
    )
right.set(title="memory of the optimizer", xlabel="device", ylabel="KiB", ylim=(0, 850))
right.legend()
plt.show()

whole, parts = (
    bytes_by_device(states[k].packed_optimizer) for k in ("batch spread", "batch and slots spread")
)
print(f"slots on a device: {whole[0]} bytes, spread {parts[0]}: 1/{whole[0] / parts[0]:.1f}")
assert parts.max() < whole[0] / 7

# %% [markdown]
# ## One file for any number of devices
#
# What eight devices saved goes on with one, and the other way round.

# %%
import pathlib
import tempfile

path = pathlib.Path(tempfile.mkdtemp()) / "state.safetensors"
ol.save(path, states["batch and slots spread"])
state, report = ol.restore(path, like=step.init(init_net()))
state, metrics = step.run(state, batches(2), steps=20)
print(report, "· step", state.step, "on", len(state.packed_optimizer["step"].devices()), "device")
