"""Register models with timm: ``import reattn.timm``, and ``timm.create_model("deepvit_s")`` knows them.

``python -m reattn.timm SCRIPT [ARGUMENT ...]`` runs a script, such as timm's ``train.py`` or ``validate.py``, in which
they are registered; under torchrun, ``torchrun --nproc-per-node 8 -m reattn.timm train.py ...``.

Every name of :func:`reattn.models.list_models` becomes an entrypoint of timm's registry:

======================= ================================================================================================
``timm.create_model``   makes of it
======================= ================================================================================================
keywords                arguments of :class:`reattn.models.DeepViT`, such as ``num_classes``, ``in_chans``,
                        ``img_size``, ``drop_rate``, ``drop_path_rate``, ``global_pool``; ``norm_layer`` and
                        ``act_layer`` by timm's names too; ``norm="none"`` for None, which timm takes for a keyword that
                        is not given; ``attention="self"`` is the plain ViT of the same shape, on train.py's command
                        line ``--model-kwargs attention=self``
``pretrained=True``     loads the checkpoint that ``pretrained_cfg_overlay={"file": path}`` names (``--pretrained-path``
                        of train.py), in any layout of :func:`reattn.checkpoints.load_checkpoint`, or what
                        ``timm.models.save_for_hf`` saved; ``ValueError`` without either: weights are not distributed.
                        A checkpoint's images must have as many channels
``checkpoint_path``     as for timm's own models: the same classes and image size
``features_only``       as for timm's own ViTs, ``out_indices`` included
data configuration      mean and std 0.5, crop 0.9, at 384 pixels 1.0, bicubic, input size the model's
======================= ================================================================================================

And the ViTs, DeiTs and CaiTs of timm, but for those with parallel blocks or differential attention, get another
entrypoint, ``vit_small_patch16_224_reattn`` as an example: the same model, with the same pretrained weights, after
:func:`reattn.convert.to_re_attention`. Its keywords ``re_attention_blocks``, ``norm`` (None by default, so that
training starts at what the weights compute) and ``backend`` are that function's. A checkpoint that holds theta is
loaded after the conversion, any other before it.

Optimizers that ``timm.optim.create_optimizer_v2`` makes for a model with Muon leave theta to their fallback, AdamW: the
step that Muon makes is meant for matrices between wide layers, not for one over the heads.

Raises ``ImportError`` where timm cannot be imported, with the reason.

Source: timm's model registry, ``timm.models.register_model``; the data configuration is the official DeepViT code's.
"""

from __future__ import annotations

import functools
import runpy
import sys
from pathlib import Path
from typing import Any

from torch import nn

try:
    from timm import models, optim
    from timm.layers import get_act_layer, get_norm_layer
    from timm.models import register_model
except (ImportError, RuntimeError) as error:  # the latter from a torchvision made for another build of torch
    raise ImportError(
        "reattn.timm needs timm >= 1.0 (pip install timm) and a torchvision of the same build as the installed torch; "
        f"importing timm failed: {error}"
    ) from error

from reattn.checkpoints import load_checkpoint, read_checkpoint, select_state_dict
from reattn.convert import to_re_attention
from reattn.models import DeepViT, create_model, list_models
from reattn.models.deepvit import checkpoint_filter_fn
from reattn.module import ReAttention

_SUFFIX = "_reattn"
# But for parallel blocks and differential attention, which have no equivalent.
_CONVERTED = models.list_models(
    module=["vision_transformer", "deit", "cait"], exclude_filters=["*_xp_*", "vit_d*", "vit_p*", "*" + _SUFFIX]
)
__all__ = list_models() + [name + _SUFFIX for name in _CONVERTED]


def _entrypoint(name: str) -> Any:
    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: Any = None,
        out_indices: Any = 3,
        **kwargs: Any,
    ) -> nn.Module:
        if isinstance(pretrained_cfg, str):
            raise ValueError(f"model_name must be {name}, which has no pretrained tags, got {name}.{pretrained_cfg}")
        sources = ("file", "state_dict", "hf_hub_id", "url")
        source = {key: _entry(pretrained_cfg, key) for key in sources} | (pretrained_cfg_overlay or {})
        if pretrained and not any(source[key] for key in sources):
            raise ValueError(
                f"pretrained must be False for {name}, whose weights are not distributed, or come with the path of a "
                'checkpoint, pretrained_cfg_overlay={"file": path} (train.py: --pretrained-path), got True'
            )
        # A folder, or a repository of the hub, is what timm itself saved.
        checkpoint = source["file"] or source["state_dict"]
        native = isinstance(checkpoint, str | Path) and Path(checkpoint).is_dir() or not checkpoint

        def deepvit(**options: Any) -> DeepViT:
            for keyword, get in (("norm_layer", get_norm_layer), ("act_layer", get_act_layer)):
                if isinstance(options.get(keyword), str):
                    try:
                        options[keyword] = get(options[keyword])
                    except KeyError:
                        raise ValueError(f"{keyword} must be known to timm, got {options[keyword]!r}") from None
            if options.get("norm") == "none":
                options["norm"] = None
            model = create_model(name, **options)
            if pretrained and not native:
                load_checkpoint(model, checkpoint)
            return model

        return models.build_model_with_cfg(
            deepvit,
            name,
            pretrained and native,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=pretrained_cfg_overlay,
            cache_dir=cache_dir,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
            **kwargs,
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"``reattn.models.{name}`` for timm."
    return build


def _converted_entrypoint(name: str) -> Any:
    create = models.model_entrypoint(name)
    own_name = name + _SUFFIX

    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        re_attention_blocks: Any = None,
        norm: str | None = None,
        backend: str = "auto",
        **kwargs: Any,
    ) -> nn.Module:
        # A folder, or a repository of the hub, that names this entrypoint holds theta.
        file = (pretrained_cfg_overlay or {}).get("file")
        converted = pretrained and (
            any(key.endswith("theta") for key in select_state_dict(read_checkpoint(file))[1])
            if file and not str(file).endswith(".npz")  # the original weights, which timm reads
            else _entry(pretrained_cfg, "source") in ("local-dir", "hf-hub")
        )
        if kwargs.get("features_only") and kwargs.get("feature_cls") == "fx":
            raise ValueError(f"feature_cls must be 'getter' or 'hook' for {own_name}, got 'fx'")
        if converted and kwargs.get("features_only"):
            raise ValueError(
                f"features_only must be False for saved weights of {own_name}: wrap the model that is built without it "
                "in timm.models.FeatureGetterNet"
            )
        model = create(
            pretrained=pretrained and not converted,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=pretrained_cfg_overlay,
            **kwargs,
        )
        to_re_attention(model, re_attention_blocks, None if norm == "none" else norm, backend=backend)
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "architecture": own_name}
        if converted:
            models.load_pretrained(
                model,
                num_classes=model.num_classes,
                in_chans=kwargs.get("in_chans", 3),
                filter_fn=getattr(sys.modules[create.__module__], "checkpoint_filter_fn", None),
            )
        return model

    build.__name__ = build.__qualname__ = own_name
    build.__doc__ = f"timm's ``{name}`` with re-attention."
    return build


def _entry(cfg: Any, key: str) -> Any:
    """What a pretrained configuration, a dict or one of timm's, says under ``key``."""
    return cfg.get(key) if isinstance(cfg, dict) else getattr(cfg, key, None)


def _register() -> None:
    cfgs = {name: {"url": "", **create_model(name, device="meta").default_cfg} for name in list_models()}
    for name in _CONVERTED:
        for tagged, cfg in models.get_arch_pretrained_cfgs(name).items():
            cfgs[tagged.replace(name, name + _SUFFIX, 1)] = cfg
    # Where register_model looks for them.
    globals()["default_cfgs"] = models.generate_default_cfgs(cfgs)
    for entrypoint in (*map(_entrypoint, list_models()), *map(_converted_entrypoint, _CONVERTED)):
        globals()[entrypoint.__name__] = register_model(entrypoint)


def _keep_theta_from_muon() -> None:
    registry = getattr(sys.modules.get(optim.create_optimizer_v2.__module__), "default_registry", None)
    if registry is None:  # an older timm, without Muon
        return
    create = registry.create_optimizer

    @functools.wraps(create)
    def create_optimizer(model_or_params: Any, opt: str, *args: Any, **kwargs: Any) -> Any:
        modules = model_or_params.modules() if isinstance(model_or_params, nn.Module) else ()
        if "muon" in opt.lower() and any(isinstance(module, ReAttention) for module in modules):
            kwargs["fallback_list"] = {*kwargs.get("fallback_list", ()), "*theta"}
        return create(model_or_params, opt, *args, **kwargs)

    registry.create_optimizer = create_optimizer


_register()
_keep_theta_from_muon()


def main(arguments: list[str]) -> None:
    """Run the script ``arguments[0]`` with the other arguments, as Python itself would."""
    if not arguments or arguments[0].startswith("-"):
        sys.exit("usage: python -m reattn.timm SCRIPT [ARGUMENT ...]")
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
