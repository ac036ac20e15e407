"""Devices that are not here: what their compilers need to know of them."""

import dataclasses
import os
import sys
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

# jax reads these when it is imported, so the process begins again with them.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_force_host_platform_device_count=8",
}
INSTALL = {
    "tpu": "pip install 'optimize_loss[compiled]'",
    "gpu": f"pip install --no-deps jax-cuda13-plugin=={jax.__version__} "
    f"jax-cuda13-pjrt=={jax.__version__}",
}

# The H200, from NVIDIA's data sheet and the CUDA programming guide (compute capability 9.0).
_H200 = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 48 * 1024,
    "shared_memory_per_block_optin": 227 * 1024,
    "shared_memory_per_core": 228 * 1024,
    "threads_per_core_limit": 2048,
    "core_count": 132,
    "fpus_per_core": 128,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "registers_per_core_limit": 65_536,
    "registers_per_block_limit": 65_536,
    "memory_bandwidth": 4_800_000_000_000,
    "l2_cache_size": 50 * 1024**2,
    "device_memory_size": 141 * 1024**3,
    "clock_rate_ghz": 1.98,
    "device_address_bits": 64,
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Some devices of one kind."""

    name: str
    platform: Literal["tpu", "gpu"]
    count: int

    def devices(self) -> list[Any]:
        """Return the devices, for which programs can be compiled and not run."""
        if self.platform == "tpu":
            return topologies.get_topology_desc("v5e:2x4", "tpu").devices[: self.count]
        found = topologies.get_topology_desc(
            platform="cuda", topology=f"1x{self.count}x1", target_config=_config()
        )
        return found.devices

    def mesh(self) -> Mesh:
        """Return all devices along one axis, "data"."""
        return mesh_of(self.devices())


def mesh_of(devices: list[Any]) -> Mesh:
    """Return a mesh of one axis, "data"."""
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


TARGETS = (
    Target("v5e", "tpu", 1),
    Target("8 v5e", "tpu", 8),
    Target("H200", "gpu", 1),
    Target("8 H200", "gpu", 8),
)


def _config() -> str:
    """Return the H200 as XLA reads it."""
    lines = [f"  {name}: {value}" for name, value in _H200.items()]
    lines.append(
        "  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }"
    )
    lines += ['  device_vendor: "NVIDIA Corporation"', '  name: "NVIDIA H200"']
    lines += [f"  {x}_version {{ major: 12 minor: 8 patch: 0 }}" for x in ("runtime", "driver")][:0]
    version = '  driver_version: "13.0.0"\n  runtime_version: "12.8.0"'
    rest = 'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 10 patch: 0 }'
    body = "\n".join([*lines, version])
    return (
        f"gpu_device_info {{\n{body}\n}}\n{rest}\nruntime_version {{ major: 12 minor: 8 patch: 0 }}"
    )


def begin_again() -> None:
    """Start this process again with the environment that compilers need, unless it has it."""
    if "BENCHMARKS_COMPILED" not in os.environ:
        arguments = [sys.executable, "-m", "benchmarks.compiled", *sys.argv[1:]]
        os.execve(
            sys.executable, arguments, os.environ | ENVIRONMENT | {"BENCHMARKS_COMPILED": "1"}
        )


def missing(platform: str) -> str | None:
    """Return the line that installs a compiler, if it is not here."""
    try:
        next(t for t in TARGETS if t.platform == platform).devices()
    except Exception as error:  # each plugin fails in its own way where it is not installed
        return f"{platform}: {INSTALL[platform]} ({str(error).splitlines()[0][:100]})"
    return None
