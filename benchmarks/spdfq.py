"""What each part of SPDFQ is worth: `make spdfq`, with `DFQ_DATA` naming real weights and images.

Attention Priors Alignment, Multi-Semantic Reinforcement and Softlabel Learning, each with and without the others; the
images calibrate one scheme, which is simulated on `imagenet_val`. Eight sets of images: hours on a CPU.
"""

import argparse
import itertools
import os
import time
from pathlib import Path

from accuracy import WEIGHTS

import dfq_deploy as dfq
from dfq_deploy.generation import GenerateOptions
from dfq_deploy.generation.generators.spdfq import Spdfq
from dfq_deploy.models.loading import load_model
from dfq_deploy.recipe import CalibrateRecipe


def main() -> None:
    """Make, simulate and tabulate all combinations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of table.md")
    parser.add_argument("--model", choices=list(WEIGHTS), default="deit_t")
    parser.add_argument("--scheme", default="w4a4")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    data = Path(os.environ["DFQ_DATA"]).resolve()
    checkpoint = data / "weights" / WEIGHTS[args.model]
    model = load_model(args.model, checkpoint=checkpoint)
    rows = ["| alignment | reinforcement | soft labels | top-1 | = float | SQNR, dB | seconds |", "|---" * 7 + "|"]
    for parts in itertools.product((False, True), repeat=3):
        began = time.monotonic()
        folder = args.out / "".join("-+"[part] for part in parts)
        images = Spdfq(*parts).generate(model, GenerateOptions(args.count, args.seed))
        seconds = time.monotonic() - began
        images.save(folder / "images.safetensors")
        recipe = CalibrateRecipe(
            model=args.model, checkpoint=checkpoint, calib=str(folder / "images.safetensors"), scheme=args.scheme
        )
        found = dfq.simulate(recipe, folder, images=f"folder:{data / 'imagenet_val'}", limit=args.limit)
        assert found.top1 is not None
        shown = " | ".join("yes" if part else "no" for part in parts)
        percents = f"{found.top1['simulated'].percent:.2f} | {found.agreement.percent:.2f}"
        rows.append(f"| {shown} | {percents} | {found.sqnr_db:.2f} | {seconds:.0f} |")
        print(rows[-1], flush=True)
    (args.out / "table.md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
