"""README's INT4 table: `make int4`, with the flags that it names and `DFQ_DATA` naming real weights and images.

For each model, block size and way of choosing codes: top-1, agreement with float and SQNR on `imagenet_val`, and the
size of model.onnx. Calibrated on 32 synthetic images, fake-quantized in torch, no layer spared. What is done stays in
the folder and is not done again. What an export gives in ONNX Runtime is `accuracy.py`'s business.
"""

import argparse
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from accuracy import WEIGHTS

import dfq_deploy as dfq
from calibrators.files import written_whole
from calibrators.images import ImageSet
from calibrators.registry import pick
from dfq_deploy.building import float_stage
from dfq_deploy.formats import Job
from dfq_deploy.measures import sqnr_db
from dfq_deploy.models.loading import load_model
from dfq_deploy.planning import plan_of
from dfq_deploy.reference import Reference
from dfq_deploy.watch import SILENT
from dfq_deploy.workspace import Workspace
from exporters.qdq import InsertQDQ
from exporters.scales import shorten_scales
from exporters.to_onnx import save_model

METHODS = {"RTN": "none", "clip": "clip", "gptq": "gptq", "smooth, gptq": "smooth,gptq"}
BACKENDS = {"symmetric": "rtx", "asymmetric": "ort"}  # which of them has zero-points
BLOCKS = (32, 64, 128)


def main() -> None:
    """Measure what is not measured yet, and tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, results.json and table.md")
    parser.add_argument("--models", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--generator", default="dfq", help="makes the images")
    parser.add_argument("--limit", type=int, help="measure on this many images, evenly spaced")
    args = parser.parse_args()
    data = Path(os.environ["DFQ_DATA"]).resolve()
    args.out /= f"{args.generator}-{args.limit or 'all'}"
    for name in args.models:
        (args.out / name).mkdir(parents=True, exist_ok=True)
        if not _images(args.out, name).exists():
            checkpoint = data / "weights" / WEIGHTS[name]
            recipe = dfq.Recipe(model=name, checkpoint=checkpoint, generator=args.generator)
            dfq.generate(recipe, _images(args.out, name))
        rows(name, data, args.out, args.limit)
        (args.out / name / "table.md").write_text(table(json.loads((args.out / name / "results.json").read_text())))
        print((args.out / name / "table.md").read_text())


def rows(name: str, data: Path, out: Path, limit: int | None) -> None:
    """Add what is missing to the results of the model `name`."""
    model = load_model(name, checkpoint=data / "weights" / WEIGHTS[name])
    real: ImageSet = pick("calibrators.sources", "folder").open_images(data / "imagenet_val", model.preprocess)
    real = real if limit is None else real.spread(limit)
    file = out / name / "results.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    floats = _logits(lambda batch: model.module(torch.from_numpy(batch)).numpy(), real)

    def keep(key: str, logits: np.ndarray, **facts: Any) -> None:
        found[key] = {**_scores(logits, floats, real), **facts}
        with written_whole(file) as temporary:
            temporary.write_text(json.dumps(found, indent=1))
        print(key, found[key], flush=True)

    for block, kind, method in itertools.product(BLOCKS, BACKENDS, METHODS):
        key = f"{method}, {kind}, {block}"
        if key in found:
            continue
        options = {"backend": BACKENDS[kind], "block": block, "refine": METHODS[method], "spare": "none"}
        recipe = _recipe(name, data, out, **options)
        with Workspace(out / name, lambda *_: None) as work:
            plan, refined, _ = plan_of(Job(recipe, model, ImageSet.load(_images(out, name)), work, SILENT))
            size = _size(InsertQDQ(plan)(ir.load(float_stage(model, work))).model)
        keep(key, _logits(Reference(refined, plan, model).quantized, real), mib=size)


def table(found: dict[str, Any]) -> str:
    """Markdown: per block size the points lost, agreement, SQNR and size."""
    lines = ["| | " + " | ".join(f"block {block}: drop, = float, dB, MiB" for block in BLOCKS) + " |"]
    lines.append("|---" * (len(BLOCKS) + 1) + "|")
    for row in (f"{method}, {kind}" for kind in BACKENDS for method in METHODS):
        cells = [found[f"{row}, {block}"] for block in BLOCKS]
        texts = [
            f"{c['float'] - c['top1']:.2f}, {c['agreement']:.2f} %, {c['sqnr_db']:.1f}, {c['mib']:.2f}" for c in cells
        ]
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def _recipe(name: str, data: Path, out: Path, **options: Any) -> dfq.Recipe:
    checkpoint = data / "weights" / WEIGHTS[name]
    return dfq.Recipe(model=name, checkpoint=checkpoint, calib=str(_images(out, name)), scheme="w4a16", **options)


def _images(out: Path, name: str) -> Path:
    return out / name / "images.safetensors"


def _logits(run: Callable[[np.ndarray], np.ndarray], images: ImageSet) -> np.ndarray:
    with torch.inference_mode():
        return np.concatenate([run(batch) for batch in images.batches(32)])


def _scores(logits: np.ndarray, floats: np.ndarray, images: ImageSet) -> dict[str, float]:
    assert images.labels is not None
    return {
        "n": len(images),
        "float": 100 * float((floats.argmax(1) == images.labels).mean()),
        "top1": 100 * float((logits.argmax(1) == images.labels).mean()),
        "agreement": 100 * float((logits.argmax(1) == floats.argmax(1)).mean()),
        "sqnr_db": sqnr_db(float(np.square(floats).sum()), float(np.square(logits - floats).sum())),
    }


def _size(model: ir.Model) -> float:
    """Of the file that ONNX Runtime would get, in MiB."""
    shorten_scales(model)
    with TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model.onnx")
        return sum(file.stat().st_size for file in Path(folder).iterdir()) / 2**20


if __name__ == "__main__":
    main()
