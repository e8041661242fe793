"""Fused re-attention: softmax attention whose maps are mixed across heads and normalised (DeepViT, arXiv
2103.11886)."""

__version__ = "0.1.0"

from reattn.backends import available_backends, use_backend
from reattn.functional import re_attention
from reattn.module import ReAttention

__all__ = ["ReAttention", "__version__", "available_backends", "re_attention", "use_backend"]
