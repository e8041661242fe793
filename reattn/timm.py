"""Register the DeepViT models with timm: ``import reattn.timm``, and ``timm.create_model("deepvit_s")`` knows them.

``python -m reattn.timm SCRIPT [ARGUMENT ...]`` runs a script, such as timm's ``train.py`` or ``validate.py``, in which
they are registered; under torchrun, ``torchrun --nproc-per-node 8 -m reattn.timm train.py ...``.

Every name of :func:`reattn.models.list_models` becomes an entrypoint of timm's registry:

======================= ================================================================================================
``timm.create_model``   makes of it
======================= ================================================================================================
keywords                arguments of :class:`reattn.models.DeepViT`, such as ``num_classes``, ``in_chans``,
                        ``img_size``, ``drop_rate``, ``drop_path_rate``, ``global_pool``; ``attention="self"`` is the
                        plain ViT of the same shape, on train.py's command line ``--model-kwargs attention=self``
``pretrained=True``     loads the checkpoint that ``pretrained_cfg_overlay={"file": path}`` names (``--pretrained-path``
                        of train.py), in any layout of :func:`reattn.checkpoints.load_checkpoint`; ``ValueError``
                        without a path: weights are not distributed
``checkpoint_path``     as for timm's own models: the same classes and image size
``features_only``       not supported: use ``forward_intermediates`` of the model
data configuration      mean and std 0.5, crop 0.9, at 384 pixels 1.0, bicubic, input size the model's
======================= ================================================================================================

Raises ``ImportError`` where timm cannot be imported, with the reason.

Source: timm's model registry, ``timm.models.register_model``; the data configuration is the official DeepViT code's.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

try:
    from timm.models import generate_default_cfgs, register_model
except (ImportError, RuntimeError) as error:  # the latter from a torchvision made for another build of torch
    raise ImportError(
        "reattn.timm needs timm >= 1.0 (pip install timm) and a torchvision of the same build as the installed torch; "
        f"importing timm failed: {error}"
    ) from error

from reattn.checkpoints import load_checkpoint
from reattn.models import DeepViT, create_model, list_models

__all__ = list_models()


def _default_cfg(name: str) -> dict[str, Any]:
    return {"url": "", **create_model(name, device="meta").default_cfg}


def _entrypoint(name: str) -> Any:
    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: Any = None,
        **kwargs: Any,
    ) -> DeepViT:
        if isinstance(pretrained_cfg, str):
            raise ValueError(f"model_name must be {name}, which has no pretrained tags, got {name}.{pretrained_cfg}")
        path = (pretrained_cfg_overlay or {}).get("file") or _entry(pretrained_cfg, "file")
        if pretrained and not path:
            raise ValueError(
                f"pretrained must be False for {name}, whose weights are not distributed, or come with the path of a "
                'checkpoint, pretrained_cfg_overlay={"file": path} (train.py: --pretrained-path), got True'
            )
        model = create_model(name, **kwargs)
        if pretrained:
            load_checkpoint(model, path)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"``reattn.models.{name}`` for timm."
    return build


def _entry(cfg: Any, key: str) -> Any:
    """What a pretrained configuration, a dict or one of timm's, says under ``key``."""
    return cfg.get(key) if isinstance(cfg, dict) else getattr(cfg, key, None)


# Where register_model looks for them.
default_cfgs = generate_default_cfgs({name: _default_cfg(name) for name in list_models()})
for _name in list_models():
    globals()[_name] = register_model(_entrypoint(_name))


def main(arguments: list[str]) -> None:
    """Run the script ``arguments[0]`` with the other arguments, as Python itself would."""
    if not arguments or arguments[0].startswith("-"):
        sys.exit("usage: python -m reattn.timm SCRIPT [ARGUMENT ...]")
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
