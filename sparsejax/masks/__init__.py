"""From scores to boolean trees: selection, distribution, application, report.

A mask is shaped like its weight and is True where the weight is kept. Nothing here
knows an optimizer or a module.
"""

from sparsejax.masks._distribution import Axes as Axes
from sparsejax.masks._distribution import check_density as check_density
from sparsejax.masks._distribution import erdos_renyi as erdos_renyi
from sparsejax.masks._distribution import exact_count as exact_count
from sparsejax.masks._distribution import uniform as uniform
from sparsejax.masks._given import given as given
from sparsejax.masks._global import global_topk_masks as global_topk_masks
from sparsejax.masks._paths import match_names as match_names
from sparsejax.masks._paths import named_leaves as named_leaves
from sparsejax.masks._paths import path_name as path_name
from sparsejax.masks._search import count_true as count_true
from sparsejax.masks._select import nm_mask as nm_mask
from sparsejax.masks._select import topk_mask as topk_mask
from sparsejax.masks._structure import NM as NM
from sparsejax.masks._structure import Blocks as Blocks
from sparsejax.masks._structure import Columns as Columns
from sparsejax.masks._structure import FanIn as FanIn
from sparsejax.masks._structure import Rows as Rows
from sparsejax.masks._structure import Unstructured as Unstructured
from sparsejax.masks._structure import structured_mask as structured_mask
from sparsejax.masks._tree import DensityReport as DensityReport
from sparsejax.masks._tree import apply_masks as apply_masks
from sparsejax.masks._tree import density as density

__all__ = (
    "Axes",
    "Blocks",
    "Columns",
    "DensityReport",
    "FanIn",
    "NM",
    "Rows",
    "Unstructured",
    "apply_masks",
    "check_density",
    "count_true",
    "density",
    "erdos_renyi",
    "exact_count",
    "given",
    "global_topk_masks",
    "match_names",
    "named_leaves",
    "nm_mask",
    "path_name",
    "structured_mask",
    "topk_mask",
    "uniform",
)
