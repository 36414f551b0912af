"""README's table of simulated schemes: `make simulated`, with `DFQ_DATA` naming real weights and images.

For each model, seed and scheme one simulation from synthetic images alone, on all of `imagenet_val`. The images are the
same for all schemes of a model and a seed, as long as the folder stays.
"""

import argparse
import itertools
import os
import time
from pathlib import Path

from accuracy import WEIGHTS

import dfq_deploy as dfq
from dfq_deploy.recipe import CalibrateRecipe


def main() -> None:
    """Simulate and tabulate all combinations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of table.md")
    parser.add_argument("--models", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--schemes", nargs="+", default=["w4a8", "w6a6", "w4a4"])
    parser.add_argument("--generator", default="dfq")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--refine", default="default")
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    data = Path(os.environ["DFQ_DATA"]).resolve()
    rows = ["| model | seed | scheme | float | simulated | drop | = float | SQNR, dB | seconds |", "|---" * 9 + "|"]
    for model, seed in itertools.product(args.models, args.seeds):
        checkpoint = data / "weights" / WEIGHTS[model]
        name = f"{model}-{args.generator}-{args.count}-{seed}"
        images = args.out / f"{name}.safetensors"
        recipe = CalibrateRecipe(
            model=model, checkpoint=checkpoint, generator=args.generator, count=args.count, seed=seed
        )
        if not images.exists():
            dfq.generate(recipe, images)
        for scheme in args.schemes:
            began = time.monotonic()
            found = dfq.simulate(
                CalibrateRecipe(
                    model=model, checkpoint=checkpoint, calib=str(images), scheme=scheme, refine=args.refine
                ),
                args.out / f"{name}-{scheme}",
                images=f"folder:{data / 'imagenet_val'}",
                limit=args.limit,
            )
            assert found.top1 is not None and found.drop is not None
            cells = [found.top1["float"].percent, found.top1["simulated"].percent, found.drop[0]]
            cells += [found.agreement.percent, found.sqnr_db]
            seconds = time.monotonic() - began
            numbers = " | ".join(f"{cell:.2f}" for cell in cells)
            rows.append(f"| {model} | {seed} | {scheme} | {numbers} | {seconds:.0f} |")
            print(rows[-1], flush=True)
    (args.out / "table.md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
