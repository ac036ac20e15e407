"""Transfers between host and device that a caller has asked for."""

import contextlib
from collections.abc import Iterator

import jax

_IMPLICIT = ("disallow", "log")
_GUARDS = {
    "jax_transfer_guard_host_to_device": jax.transfer_guard_host_to_device,
    "jax_transfer_guard_device_to_host": jax.transfer_guard_device_to_host,
    "jax_transfer_guard_device_to_device": jax.transfer_guard_device_to_device,
}


@contextlib.contextmanager
def asked_for() -> Iterator[None]:
    """Let transfers through, as `jax.device_put` is let through, where JAX stops implicit ones.

    A method that takes numbers from the host, or makes arrays, transfers because it was called.
    `jax.transfer_guard("disallow_explicit")` stops these transfers, too.
    """
    guards = [guard for name, guard in _GUARDS.items() if getattr(jax.config, name) in _IMPLICIT]
    with contextlib.ExitStack() as stack:
        for guard in guards:
            stack.enter_context(guard("allow"))
        yield
