"""optax: the update or a hand-written step, jitted and donating."""

from typing import Any

import optax

from benchmarks._problems import BETA_1, BETA_2, CLIP, DECAY, EPSILON, PEAK, STEPS, WARM_UP
from benchmarks.peers import on_jax

VERSIONS = on_jax.versions(optax)


def transformation() -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK, WARM_UP, STEPS)
    adamw = optax.adamw(schedule, BETA_1, BETA_2, eps=EPSILON, weight_decay=DECAY)
    return optax.chain(optax.clip_by_global_norm(CLIP), adamw)


class Peer(on_jax.JaxPeer):
    def rule(self, params: Any) -> Any:
        tx = transformation()

        def update(grads: Any, params: Any, state: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return tx.init(params), update
