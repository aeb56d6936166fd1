"""From a dense network to a mixture of experts, and back: pure functions of trees.

``upcycle`` makes experts of feed-forward layers, by a ``Spec``, and says in its
``Report`` whether the network still computes what it did; ``prune_experts`` keeps those
experts that a task uses. ``reverse_sparsify`` makes dense layers of structured ones.
"""

from sparsejax.upcycling._modes import Adapters as Adapters
from sparsejax.upcycling._modes import Copy as Copy
from sparsejax.upcycling._modes import Drop as Drop
from sparsejax.upcycling._modes import Granular as Granular
from sparsejax.upcycling._modes import Shared as Shared
from sparsejax.upcycling._prune import Pruned as Pruned
from sparsejax.upcycling._prune import prune_experts as prune_experts
from sparsejax.upcycling._report import Report as Report
from sparsejax.upcycling._reverse_sparsify import Densified as Densified
from sparsejax.upcycling._reverse_sparsify import reverse_sparsify as reverse_sparsify
from sparsejax.upcycling._spec import Ffn as Ffn
from sparsejax.upcycling._spec import Move as Move
from sparsejax.upcycling._spec import Spec as Spec
from sparsejax.upcycling._upcycle import Upcycled as Upcycled
from sparsejax.upcycling._upcycle import upcycle as upcycle

__all__ = [
    "Adapters",
    "Copy",
    "Densified",
    "Drop",
    "Ffn",
    "Granular",
    "Move",
    "Pruned",
    "Report",
    "Shared",
    "Spec",
    "Upcycled",
    "prune_experts",
    "reverse_sparsify",
    "upcycle",
]
