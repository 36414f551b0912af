"""What each part of `dfq` is worth: `make ablation`, with `DFQ_DATA` naming real weights and images.

Each part left out alone, and what the images calibrate, every scheme with its passes.
"""

from dataclasses import fields

from judged import asked, judged, model_asked_for, tabulated

from dfq_deploy.generation import GenerateOptions
from dfq_deploy.generation.generators.dfq import Dfq


def main() -> None:
    """Make, simulate and tabulate."""
    args = asked(__doc__, "w6a6,w4a4")
    model, options = model_asked_for(args), GenerateOptions(args.count, args.seed)
    parts = [field.name for field in fields(Dfq) if field.type is bool]
    recipes = {"all parts": Dfq(), **{f"without {part}": Dfq(**{part: False}) for part in parts}}
    rows = {}
    for name, recipe in recipes.items():
        rows[name] = judged(args, name, lambda recipe=recipe: recipe.generate(model, options))
        print(tabulated(args, rows).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
