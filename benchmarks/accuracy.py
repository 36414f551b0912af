"""README's accuracy tables: `make accuracy`, with `DFQ_DATA` naming real weights and images.

For each model and each kind of calibration images, one engine, checked on all of `imagenet_val`; where the engine
cannot run here, its `model.onnx` in ONNX Runtime. Everything but the images is the same; further options of `dfq-deploy
export` are passed on, so that other settings can be compared.
"""

import argparse
import json
import os
from pathlib import Path

import dfq_deploy as dfq

WEIGHTS = {
    "vit_t": "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors",
    "deit_t": "deit_tiny_patch16_224.fb_in1k_LNfixedpoint.safetensors",
}
IMAGES = {"32 noise": "noise", "32 psaq_v1": "psaq_v1", "128 real": None}


def main() -> None:
    """Make, check and tabulate all combinations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of table.md")
    parser.add_argument("--models", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--images", nargs="+", choices=list(IMAGES), default=list(IMAGES))
    parser.add_argument("--backend", default="ort")
    parser.add_argument("--observer", default="auto")
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--float", default="fp32")
    parser.add_argument("--spare", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = Path(os.environ["DFQ_DATA"]).resolve()
    titles = ["model", "images", "float", "reference", "engine", "drop"]
    titles += ["SQNR to float, dB", "engine = float", "engine = reference", "noise floor"]
    rows = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for model in args.models:
        for images in args.images:
            generator = IMAGES[images]
            recipe = dfq.Recipe(
                model=model,
                checkpoint=data / "weights" / WEIGHTS[model],
                calib="synthetic" if generator else f"folder:{data / 'imagenet_calib'}",
                generator=generator or "noise",
                seed=args.seed,
                backend=args.backend,
                observer=args.observer,
                scheme=args.scheme,
                block=args.block,
                float=args.float,
                spare=args.spare,
            )
            folder = args.out / f"{model}-{generator or 'real'}"
            dfq.export(recipe, folder, images=f"folder:{data / 'imagenet_val'}")
            found = json.loads((folder / "report.json").read_text())
            top1, agree = found["top1"], found["agreement"]
            cells = [top1["float"], top1["reference"], top1["engine"], found["drop"][0]]
            cells += [
                found["sqnr_db"]["engine_float"],
                agree["engine_float"],
                agree["engine_reference"],
                agree["noise_floor"],
            ]
            rows.append(f"| {model} | {images} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
            print(rows[-1], flush=True)
    (args.out / "table.md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
