"""README's accuracy tables: `make accuracy`, with `DFQ_DATA` naming real weights and images.

For each model, kind of calibration images, seed of these and chain of refine passes, one engine, checked on all of
`imagenet_val`; where the engine cannot run here, its `model.onnx` in ONNX Runtime. Everything else is the same; further
options of `dfq-deploy export` are passed on, so that other settings can be compared. An interrupted run goes on.
"""

import argparse
import itertools
import json
import os
from pathlib import Path

import dfq_deploy as dfq

WEIGHTS = {
    "vit_t": "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors",
    "deit_t": "deit_tiny_patch16_224.fb_in1k_LNfixedpoint.safetensors",
}
IMAGES = {"32 noise": "noise", "32 psaq_v1": "psaq_v1", "32 dfq": "dfq", "128 real": None}
TITLES = ("model", "images", "seed", "refine", "float", "reference", "engine", "drop")
TITLES += ("SQNR to float, dB", "engine = float", "engine = reference", "noise floor", "in float")


def main() -> None:
    """Make, check and tabulate all combinations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of table.md")
    parser.add_argument("--models", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--images", nargs="+", choices=list(IMAGES), default=list(IMAGES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--refine", nargs="+", default=["default"], help="chains, such as smooth,reach")
    parser.add_argument("--backend", default="ort")
    parser.add_argument("--observer", default="auto")
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--float", default="fp32")
    parser.add_argument("--spare", default="auto")
    args = parser.parse_args()
    data = Path(os.environ["DFQ_DATA"]).resolve()
    rows = ["| " + " | ".join(TITLES) + " |", "|---" * len(TITLES) + "|"]
    for model, images, seed, refine in itertools.product(args.models, args.images, args.seeds, args.refine):
        generator = IMAGES[images]
        recipe = dfq.Recipe(
            model=model,
            checkpoint=data / "weights" / WEIGHTS[model],
            calib="synthetic" if generator else f"folder:{data / 'imagenet_calib'}",
            generator=generator or "noise",
            seed=seed,
            refine=refine,
            backend=args.backend,
            observer=args.observer,
            scheme=args.scheme,
            block=args.block,
            float=args.float,
            spare=args.spare,
        )
        folder = args.out / f"{model}-{generator or 'real'}-{seed}"
        dfq.export(recipe, folder, images=f"folder:{data / 'imagenet_val'}")
        rows.append(row(json.loads((folder / "report.json").read_text()), model, images, str(seed), refine))
        print(rows[-1], flush=True)
    (args.out / "table.md").write_text("\n".join(rows) + "\n")


def row(report: dict, *names: str) -> str:
    """A line of the table."""
    top1, agree, layers = report["top1"], report["agreement"], report["engine"]["layers"]
    figures = [top1["float"], top1["reference"], top1["engine"], report["drop"][0]]
    figures += [report["sqnr_db"]["engine_float"], agree["engine_float"]]
    figures += [agree["engine_reference"], agree["noise_floor"]]
    return "| " + " | ".join([*names, *(f"{figure:.2f}" for figure in figures), str(layers.get("fp32", 0))]) + " |"


if __name__ == "__main__":
    main()
