"""Where the non-zeros of a sparse matrix are. No matmul lives here.

Glossary, used with the same meaning in the whole library:

mask
    Boolean array shaped like a weight, True = kept.
layout
    Where the stored blocks are (``BlockLayout``).
block
    The unit of sparsity: bk x bn neighbouring entries that are kept or dropped
    together.
tile
    What one program instance of a kernel loads. Never a synonym of block.
slot
    One place for a block in the stored array ``blocks [capacity, bk, bn]``. Slots
    beyond the layout's count are padding: they hold no block and take no part.
density, sparsity
    Fraction kept; 1 - density.
topology
    Masks or layouts of a whole model.
leaf filter
    Which parameters a transform touches. Never called a mask.
N:M
    N *kept* of M, along the contraction axis.
condensed
    N:M weights stored as their kept values and the packed places of these, as
    ``condense_nm`` makes them.
implementation
    "xla", "mosaic_tpu", "mosaic_gpu": who computes. The same word is the file name.
"""

from sparsejax.layouts._block import BlockLayout as BlockLayout
from sparsejax.layouts._block import check_layout as check_layout
from sparsejax.layouts._block import gather_blocks as gather_blocks
from sparsejax.layouts._block import scatter_blocks as scatter_blocks
from sparsejax.layouts._block import transpose_blocks as transpose_blocks
from sparsejax.layouts._fan_in import check_fan_in as check_fan_in
from sparsejax.layouts._fan_in import condense_fan_in as condense_fan_in
from sparsejax.layouts._fan_in import expand_fan_in as expand_fan_in
from sparsejax.layouts._nm import check_nm as check_nm
from sparsejax.layouts._nm import condense_nm as condense_nm
from sparsejax.layouts._nm import expand_nm as expand_nm
from sparsejax.layouts._nm import pack_nm as pack_nm
from sparsejax.layouts._nm import unpack_nm as unpack_nm

__all__ = [
    "BlockLayout",
    "check_fan_in",
    "check_layout",
    "check_nm",
    "condense_fan_in",
    "condense_nm",
    "expand_fan_in",
    "expand_nm",
    "gather_blocks",
    "pack_nm",
    "scatter_blocks",
    "transpose_blocks",
    "unpack_nm",
]
