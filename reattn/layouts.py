"""Names that other implementations give the tensors of one attention, and their translation to ours."""

from __future__ import annotations

from typing import Any

# By the end of the key: the official code's, then the second form's.
_RENAMED = {
    "reatten_matrix.weight": "theta",
    "reatten_matrix.bias": "theta_bias",
    "var_norm.": "head_norm.",
    "to_qkv.": "qkv.",
    "reattn_weights": "theta",
    "reattn_norm.1.": "head_norm.",
    "to_out.0.": "proj.",
}


def translate(state_dict: dict[str, Any], prefix: str, second_form: bool) -> None:
    """Renames, in place, one attention's tensors from the official layout or the second form to ours."""
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
                # The convolution's weight is (out, in, 1, 1): theta transposed.
                state_dict[prefix + ours + name[len(foreign) :]] = (
                    tensor[:, :, 0, 0].t() if foreign == "reatten_matrix.weight" else tensor
                )
                break
