"""Fused re-attention: softmax attention whose maps are mixed across heads and normalised (DeepViT, arXiv
2103.11886)."""

__version__ = "0.1.0"

import importlib.util as _importlib_util
import warnings as _warnings

from reattn.backends import available_backends, use_backend
from reattn.functional import re_attention
from reattn.module import ReAttention

__all__ = ["ReAttention", "__version__", "available_backends", "re_attention", "use_backend"]

if _importlib_util.find_spec("reattn.kernels") is None:
    _warnings.warn(
        f"reattn is imported from the source tree {__path__[0]}, which holds no kernels, not as it was installed: "
        "start Python in another folder, or install the tree by `pip install -e .`",
        RuntimeWarning,
        stacklevel=2,
    )
