"""Models built on :class:`reattn.ReAttention`."""

from reattn.models.deepvit import (
    DeepViT,
    SelfAttention,
    create_model,
    deepvit_16b,
    deepvit_24b,
    deepvit_32b,
    deepvit_l,
    deepvit_l_384,
    deepvit_s,
    list_models,
    resample_pos_embed,
)

__all__ = [
    "DeepViT",
    "SelfAttention",
    "create_model",
    "deepvit_16b",
    "deepvit_24b",
    "deepvit_32b",
    "deepvit_l",
    "deepvit_l_384",
    "deepvit_s",
    "list_models",
    "resample_pos_embed",
]
