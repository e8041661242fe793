"""Measures and figures of attention collapse (DeepViT, arXiv 2103.11886, section 3) for any model.

``python -m reattn.analysis`` draws and writes everything for a model and a folder of images. The figures need
matplotlib, the command Pillow and tqdm too: ``pip install 'reattn[analysis]'``; the rest needs torch alone.
"""

from reattn.analysis.attentions import MapKind, register_attention, timm_maps, timm_values
from reattn.analysis.collect import (
    AttentionBlock,
    attention_hooks,
    find_attentions,
    visit_attention_maps,
    visit_blocks,
)
from reattn.analysis.features import FeatureMaps, feature_maps, query_maps, token_similarity
from reattn.analysis.grid import TokenGrid, token_grid
from reattn.analysis.measure import BlockInfo, Measurements, describe_blocks, measure_attention
from reattn.analysis.plots import (
    name_figure,
    plot_curves,
    plot_feature_maps,
    plot_feature_strengths,
    plot_head_similarity,
    plot_query_maps,
    plot_rollout,
    plot_similar_blocks,
    plot_similarity,
    plot_similarity_matrix,
    save_figure,
)
from reattn.analysis.rollout import attention_rollout
from reattn.analysis.similarity import (
    at_distances,
    block_similarity,
    column_similarity,
    head_similarity,
    similar_blocks,
    similar_heads,
    similarity_matrix,
)

__all__ = [
    "AttentionBlock",
    "BlockInfo",
    "FeatureMaps",
    "MapKind",
    "Measurements",
    "TokenGrid",
    "at_distances",
    "attention_hooks",
    "attention_rollout",
    "block_similarity",
    "column_similarity",
    "describe_blocks",
    "feature_maps",
    "find_attentions",
    "head_similarity",
    "measure_attention",
    "name_figure",
    "plot_curves",
    "plot_feature_maps",
    "plot_feature_strengths",
    "plot_head_similarity",
    "plot_query_maps",
    "plot_rollout",
    "plot_similar_blocks",
    "plot_similarity",
    "plot_similarity_matrix",
    "query_maps",
    "register_attention",
    "save_figure",
    "similar_blocks",
    "similar_heads",
    "similarity_matrix",
    "timm_maps",
    "timm_values",
    "token_grid",
    "token_similarity",
    "visit_attention_maps",
    "visit_blocks",
]
