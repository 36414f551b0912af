"""What a set of images is worth: each calibrates one scheme after the other, simulated on `imagenet_val`.

What benchmarks of generators share. `DFQ_DATA` names real weights and images. Rows are kept: a run that was stopped
goes on.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accuracy import WEIGHTS

import dfq_deploy as dfq
from calibrators.files import write_json, write_text
from calibrators.images import ImageSet
from dfq_deploy.models import Model
from dfq_deploy.models.loading import load_model
from dfq_deploy.recipe import CalibrateRecipe

__all__ = ["asked", "judged", "model_asked_for", "tabulated"]


def asked(description: str | None, schemes: str) -> argparse.Namespace:
    """What the command line asks for; `schemes` are those without a word."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of table.md")
    parser.add_argument("--model", choices=list(WEIGHTS), default="deit_t")
    parser.add_argument("--schemes", default=schemes, help="with commas between them")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int)
    return parser.parse_args()


def model_asked_for(args: argparse.Namespace) -> Model:
    """The model with its real weights."""
    return load_model(args.model, checkpoint=_checkpoint(args))


def judged(args: argparse.Namespace, name: str, make: Callable[[], ImageSet]) -> dict[str, Any]:
    """Seconds that the set `name` took to make and, by scheme, what comes of it."""
    folder = args.out / name.replace(" ", "-").replace(",", "")
    kept = folder / "row.json"
    row: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    images = folder / "images.safetensors"
    if not row:
        began = time.monotonic()
        make().save(images)
        row["seconds"] = time.monotonic() - began
    for scheme in args.schemes.split(","):
        if scheme not in row:
            recipe = CalibrateRecipe(model=args.model, checkpoint=_checkpoint(args), calib=str(images), scheme=scheme)
            found = dfq.simulate(recipe, folder / scheme, images=f"folder:{_data() / 'imagenet_val'}", limit=args.limit)
            assert found.top1 is not None
            lost = found.top1["float"].percent - found.top1["simulated"].percent
            row[scheme] = {"lost": lost, "agreement": found.agreement.percent, "sqnr_db": found.sqnr_db}
        write_json(kept, row)
    return row


def tabulated(args: argparse.Namespace, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows by name as `table.md`, which is written, too: points lost, = float in percent, SQNR in dB."""
    schemes = args.schemes.split(",")
    lines = [f"| images | {' | '.join(f'{scheme}: lost, = float, dB' for scheme in schemes)} | seconds |"]
    lines.append("|---" * (len(schemes) + 2) + "|")
    for name, row in rows.items():
        found = ("{lost:.2f}, {agreement:.2f}, {sqnr_db:.1f}".format(**row[scheme]) for scheme in schemes)
        lines.append(f"| {name} | {' | '.join(found)} | {row['seconds']:.0f} |")
    table = "\n".join(lines) + "\n"
    write_text(args.out / "table.md", table)
    return table


def _data() -> Path:
    return Path(os.environ["DFQ_DATA"]).resolve()


def _checkpoint(args: argparse.Namespace) -> Path:
    return _data() / "weights" / WEIGHTS[args.model]
