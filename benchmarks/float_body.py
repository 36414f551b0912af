"""What an fp16 or bf16 body costs: `make float-body`, with `DFQ_DATA` naming real weights and images.

No quantization: the float model with its body cast, against fp32, on all of `imagenet_val`. ONNX Runtime's CPU provider
is measured in fp16, but it rounds little more than the weights there and cannot run bf16 at all. So each body is also
run in torch in fp32 with the weights and every operator's result rounded to it, which is what a GPU does.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from accuracy import WEIGHTS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from calibrators.images import ImageSet
from calibrators.sources.folder import open_images
from dfq_deploy.models import Model
from dfq_deploy.models.loading import load_model
from exporters.cast import CastBody
from exporters.ort_engine import OrtEngine
from exporters.to_onnx import export_float, save_model

BATCH = 8


class Rounding(TorchDispatchMode):
    """Inside, every operator computes in float32 and gives its result rounded to another type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def rounded(value: Any) -> Any:
            is_float = isinstance(value, torch.Tensor) and value.dtype == torch.float32
            return value.to(self._dtype).float() if is_float else value

        return tree_map(rounded, func(*args, **(kwargs or {})))


def rounding(model: Model, dtype: torch.dtype) -> Callable[[np.ndarray], np.ndarray]:
    """`model` as it computes in `dtype`; its weights are rounded for good."""
    for parameter in model.module.parameters():
        parameter.data = parameter.to(dtype).float()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad(), Rounding(dtype):
            logits: np.ndarray = model.module(torch.from_numpy(images)).numpy()
        return logits

    return run


def logits_of(engine: Callable[[np.ndarray], np.ndarray], images: ImageSet) -> np.ndarray:
    """Logits of all `images`, float64."""
    return np.concatenate([engine(batch) for batch in images.batches(BATCH)]).astype(np.float64)


def main() -> None:
    """Measure and tabulate all bodies of all models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the ONNX files and of table.md")
    parser.add_argument("--models", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    args = parser.parse_args()
    data = Path(os.environ["DFQ_DATA"]).resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = ["| model | body | top-1 fp32 | top-1 | body = fp32 | SQNR to fp32, dB |", "|---|---|---|---|---|---|"]
    for name in args.models:

        def fresh(name: str = name) -> Model:
            return load_model(name, checkpoint=data / "weights" / WEIGHTS[name])

        model = fresh()
        images = open_images(data / "imagenet_val", model.preprocess)
        floats, cast = args.out / f"{name}.onnx", args.out / f"{name}-fp16.onnx"
        export_float(model.module, torch.from_numpy(images.pixels[0:2]), floats)
        save_model(CastBody("fp16")(ir.load(floats)).model, cast)
        wanted = logits_of(OrtEngine(floats, "cpu"), images)
        engines: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "fp16, ONNX Runtime": OrtEngine(cast, "cpu"),
            "fp16, rounded in torch": rounding(fresh(), torch.float16),
            "bf16, rounded in torch": rounding(fresh(), torch.bfloat16),
        }
        for body, engine in engines.items():
            found = logits_of(engine, images)
            top1, top1_fp32 = (100 * float((v.argmax(1) == images.labels).mean()) for v in (found, wanted))
            agreement = 100 * float((found.argmax(1) == wanted.argmax(1)).mean())
            sqnr = 10 * np.log10(np.square(wanted).sum() / np.square(found - wanted).sum())
            rows.append(f"| {name} | {body} | {top1_fp32:.2f} | {top1:.2f} | {agreement:.2f} | {sqnr:.1f} |")
            print(rows[-1], flush=True)
    (args.out / "table.md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
