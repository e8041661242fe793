"""Other people's libraries, for tests marked ``libraries``; `make test-libraries` runs them where all are installed."""

import importlib
import os

import pytest
import torch


def library(name: str):
    """The module ``name``; a test that asks for it is skipped where it is missing, and fails under
    ``REATTN_TEST_NO_SKIPS=1``.

    PyPI's torchvision is made for CUDA builds of torch. Beside a CPU build its operators cannot be loaded, and
    importing it fails for want of two of their names. No test calls them: names are enough.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for operator in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", schema)
    except ImportError:
        pass
    if os.environ.get("REATTN_TEST_NO_SKIPS") == "1":
        return importlib.import_module(name)
    return pytest.importorskip(name)
