"""Compiles for NVIDIA GPUs that are not there, down to machine code.

Needs the CUDA plugin of jax's own version and NVIDIA's compiler; no GPU, no driver:

    pip install jax-cuda13-plugin==V jax-cuda13-pjrt==V
    pip install --no-deps nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-runtime \
        nvidia-cuda-cupti
"""

import dataclasses
import functools
import os
import pathlib
import re

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Chip:
    """A GPU as its vendor describes it."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int  # bytes
    bandwidth: int  # bytes a second
    l2: int  # bytes
    clock: float  # GHz
    shared_memory: int  # bytes per multiprocessor; a block gets 1 KiB less
    accelerated: bool = True  # has instructions of its generation only ("sm_90a")


CHIPS = {
    "a100": Chip(
        "NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        multiprocessors=108,
        memory=85_100_068_864,
        bandwidth=2_039_040_000_000,
        l2=40 << 20,
        clock=1.41,
        shared_memory=164 << 10,
        accelerated=False,
    ),
    "h100": Chip(
        "NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        multiprocessors=132,
        memory=84_942_979_072,
        bandwidth=3_352_320_000_000,
        l2=50 << 20,
        clock=1.98,
        shared_memory=228 << 10,
    ),
    "h200": Chip(
        "NVIDIA H200",
        capability=(9, 0),
        multiprocessors=132,
        memory=151_397_597_184,
        bandwidth=4_800_000_000_000,
        l2=50 << 20,
        clock=1.98,
        shared_memory=228 << 10,
    ),
    "b200": Chip(
        "NVIDIA B200",
        capability=(10, 0),
        multiprocessors=148,
        memory=191_514_411_008,
        bandwidth=7_672_320_000_000,
        l2=132_644_864,
        clock=1.965,
        shared_memory=228 << 10,
    ),
}


def _target(chip: Chip) -> str:
    """XLA's text description of a target."""
    major, minor = chip.capability
    features = "feature_extension: ACCELERATED_FEATURES" if chip.accelerated else ""
    return f"""
        platform_name: "CUDA"
        device_description_str: "{chip.name}"
        dnn_version_info {{ major: 9 minor: 10 }}
        gpu_device_info {{
          name: "{chip.name}"
          device_vendor: "NVIDIA Corporation"
          cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
          core_count: {chip.multiprocessors}
          fpus_per_core: 128
          clock_rate_ghz: {chip.clock}
          device_memory_size: {chip.memory}
          memory_bandwidth: {chip.bandwidth}
          l2_cache_size: {chip.l2}
          shared_memory_per_core: {chip.shared_memory}
          shared_memory_per_block: {48 << 10}
          shared_memory_per_block_optin: {chip.shared_memory - (1 << 10)}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          driver_version: "13.0.0"
          runtime_version: "13.0.0"
          compile_time_toolkit_version: "13.0.0"
          dnn_version: "9.10.0"
        }}
    """


@functools.cache
def _prefer_own_ptxas() -> None:
    """Puts the wheels' ptxas first: an older one on PATH refuses newer PTX."""
    import nvidia

    for root in nvidia.__path__:
        for ptxas in pathlib.Path(root).rglob("bin/ptxas"):
            os.environ["PATH"] = f"{ptxas.parent}{os.pathsep}{os.environ['PATH']}"


def compile_for(chip: str, fn, args):
    """Compiles ``fn`` for a chip.

    Args:
        chip: a key of CHIPS.
        fn: function of arrays.
        args: its arguments, a tree of jax.ShapeDtypeStruct.

    Returns:
        The lowered and the compiled function. Mosaic GPU lets ptxas write what it has
        to say to the process's own output, whence ``ptxas_report`` reads it.
    """
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    _prefer_own_ptxas()
    facts = CHIPS[chip]
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=_target(facts),
        topology="1x1x1",
    )
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    args = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args
    )
    # Newer versions of jax ask the mesh which chip they lower for.
    from jax._src.mesh import AbstractDevice

    device = AbstractDevice(
        device_kind=facts.name, num_cores=facts.multiprocessors, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",))
    return lowered, lowered.compile()


@dataclasses.dataclass(frozen=True)
class Report:
    """What ptxas said of the kernels in one compilation."""

    registers: tuple[int, ...]
    spilled: int  # bytes stored and loaded
    warnings: tuple[str, ...]

    @property
    def clean(self) -> bool:
        return bool(self.registers) and not self.spilled and not self.warnings


def ptxas_report(said: str) -> Report:
    """Reads ptxas's output. No kernel in it at all is not clean either."""
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    return Report(
        registers=tuple(int(n) for n in re.findall(r"Used (\d+) registers", said)),
        spilled=sum(int(n) for n in spills),
        # C7508 to C7519: setmaxnreg ignored, wgmma serialized, and the like.
        warnings=tuple(
            line
            for line in said.splitlines()
            if re.search(r"\bC75\d\d\b|wgmma.*seriali[sz]|setmaxnreg.*ignored", line)
        ),
    )
