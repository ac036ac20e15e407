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
# # A link and an optimizer of your own
#
# There are two ways to add a rule. A **link** is a few small functions; it works in chains, beside all other links. An
# **Optimizer** with `build` and `update_step` is what Keras users write; it works here unchanged. Both are compiled, work under
# `optimize_loss`, and are optax transformations.

# %%
import dataclasses

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import optimize_loss as ol
from optimize_loss import optimizers
from optimize_loss import transforms as t

# %% [markdown]
# ## A link
#
# The rule: momentum, but an entry whose gradient disagrees in sign with its momentum does not move. It has one
# hyperparameter, which is a decay rate, and one slot.
#
#     m ← β m + (1-β) g
#     u = m where m g > 0, else 0


# %%
@dataclasses.dataclass(frozen=True)
class ScaleByAgreement(t.Link):
    """Move by the mean gradient, where the newest one agrees with it in sign."""

    decay: t.Decay = 0.9  # checked; state.set changes it; may be a schedule
    elementwise = True  # every entry by itself: small parameters may share an array

    def slots(self, param):
        return {"m": jnp.zeros_like(param)}

    def leaf(self, update, slots, param, k):
        kept, added = k["decay"]  # the pair (β, 1-β)
        m = kept * slots["m"] + added * update
        return jnp.where(m * update > 0, m, 0), {"m": m}


# %% [markdown]
# It is checked like all others, its number is in the state, and it composes.

# %%
try:
    ScaleByAgreement(decay=1.5)
except ValueError as error:
    print(error)

tx = t.chain(agree=ScaleByAgreement(0.5), rate=t.ScaleByLearningRate(1.0))
params = {"w": jnp.zeros(2)}
state = tx.init(params)
for gradient in ([1.0, 1.0], [1.0, -1.0]):
    updates, state = tx.update({"w": jnp.array(gradient)}, state, params)
print(updates["w"], state["agree"]["m"]["w"])  # the second entry turned: it stays

# %% [markdown]
# ## A link with a number for the whole tree
#
# `needs` names a number of the whole tree, here the joint norm of all updates; `scalars` turns it into what the leaves need.
# This one scales the whole gradient to norm 1.


# %%
@dataclasses.dataclass(frozen=True)
class ToUnitNorm(t.Link):
    """Scale all gradients together to the L2 norm 1."""

    needs = "global_norm"

    def scalars(self, numbers, memory, total, step):
        return {"factor": 1 / jnp.maximum(total, 1e-30)}, memory

    def factor(self, k):
        return k["factor"]


tx = t.chain(unit=ToUnitNorm())
print(tx.update({"a": jnp.array(3.0), "b": jnp.array(4.0)}, tx.init({"a": 0.0, "b": 0.0}))[0])

# %% [markdown]
# ## An optimizer
#
# The same rule as a class in Keras' form. `build` makes variables, `update_step` assigns to them. All options that
# optimizers share, such as clipping, decay and averages, are there.


# %%
class Agreement(optimizers.Optimizer):
    """Move by the mean gradient, where the newest one agrees with it in sign."""

    def __init__(self, learning_rate=0.01, decay=0.9, name=None, **options):
        super().__init__(name, learning_rate=learning_rate, **options)
        self.decay = decay

    def build(self, var_list):
        super().build(var_list)
        self.means = [
            self.add_variable_from_reference(model_variable=v, variable_name="m") for v in var_list
        ]

    def update_step(self, gradient, variable, learning_rate):
        m = self.means[self._get_variable_index(variable)]
        m.assign(self.decay * m + (1 - self.decay) * gradient)
        variable.assign_sub(jnp.where(m * gradient > 0, learning_rate * m, 0))

    def get_config(self):
        return {**super().get_config(), "decay": self.decay}


print(optimizers.Optimizer.from_config.__name__, Agreement(decay=0.5).get_config()["decay"])

# %% [markdown]
# ## Both on a narrow valley
#
# Rosenbrock's function has its minimum at (1, 1), at the end of a bent valley.


# %%
def valley(params):
    x, y = params["x"], params["y"]
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


contenders = {
    "Momentum": optimizers.SGD(5e-4, momentum=0.9),
    "Adam": optimizers.Adam(2e-2),
    "our link": t.chain(agree=ScaleByAgreement(0.9), rate=t.ScaleByLearningRate(5e-3)),
    "our Optimizer": Agreement(5e-3, decay=0.9),
}
paths = {}
for name, rule in contenders.items():
    step = ol.optimize_loss(valley, optimizer=rule, clip_gradients=10.0)
    state = step.init({"x": -1.2, "y": 1.0})
    path = [(-1.2, 1.0)]
    for _ in range(400):
        state, metrics = step(state)
        path.append((float(state.params["x"]), float(state.params["y"])))
    paths[name] = np.array(path)
np.testing.assert_allclose(paths["our link"], paths["our Optimizer"], rtol=1e-3, atol=1e-4)

# %%
x, y = np.meshgrid(np.linspace(-1.6, 1.6, 200), np.linspace(-0.6, 1.8, 200))
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
left.contour(x, y, np.log10(valley({"x": x, "y": y}) + 1e-3), 20, colors="grey", linewidths=0.5)
for (name, path), line in zip(paths.items(), ("-", "-", "-", "--"), strict=True):
    left.plot(*path.T, line, label=name, lw=2)
    right.semilogy(valley({"x": path[:, 0], "y": path[:, 1]}), line, label=name, lw=2)
left.plot(1, 1, "k*", ms=12)
left.set(title="paths of 400 steps to the star", xlabel="x (no unit)", ylabel="y (no unit)")
right.set(title="loss", xlabel="step", ylabel="value of the function")
right.legend()
plt.show()
