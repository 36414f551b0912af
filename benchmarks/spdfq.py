"""What each part of SPDFQ is worth: `make spdfq`, with `DFQ_DATA` naming real weights and images.

Attention Priors Alignment, Multi-Semantic Reinforcement and Softlabel Learning, each with and without the others, and
what the images calibrate, simulated. Eight sets of images: hours on a CPU.
"""

import itertools

from judged import asked, judged, model_asked_for, tabulated

from dfq_deploy.generation import GenerateOptions
from dfq_deploy.generation.generators.spdfq import Spdfq

_PARTS = ("alignment", "reinforcement", "soft labels")


def main() -> None:
    """Make, simulate and tabulate all combinations."""
    args = asked(__doc__, "w4a4")
    model, options = model_asked_for(args), GenerateOptions(args.count, args.seed)
    rows = {}
    for parts in itertools.product((False, True), repeat=3):
        name = ", ".join(itertools.compress(_PARTS, parts)) or "none"
        rows[name] = judged(args, name, lambda parts=parts: Spdfq(*parts).generate(model, options))
        print(tabulated(args, rows).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
