"""What steps are worth: `make steps`, with `DFQ_DATA` naming real weights and images.

`dfq` with fewer steps and more, `psaq_v1` with and without its stopping rule, and with the 2 x 500 steps that its
authors take. Every set of images calibrates one scheme after the other, simulated on `imagenet_val`, with the scheme's
passes. The thousand steps are computed with the fast estimator: theirs takes hours, and is timed on two steps. Steps
are constants of a generator, which this replaces. Sets and results are kept: a run that was stopped goes on.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accuracy import WEIGHTS

import dfq_deploy as dfq
from calibrators.files import write_json
from dfq_deploy.generation.engine import Stage
from dfq_deploy.generation.generators import dfq as ours
from dfq_deploy.generation.generators import psaq_v1
from dfq_deploy.recipe import CalibrateRecipe, GenerateRecipe

_TIMED_STEPS = 2
_CONSTANTS: dict[str, tuple[str, list[tuple[Any, str, Any]]]] = {
    **{f"dfq, {steps} steps": ("dfq", [(ours, "_STAGE", Stage(steps, 30))]) for steps in (12, 25, 50, 100, 200)},
    "psaq_v1, 100 steps": ("psaq_v1", [(psaq_v1, "_FAST_PLATEAU", None)]),
    "psaq_v1, until the plateau": ("psaq_v1", []),
    "psaq_v1, 2 x 500 steps": (
        "psaq_v1",
        [(psaq_v1, "_FAST_STAGES", psaq_v1._V1_STAGES), (psaq_v1, "_FAST_PLATEAU", None)],
    ),
}


@contextmanager
def _replaced(constants: list[tuple[Any, str, Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, name, value in constants:
            stack.enter_context(patch.object(module, name, value))
        yield


def _seconds_of_a_published_step(recipe: GenerateRecipe, folder: Path) -> float:
    """Seconds of one step of V1's own estimator in float32: the time of more steps over that of none."""
    seconds = []
    for steps in (1, 1 + _TIMED_STEPS):
        with _replaced([(psaq_v1, "_V1_STAGES", (Stage(steps, 30),))]):
            began = time.monotonic()
            dfq.generate(recipe, folder / f"exact-{steps}.safetensors")
            seconds.append(time.monotonic() - began)
    return (seconds[1] - seconds[0]) / _TIMED_STEPS


def _row(name: str, asked: dict[str, Any], args: argparse.Namespace, validation: str) -> dict[str, Any]:
    """What a set of images took, and what comes of each scheme."""
    generator, constants = _CONSTANTS[name]
    folder = args.out / name.replace(", ", "-").replace(" ", "-")
    images = folder / "images.safetensors"
    row: dict[str, Any] = {"generator": generator}
    with _replaced(constants):
        began = time.monotonic()
        dfq.generate(GenerateRecipe(**asked, generator=generator, count=args.count, seed=args.seed), images)
        row["seconds"] = time.monotonic() - began
    for scheme in args.schemes.split(","):
        recipe = CalibrateRecipe(**asked, calib=str(images), scheme=scheme, spare="massive")
        found = dfq.simulate(recipe, folder / scheme, images=validation, limit=args.limit)
        assert found.top1 is not None
        lost = found.top1["float"].percent - found.top1["simulated"].percent
        row[scheme] = {"lost": lost, "agreement": found.agreement.percent, "sqnr_db": found.sqnr_db}
    return row


def main() -> None:
    """Make, simulate and tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of steps.json")
    parser.add_argument("--model", choices=list(WEIGHTS), default="deit_t")
    parser.add_argument("--schemes", default="w8a8,w6a6,w4a4")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    data = Path(os.environ["DFQ_DATA"]).resolve()
    asked = {"model": args.model, "checkpoint": data / "weights" / WEIGHTS[args.model]}
    kept = args.out / "steps.json"
    rows: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for name in _CONSTANTS:
        if name not in rows:
            rows[name] = _row(name, asked, args, f"folder:{data / 'imagenet_val'}")
            write_json(kept, rows)
        row = rows[name]
        print(f"{name}: {row['seconds']:.0f} s", end="")
        for scheme in args.schemes.split(","):
            found = row[scheme]
            print(f" | {scheme} {found['lost']:.2f} {found['agreement']:.2f} {found['sqnr_db']:.1f}", end="")
        print(flush=True)
    name = "one step of psaq_v1 as published"
    if name not in rows:
        exact = GenerateRecipe(**asked, generator="psaq_v1", exact=True, count=args.count, seed=args.seed)
        rows[name] = _seconds_of_a_published_step(exact, args.out)
        write_json(kept, rows)
    print(f"{name}: {rows[name]:.1f} s")


if __name__ == "__main__":
    main()
