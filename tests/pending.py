"""A bundle for TensorRT as a machine without it makes one: everything but the engine."""

import shutil
from pathlib import Path
from typing import Any

import pytest

import dfq_deploy as dfq
from dfq_deploy.evaluate import Check
from exporters.backends import trt

PENDING: dict[str, Any] = {"model": "demo", "generator": "noise", "count": 8, "backend": "trt", "batch": "1,2,4"}


def export_pending(demo_bundle: Path, folder: Path, **other: Any) -> Check:
    """Export the demo for TensorRT into `folder`, on images and a float model that `demo_bundle` has already."""
    shutil.copytree(demo_bundle / "work", folder / "work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trt, "trt", None)
        return dfq.export(dfq.Recipe(**PENDING | other), folder, limit=4)
