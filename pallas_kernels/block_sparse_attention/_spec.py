"""What the attention kernels take, and their tile sizes. Pure Python on shapes.

Every backend file has the same three functions. Arrays are head-major; t and s are
padded to whole blocks of block_q queries and block_k keys, nq and nk of them.

``forward(q, k, v, lists, elements, *, scale, soft_cap, block_bias, page_table, config,
interpret)`` -> (out, lse)
    q        [b, h, t, d]            k [b, h_kv, s, d]      v [b, h_kv, s, dv]
    lists    (kv_idx int32 [mask_b, mask_h, nq, capacity], kv_cnt int32 [mask_b, mask_h,
             nq], kv_full [mask_b, mask_h, nq, capacity]): each query block's key
             blocks; slots beyond the count are in range and take no part
    elements ``Elements``: which elements of a block that is not full are allowed
    block_bias float32 [mask_b or 1, h, mask_h or 1, nq, capacity], or None
    page_table int32 [b, nk], or None: then k and v are pages [pages, h_kv, block_k, d],
             and key block j of a sequence lies in page page_table[b, j]
    out      [b, h, t, dv] of q's dtype, or float32 where config.exact
    lse      float32 [b, h, t]

        z = scale * q . k,  z = soft_cap * tanh(z / soft_cap),  z += the block's bias
        lse = log(sum over allowed j of exp(z)),    out = sum of exp(z - lse) v

    A row that allows nothing has out 0 and lse -inf. mask_b is 1 or b, mask_h divides
    h: neighbouring query heads share a list.

``backward_q(q, k, v, dout, lse, delta, lists, elements, *, scale, soft_cap, block_bias,
config, interpret)`` -> dq, or (dq, dbias) where block_bias is given
    dout     [b, h, t, dv]           lse, delta float32 [b, h, t]
    dq       [b, h, t, d]            dbias float32 [bias_b, h, nq, capacity]

        p = exp(z - lse),  dz = p (dout . v - delta),  dq = scale * sum over j of dz k

    dz is multiplied by the cap's derivative 1 - (z / soft_cap)^2 (z before the bias). A
    block's dbias is the sum of its dz before that; slots beyond the count have 0.

``backward_kv(q, k, v, dout, lse, delta, transposed, elements, *, scale, soft_cap,
block_bias, config, interpret)`` -> (dk, dv)
    transposed (q_idx int32 [mask_b, mask_h, nq * capacity], q_full [the same],
               ptr int32 [mask_b, mask_h, nk + 1], slot int32 [as q_idx]): the same
               blocks by key block: key block j has entries ptr[j] .. ptr[j + 1]; slot
               is each one's place in the lists [nq * capacity], by which block_bias is
               asked
    dk, dv     like k and v, over all query heads of a key head:
               dk = scale * sum over i of dz q,  dv = sum over i of p dout

Sums are float32; p and dz are rounded to the arrays' dtype before they are multiplied.
Where config.exact, the forward kernel multiplies what p loses by rounding as well, and
does not round out: delta = dout . out is then as good as the p that dz is made of.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from pallas_kernels import _chips
from pallas_kernels._chips import TPU_LANES


class Elements(NamedTuple):
    """Which elements of a listed block are allowed, unless the block is full.

    predicate: (i, j, rows, cols, scalars, dense) -> bool, elementwise; i and j are the
        positions of queries and keys, int32. None: all of them.
    rows: int32 [b or 1, heads, t] each, cols: int32 [b or 1, heads, s] each, scalars:
        int32 [b or 1, heads] each, dense: bool [b or 1, heads, t, s] each; heads
        divides h.
    """

    predicate: Callable[..., Any] | None = None
    rows: tuple[Any, ...] = ()
    cols: tuple[Any, ...] = ()
    scalars: tuple[Any, ...] = ()
    dense: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static facts by which a backend accepts an attention and picks its tiles.

    ``op`` is "forward", "backward_q" or "backward_kv"; t and s are the true lengths,
    before padding; rows, cols, scalars and dense count the predicate's operands.
    """

    op: str
    b: int
    h: int
    h_kv: int
    t: int
    s: int
    d: int
    dv: int
    block_q: int
    block_k: int
    capacity: int
    mask_b: int
    mask_h: int
    dtype: str
    rows: int = 0
    cols: int = 0
    scalars: int = 0
    dense: int = 0
    soft_cap: bool = False
    bias: bool = False
    paged: bool = False
    exact: bool = False

    def __str__(self):
        return (
            f"{self.op}: batch {self.b}, {self.h} heads ({self.h_kv} of keys), "
            f"{self.t}x{self.s} positions, head sizes {self.d} and {self.dv}, lists of "
            f"{self.capacity} blocks of {self.block_q}x{self.block_k} for "
            f"{self.mask_b}x{self.mask_h} heads, {self.dtype}"
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes of one kernel call.

    keys: the true number of keys, beyond which none is allowed.
    group: query heads that a program holds together; they share lists and keys.
    unroll: listed blocks that one inner step takes.
    rows: rows of a tile that go through the inner step at a time.
    vmem: TPU: bytes that the kernel may take of VMEM.
    stages: GPU: depth of the copy pipeline.
    tile: GPU: positions that one step meets, of a listed block.
    warpgroups: GPU: warpgroups that compute, 64 rows each.
    split: GPU, backward: two warpgroups have the same rows, and each some of the sums.
    exact: forward: out is float32, of probabilities of twice the dtype's digits.
    """

    keys: int
    block_q: int
    block_k: int
    group: int = 1
    unroll: int = 1
    rows: int = 128
    vmem: int = 0
    stages: int = 2
    tile: int = 64
    warpgroups: int = 1
    split: bool = False
    exact: bool = False


# --- TPU: Pallas Mosaic -------------------------------------------------------------

# Query rows of a tile are whole registers of any dtype; others are padded.
TPU_ROWS = 32
# Rows that one inner step brings at most, that a program holds, and that go through an
# inner step at a time: by the compiler's schedules for v5e, taller ones gain nothing.
_TPU_KEYS = 512
_TPU_TILE = 1024
_TPU_CHUNK = 512
# Bytes of SMEM that a program's lists may take.
_TPU_SMEM = 256 * 2**10


def check_mosaic_tpu(problem: Problem, chip: str | None) -> None:
    """Raises NotImplementedError where the TPU kernels do not serve the problem.

    Args:
        problem: the attention asked for.
        chip: "v4", "v5e", "v5p", "v6e", "tpu7x", another chip's name, or None where it
            is not known yet.
    """
    _chips.check_chip("mosaic_tpu", chip)
    _chips.check_dtype("mosaic_tpu", problem)
    sizes = "b", "h", "h_kv", "t", "s", "block_q", "capacity"
    _chips.check_positive("mosaic_tpu", problem, *sizes)
    for name in ("d", "dv"):
        size = getattr(problem, name)
        if size % 8 or not 8 <= size <= 256:
            raise NotImplementedError(
                f"mosaic_tpu: {name} is {size}, needs a multiple of 8 from 8 to 256"
            )
    _chips.check_multiple("mosaic_tpu", problem, TPU_LANES, "block_k")
    if problem.paged and problem.op != "forward":
        raise NotImplementedError(f"mosaic_tpu: pages have no {problem.op}")
    entries = problem.capacity
    if problem.op == "backward_kv":
        # All list heads of a key head, each with as many entries as query blocks.
        entries = -(-problem.t // problem.block_q)
        entries *= max(1, problem.mask_h // problem.h_kv)
    if 4 * entries > _TPU_SMEM:
        name = "t" if problem.op == "backward_kv" else "capacity"
        raise NotImplementedError(
            f"mosaic_tpu: {name} is {getattr(problem, name)}, whose lists take "
            f"{4 * entries} bytes of SMEM, needs at most {_TPU_SMEM}: larger blocks"
        )
    needed, room = config_mosaic_tpu(problem, chip).vmem, _chips.tpu_vmem(chip)
    if needed > room:
        raise NotImplementedError(
            f"mosaic_tpu: blocks of {problem.block_q}x{problem.block_k}, head sizes "
            f"{problem.d} and {problem.dv} need {needed} bytes of VMEM, "
            f"{chip or 'the smallest chip'} has {room}: smaller blocks"
        )


def config_mosaic_tpu(problem: Problem, chip: str | None) -> Config:
    """Picks how many heads a program holds and how many blocks an inner step takes."""
    room = _chips.tpu_vmem(chip)
    # Heads that share a list and keys; more rows for each block that is brought.
    share = problem.h // math.lcm(problem.h_kv, problem.mask_h)
    heads = [g for g in range(max(share, 1), 0, -1) if share % g == 0] or [1]
    heads = [g for g in heads if g * problem.block_q <= _TPU_TILE] or [1]
    if problem.op == "backward_kv":
        rows, listed = problem.block_q, -(-problem.t // problem.block_q)
    else:
        rows, listed = problem.block_k, problem.capacity
    config = Config(
        problem.s,
        problem.block_q,
        problem.block_k,
        rows=_TPU_CHUNK if problem.op == "forward" else _TPU_CHUNK // 2,
        exact=problem.exact,
    )
    for group in heads:
        wide = rows * group if problem.op == "backward_kv" else rows
        for unroll in range(max(1, min(_TPU_KEYS // wide, listed)), 0, -1):
            config = dataclasses.replace(config, group=group, unroll=unroll)
            config = dataclasses.replace(config, vmem=vmem_mosaic_tpu(problem, config))
            if config.vmem <= room:
                return config
    return config


def vmem_mosaic_tpu(problem: Problem, config: Config) -> int:
    """Bytes of VMEM that a kernel's buffers take."""
    item = 2 if problem.dtype == "bfloat16" else 4
    d, dv = _chips.up(problem.d), _chips.up(problem.dv)
    rows = -(-config.group * problem.block_q // TPU_ROWS) * TPU_ROWS
    keys = problem.block_k
    # A line of numbers takes eight sublanes; a column of them, all lanes.
    line, column = 32 * 2, TPU_LANES * 4
    if problem.op == "backward_kv":
        rows *= config.unroll
        tiles, sums = 2 * rows * (d + dv) + 4 * keys * (d + dv), keys * (d + dv)
        elements = rows * (3 + problem.rows) * line
        elements += keys * problem.cols * (line + column)
        height, width = min(config.rows, keys), rows
    else:
        keys *= config.unroll
        tiles, sums = 2 * (rows + keys) * (d + dv), rows * (dv + 2 * TPU_LANES)
        lines = 1 + problem.rows
        if problem.op == "backward_q":
            tiles, sums = tiles + 2 * rows * d, rows * d
            lines += 2
        if config.exact:
            sums += rows * dv
        elements = keys * problem.cols * line + rows * lines * (line + column)
        height, width = min(config.rows, rows), keys
    elements += 2 * problem.dense * rows * keys
    # What of a part's logits the compiler keeps in VMEM between products.
    logits = 4 * height * width * 4
    return tiles * item + 4 * sums + elements + logits + _chips.TPU_SLACK


# --- GPU: Pallas Mosaic, Hopper -----------------------------------------------------

# Rows of a warpgroup: what one wgmma takes.
HOPPER_ROWS = 64
# Elements of a given mask in one word.
HOPPER_WORD = 32
# What of a program's shared memory its barriers and the alignment of its buffers take.
_HOPPER_SLACK = 4_096


def check_mosaic_gpu(problem: Problem, chip: str | None) -> None:
    """Raises NotImplementedError where the Hopper kernels do not serve the problem.

    Args:
        problem: the attention asked for.
        chip: "h100", "h200", another chip's name, or None where it is not known yet.
    """
    _chips.check_chip("mosaic_gpu", chip)
    _chips.check_dtype("mosaic_gpu", problem)
    _chips.check_positive("mosaic_gpu", problem, "b", "h", "h_kv", "t", "s", "capacity")
    _chips.check_multiple("mosaic_gpu", problem, HOPPER_ROWS, "block_q", "block_k")
    for name in ("d", "dv"):
        size = getattr(problem, name)
        # Unlike halves of a sum, of 224 columns say, and ptxas serializes the products.
        if size != 256 and (size % 16 or not 16 <= size <= 192):
            raise NotImplementedError(
                f"mosaic_gpu: {name} is {size}, needs a multiple of 16 from 16 to 192, "
                "or 256"
            )
    if problem.paged and problem.op != "forward":
        raise NotImplementedError(f"mosaic_gpu: pages have no {problem.op}")
    config = config_mosaic_gpu(problem, chip)
    needed = smem_mosaic_gpu(problem, config)
    if needed > _chips.HOPPER_SMEM:
        raise NotImplementedError(
            f"mosaic_gpu: rows is {problem.rows}, cols is {problem.cols}, dense is "
            f"{problem.dense}, with head sizes {problem.d} and {problem.dv} "
            f"{problem.op} takes {needed} bytes of shared memory, needs at most "
            f"{_chips.HOPPER_SMEM}"
        )


def config_mosaic_gpu(problem: Problem, chip: str | None) -> Config:
    """Picks the tiles of the Hopper kernels; h100 and h200 differ in memory only.

    By registers and shared memory, not yet by measurement: two computing warpgroups
    where they fit, of one block or of two heads that share one.
    """
    del chip
    by_keys = problem.op == "backward_kv"
    block, step = problem.block_q, problem.block_k
    if by_keys:
        block, step = step, block
    across = 2 if block % (2 * HOPPER_ROWS) == 0 else 1
    share = problem.h // math.lcm(problem.h_kv, problem.mask_h)
    split = problem.op == "backward_q" and problem.d > 192
    if by_keys:
        split, share = max(problem.d, problem.dv) > 64, 1
    group = 2 if across == 1 and share % 2 == 0 and not split else 1
    both = 2 if split else across * group
    tile = _hopper_tile(problem)
    tile = tile if step % tile == 0 and both == 2 else min(tile, 64)
    config = Config(
        problem.s, problem.block_q, problem.block_k, split=split, exact=problem.exact
    )
    for warpgroups in (2,) if split else (both, 1):
        for stages in (4, 3, 2):
            config = dataclasses.replace(
                config,
                group=min(group, warpgroups),
                warpgroups=warpgroups,
                tile=tile if warpgroups == 2 else min(tile, 64),
                stages=stages,
            )
            if smem_mosaic_gpu(problem, config) <= _chips.HOPPER_SMEM:
                return config
    return config


def _hopper_tile(problem: Problem) -> int:
    """Positions of a step whose logits fit in registers beside the sums, by ptxas.

    A thread has half a register for each position and for each column of its sums, in
    backward kernels one for each position; and what else is asked.
    """
    d, dv = problem.d, problem.dv
    asked = problem.rows + problem.cols + problem.scalars + problem.dense > 0
    more = asked + (problem.soft_cap or problem.bias)
    if problem.op == "forward":
        if max(d, dv) <= (64 if asked else 128) and not problem.exact:
            return 128
        return 32 if dv > 192 and asked else 64
    if problem.op == "backward_q":
        # Beyond 192 each of two warpgroups has half of the sums.
        return 32 if d > 128 and more > (d > 192) else 64
    return 64 if max(d, dv) <= (256, 192, 128)[more] else 32


def smem_mosaic_gpu(problem: Problem, config: Config) -> int:
    """Bytes of shared memory that a program takes."""
    d, dv = problem.d, problem.dv
    rows = HOPPER_ROWS * (1 if config.split else config.warpgroups)
    both = 2 * (d + dv)
    if problem.op == "backward_kv":
        home = rows * both
        stage = config.tile * (both + 8 + 4 * problem.rows) + 4 * rows * problem.cols
    else:
        home = rows * (2 * d + 8 + 4 * problem.rows)
        if problem.op == "backward_q" or d != dv:
            home += rows * 2 * dv
        stage = config.tile * (both + 4 * problem.cols * config.group)
    stage += 4 * rows * (config.tile // HOPPER_WORD) * problem.dense
    return _HOPPER_SLACK + home + config.stages * stage
