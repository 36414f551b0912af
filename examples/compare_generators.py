"""Which generator's images calibrate best, on real models and images: `make generators`, with `DFQ_DATA` naming them.

For each model one benchmark (`dfq-deploy bench generators`) on all of `imagenet_val`, against real images drawn from
`imagenet_calib`; both tables come out together, and in table.md. With everything by default hours on a CPU. An
interrupted run goes on, and one with more seeds, schemes or generators computes what is missing.
"""

import argparse
import os
from pathlib import Path

import dfq_deploy as dfq
from dfq_deploy.progress import shown_progress

WEIGHTS = {
    "vit_t": "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors",
    "deit_t": "deit_tiny_patch16_224.fb_in1k_LNfixedpoint.safetensors",
}
FIELDS = ("generators", "schemes", "refine", "seeds", "count")


def main() -> None:
    """Run all benchmarks and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of a folder per model and of table.md")
    parser.add_argument("--models", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--generators", help="such as noise,dfq")
    parser.add_argument("--schemes", help="such as w8a8,w4a4")
    parser.add_argument(
        "--refine", action="append", help="none, default or a chain such as smooth,reach; may be given again"
    )
    parser.add_argument("--seeds", help="such as 0,1,2")
    parser.add_argument("--count", type=int, help="images per set")
    parser.add_argument("--limit", type=int, help="judge by this many images")
    args = parser.parse_args()
    data = Path(os.environ["DFQ_DATA"]).resolve()
    asked = {field: getattr(args, field) for field in FIELDS if getattr(args, field) is not None}
    if args.refine:
        asked["refine"] = tuple(args.refine)
    tables = []
    for model in args.models:
        with shown_progress() as watch:
            found = dfq.bench_generators(
                dfq.GeneratorsRecipe(model=model, checkpoint=data / "weights" / WEIGHTS[model], **asked),
                args.out / model,
                images=f"folder:{data / 'imagenet_val'}",
                real=f"folder:{data / 'imagenet_calib'}",
                limit=args.limit,
                watch=watch,
            )
        tables.append(found.markdown())
    text = "\n".join(tables)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
