"""What every kernel's ``_spec`` says of chips and dtypes: sizes, and refusals.

A refusal is a NotImplementedError ``<backend>: <what> is <got>, needs <what>``.
``problem`` is any of the ``Problem``s; a chip is its name, or None where it is not
known yet.
"""

from typing import Any

# VMEM of one core in MiB, less what the compiler keeps for itself. Where the chip is
# not known yet the tiles must fit the smallest.
_TPU_VMEM = {"v4": 13, "v5e": 100, "v5p": 52, "v6e": 100, "tpu7x": 52, None: 13}
# Cores that one device's grid is shared by.
_TPU_CORES = {"v4": 2, "v5p": 2}
# Chips whose matrix units are 256 wide: they do four times as much in a cycle, so more
# work hides the time in which they fill and drain.
TPU_WIDE = ("v6e", "tpu7x")
# Bytes of SMEM that the lists of one call may take.
TPU_SMEM = 900 * 2**10
TPU_LANES = 128
# What the compiler keeps in VMEM beside the buffers asked for: spills, constants.
TPU_SLACK = 2 * 2**20

# Shared memory that one program of a Hopper GPU can ask for, and what its barriers may
# take of it.
HOPPER_SMEM = 232_448
HOPPER_BARRIERS = 1_024
# Multiprocessors; where the chip is not known yet, those of the chips served.
_HOPPER_MULTIPROCESSORS = {"h100": 132, "h200": 132, None: 132}

_DTYPES = {
    "mosaic_tpu": ("bfloat16", "float32"),
    "mosaic_gpu": ("bfloat16", "float16"),
}


def tpu_vmem(chip: str | None) -> int:
    """Bytes of VMEM that a kernel's buffers may take."""
    return _TPU_VMEM.get(chip, _TPU_VMEM[None]) * 2**20


def tpu_cores(chip: str | None) -> int:
    """Cores that share one device's grid; 1 where the chip is not known yet."""
    return _TPU_CORES.get(chip or "", 1)


def hopper_multiprocessors(chip: str | None) -> int:
    """Programs that run at once, one on each multiprocessor."""
    return _HOPPER_MULTIPROCESSORS.get(chip, _HOPPER_MULTIPROCESSORS[None])


def up(size: int) -> int:
    """The next multiple of a TPU's lanes."""
    return -(-size // TPU_LANES) * TPU_LANES


def divisor(size: int, most: int) -> int:
    """The largest multiple of a TPU's lanes up to ``most`` that divides ``size``."""
    return next(w for w in range(most, 0, -TPU_LANES) if size % w == 0)


def check_chip(backend: str, chip: str | None) -> None:
    """Refuses chips for which the backend's kernels were not compiled."""
    if backend == "mosaic_tpu":
        served, needed = _TPU_VMEM, f"one of {', '.join(filter(None, _TPU_VMEM))}"
    else:
        served, needed = _HOPPER_MULTIPROCESSORS, "a Hopper GPU (h100, h200)"
    if chip not in served:
        raise NotImplementedError(f"{backend}: chip is {chip}, needs {needed}")


def check_dtype(backend: str, problem: Any) -> None:
    """Refuses operands that the backend's matrix units do not take."""
    served = _DTYPES[backend]
    if problem.dtype not in served:
        raise NotImplementedError(
            f"{backend}: dtype is {problem.dtype}, needs {' or '.join(served)}"
        )


def check_out_dtype(backend: str, problem: Any, *, sampled: bool) -> None:
    """Refuses results but of the operands' dtype, or a sampled product's of float32."""
    served = (problem.dtype, "float32") if sampled else (problem.dtype,)
    if problem.out_dtype not in served:
        raise NotImplementedError(
            f"{backend}: out_dtype is {problem.out_dtype} for {problem.op}, needs "
            f"{' or '.join(served)}"
        )


def check_positive(backend: str, problem: Any, *names: str) -> None:
    """Refuses fields below 1."""
    for name in names:
        if (got := getattr(problem, name)) < 1:
            raise NotImplementedError(f"{backend}: {name} is {got}, needs at least 1")


def check_multiple(backend: str, problem: Any, of: int, *names: str) -> None:
    """Refuses fields that are no positive multiple of ``of``."""
    for name in names:
        if (got := getattr(problem, name)) < 1 or got % of:
            raise NotImplementedError(
                f"{backend}: {name} is {got}, needs a multiple of {of}"
            )
