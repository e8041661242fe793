"""Measures of attention collapse (DeepViT, arXiv 2103.11886, section 3)."""

from reattn.analysis.similarity import block_similarity, column_similarity, similar_blocks, visit_attention_maps

__all__ = ["block_similarity", "column_similarity", "similar_blocks", "visit_attention_maps"]
