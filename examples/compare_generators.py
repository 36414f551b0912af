"""Which generator's images calibrate best, on real models and images: `make generators`, with `DFQ_DATA` naming them.

For each model one benchmark (`dfq-deploy bench generators`) on all of `imagenet_val`, against real images drawn from
`imagenet_calib`; both tables come out together, and in table.md. With everything by default hours on a CPU. An
interrupted run goes on, and one with more seeds, schemes or generators computes what is missing.
"""

import argparse
import os
import sys
from pathlib import Path

import dfq_deploy as dfq
from benchmarks.accuracy import WEIGHTS
from calibrators.errors import DeployError, RecipeError
from dfq_deploy.messages import notes_in_one_line, print_error
from dfq_deploy.progress import shown_progress

FIELDS = ("generators", "schemes", "refine", "seeds", "count")


def main() -> int:
    """Compare as the command line asks; returns the exit code, which is 3 where something is wrong."""
    args = arguments()
    try:
        with notes_in_one_line():
            text = tables(args)
            (args.out / "table.md").write_text(text, encoding="utf-8")
    except DeployError as error:
        print_error(error.what, error.why, error.fix)
        return 3
    print(text)
    return 0


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
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
    return parser.parse_args()


def tables(args: argparse.Namespace) -> str:
    """Run the benchmark of each model, and tell what they found.

    Raises:
        DeployError: The data is not there, or what is asked for cannot be done; what was finished stays.
    """
    if "DFQ_DATA" not in os.environ:
        raise RecipeError(
            what="DFQ_DATA is not set.",
            why="it names the folder of weights/, imagenet_val/ and imagenet_calib/.",
            fix="set it: DFQ_DATA=FOLDER make generators.",
        )
    data = Path(os.environ["DFQ_DATA"]).resolve()
    values = {field: getattr(args, field) for field in FIELDS}
    values["refine"] = args.refine and tuple(args.refine)
    asked = {field: value for field, value in values.items() if value is not None}
    found = []
    for model in args.models:
        with shown_progress() as watch:
            bench = dfq.bench_generators(
                dfq.GeneratorsRecipe(model=model, checkpoint=data / "weights" / WEIGHTS[model], **asked),
                args.out / model,
                images=f"folder:{data / 'imagenet_val'}",
                real=f"folder:{data / 'imagenet_calib'}",
                limit=args.limit,
                watch=watch,
            )
        found.append(bench.markdown())
    return "\n".join(found)


if __name__ == "__main__":
    sys.exit(main())
