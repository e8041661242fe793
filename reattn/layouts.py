"""Names that other implementations give the tensors of one attention, and their translation to ours.

======================== ===============================================================================================
layout                   theirs, and what :class:`reattn.ReAttention` takes it
======================== ===============================================================================================
official DeepViT         ``reatten_matrix``, ``var_norm``
second form              ``reattn_weights``, ``reattn_norm.1``, ``to_qkv``, ``to_out.0``, ``norm``
CaiT (timm)              ``proj_l``, ``proj_w``: ``pre_mix=True, norm=None``
x-transformers           ``to_q``, ``to_k``, ``to_v``, ``to_out``, ``attend.pre_softmax_talking_heads``,
                         ``attend.post_softmax_talking_heads``: ``pre_mix=True, pre_bias=False, theta_bias=False,
                         proj_bias=False, norm=None``; ``pre_mix=False`` or ``post_mix=False`` without the one or the
                         other. Since version 1.39 it adds the mixed scores to the scores: so is it read.
======================== ===============================================================================================
"""

from __future__ import annotations

from typing import Any

import torch

# By the end of the key, in the order of the table.
_RENAMED = {
    "reatten_matrix.weight": "theta",
    "reatten_matrix.bias": "theta_bias",
    "var_norm.": "head_norm.",
    "to_qkv.": "qkv.",
    "reattn_weights": "theta",
    "reattn_norm.1.": "head_norm.",
    "to_out.0.": "proj.",
    "proj_l.weight": "pre_theta",
    "proj_l.bias": "pre_bias",
    "proj_w.weight": "theta",
    "proj_w.bias": "theta_bias",
    "attend.pre_softmax_talking_heads.weight": "pre_theta",
    "attend.post_softmax_talking_heads.weight": "theta",
    "to_out.weight": "proj.weight",
}
# Weights of linear layers and 1x1 convolutions, (out, in) and (out, in, 1, 1): theta transposed.
_TRANSPOSED = [name for name, ours in _RENAMED.items() if ours.endswith("theta") and name != "reattn_weights"]
_RESIDUAL = "attend.pre_softmax_talking_heads.weight"


def translate(state_dict: dict[str, Any], prefix: str, second_form: bool) -> None:
    """Renames, in place, one attention's tensors from another layout to ours."""
    separate = [f"{prefix}to_{part}.weight" for part in "qkv"]
    if all(key in state_dict for key in separate):
        state_dict[prefix + "qkv.weight"] = torch.cat([state_dict.pop(key) for key in separate])
    renamed = dict(_RENAMED)
    if second_form:
        # The second form keeps the LayerNorm of the block's input here; in ours, and timm's, ``norm`` follows the
        # attention.
        renamed["norm."] = "pre_norm."
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key[len(prefix) :]
        for foreign, ours in renamed.items():
            if name == foreign or (foreign.endswith(".") and name.startswith(foreign)):
                tensor = state_dict.pop(key)
                if foreign in _TRANSPOSED:
                    tensor = tensor.flatten(1).t().contiguous()
                if foreign == _RESIDUAL:
                    tensor = tensor + torch.eye(len(tensor), device=tensor.device, dtype=tensor.dtype)
                state_dict[prefix + ours + name[len(foreign) :]] = tensor
                break
