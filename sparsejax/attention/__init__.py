"""Which query attends to which key: mask expressions, and the blocks they leave.

Positions: i of the query, j of the key. A mask is True where attention is allowed, as
``jax.nn.dot_product_attention`` has it. Axes: b batch, h heads, t queries, s keys, nq
and nk blocks of these; ``b|1`` may be 1 and then holds for all.

Selectors choose the blocks by what queries and keys hold: pure functions ``(query, key,
..., *, block_shape, budget) -> (BlockMask, BlockStats)``, each after its paper. A
budget is a number of blocks per query block (an int), their share of all (a float in
(0, 1]), ``TopP``, ``Threshold``, ``Tokens`` or ``GaussianTopK``. ``expr`` says what may
be attended at all, ``causal`` unless given, ``offset`` where the first query stands
among the keys. Nothing in a selection has a gradient, but by name: of scores
`list_scores` and `straight_through` make a bias of the operator; a learned gate is
taught `attention_block_probabilities`. The statistics are the budget as realized
(density), the attention that is kept (recall) and the blocks that are computed (work).
Call selectors inside jit, where what nobody uses of them, such as the recall, is not
computed.
"""

from sparsejax.attention._block_mask import BlockMask as BlockMask
from sparsejax.attention._block_mask import TransposedLists as TransposedLists
from sparsejax.attention._block_mask import block_mask as block_mask
from sparsejax.attention._budget import GaussianTopK as GaussianTopK
from sparsejax.attention._budget import Threshold as Threshold
from sparsejax.attention._budget import Tokens as Tokens
from sparsejax.attention._budget import TopP as TopP
from sparsejax.attention._chosen import chosen_blocks as chosen_blocks
from sparsejax.attention._chosen import chosen_keys as chosen_keys
from sparsejax.attention._chosen import in_order as in_order
from sparsejax.attention._expressions import Expression as Expression
from sparsejax.attention._expressions import causal as causal
from sparsejax.attention._expressions import everything as everything
from sparsejax.attention._expressions import from_array as from_array
from sparsejax.attention._expressions import segments as segments
from sparsejax.attention._expressions import sliding_window as sliding_window
from sparsejax.attention._function import from_function as from_function
from sparsejax.attention._hooks import list_scores as list_scores
from sparsejax.attention._hooks import straight_through as straight_through
from sparsejax.attention._lowering import Lowered as Lowered
from sparsejax.attention._pages import PageSummary as PageSummary
from sparsejax.attention._pages import summarize_pages as summarize_pages
from sparsejax.attention._pages import update_pages as update_pages
from sparsejax.attention._patterns import block_diagonal as block_diagonal
from sparsejax.attention._patterns import dilated as dilated
from sparsejax.attention._patterns import global_tokens as global_tokens
from sparsejax.attention._patterns import keys_below as keys_below
from sparsejax.attention._patterns import prefix as prefix
from sparsejax.attention._patterns import random_blocks as random_blocks
from sparsejax.attention._patterns import strided as strided
from sparsejax.attention._per_head import per_head as per_head
from sparsejax.attention._plots import plot_block_mask as plot_block_mask
from sparsejax.attention._plots import plot_heads as plot_heads
from sparsejax.attention._select_double import double_sparsity as double_sparsity
from sparsejax.attention._select_double import label_channels as label_channels
from sparsejax.attention._select_flex import flex_prefill as flex_prefill
from sparsejax.attention._select_moba import moba as moba
from sparsejax.attention._select_nsa import NsaCompression as NsaCompression
from sparsejax.attention._select_nsa import nsa as nsa
from sparsejax.attention._select_nsa import nsa_compress as nsa_compress
from sparsejax.attention._select_nsa import nsa_compress_init as nsa_compress_init
from sparsejax.attention._select_pooled import pooled_blocks as pooled_blocks
from sparsejax.attention._select_pooled import pooled_scores as pooled_scores
from sparsejax.attention._select_quest import quest as quest
from sparsejax.attention._select_routing import Clusters as Clusters
from sparsejax.attention._select_routing import balanced_clusters as balanced_clusters
from sparsejax.attention._select_routing import routing as routing
from sparsejax.attention._select_routing import update_centroids as update_centroids
from sparsejax.attention._select_s2 import s2_shards as s2_shards
from sparsejax.attention._select_sample import sample_attention as sample_attention
from sparsejax.attention._select_seer import SeerGate as SeerGate
from sparsejax.attention._select_seer import seer as seer
from sparsejax.attention._select_seer import seer_init as seer_init
from sparsejax.attention._select_seer import seer_logits as seer_logits
from sparsejax.attention._select_seer import seer_loss as seer_loss
from sparsejax.attention._select_sparge import sparge as sparge
from sparsejax.attention._select_sparsed import reuse as reuse
from sparsejax.attention._select_sparsed import sparsed as sparsed
from sparsejax.attention._select_sparsifiner import Connectivity as Connectivity
from sparsejax.attention._select_sparsifiner import sparsifiner as sparsifiner
from sparsejax.attention._select_sparsifiner import sparsifiner_init as sparsifiner_init
from sparsejax.attention._select_sparsifiner import (
    sparsifiner_logits as sparsifiner_logits,
)
from sparsejax.attention._select_twilight import twilight as twilight
from sparsejax.attention._select_vertical_slash import vertical_slash as vertical_slash
from sparsejax.attention._select_xattention import xattention as xattention
from sparsejax.attention._statistical import statistical_top_k as statistical_top_k
from sparsejax.attention._stats import BlockStats as BlockStats
from sparsejax.attention._stats import (
    attention_block_probabilities as attention_block_probabilities,
)
from sparsejax.attention._stats import block_stats as block_stats

__all__ = [
    "BlockMask",
    "BlockStats",
    "Clusters",
    "Connectivity",
    "Expression",
    "GaussianTopK",
    "Lowered",
    "NsaCompression",
    "PageSummary",
    "SeerGate",
    "Threshold",
    "Tokens",
    "TopP",
    "TransposedLists",
    "attention_block_probabilities",
    "balanced_clusters",
    "block_diagonal",
    "block_mask",
    "block_stats",
    "causal",
    "chosen_blocks",
    "chosen_keys",
    "dilated",
    "double_sparsity",
    "everything",
    "flex_prefill",
    "from_array",
    "from_function",
    "global_tokens",
    "in_order",
    "keys_below",
    "label_channels",
    "list_scores",
    "moba",
    "nsa",
    "nsa_compress",
    "nsa_compress_init",
    "per_head",
    "plot_block_mask",
    "plot_heads",
    "pooled_blocks",
    "pooled_scores",
    "prefix",
    "quest",
    "random_blocks",
    "reuse",
    "routing",
    "s2_shards",
    "sample_attention",
    "seer",
    "seer_init",
    "seer_logits",
    "seer_loss",
    "segments",
    "sliding_window",
    "sparge",
    "sparsed",
    "sparsifiner",
    "sparsifiner_init",
    "sparsifiner_logits",
    "statistical_top_k",
    "straight_through",
    "strided",
    "summarize_pages",
    "twilight",
    "update_centroids",
    "update_pages",
    "vertical_slash",
    "xattention",
]
