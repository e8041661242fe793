"""timm for the tests that use it; they are skipped where it is missing."""

import importlib
import importlib.util

import pytest
import torch


def import_timm():
    """timm with what it imports, torchvision.

    PyPI's torchvision is made for CUDA: beside a CPU build of torch its operators cannot be loaded, and importing it
    fails for want of two of their names. No test calls them: names are enough.
    """
    for name in ("timm", "torchvision"):
        if importlib.util.find_spec(name) is None:
            pytest.skip("needs timm")
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("timm")
