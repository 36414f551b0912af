"""What steps are worth: `make steps`, with `DFQ_DATA` naming real weights and images.

`dfq` with fewer steps and more, `psaq_v1` with and without its stopping rule, and with the 2 x 500 steps that its
authors take; every scheme with its passes. The thousand steps are computed with the fast estimator: theirs takes hours,
and one step of it is timed.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from judged import asked, judged, model_asked_for, tabulated

from calibrators.images import ImageSet
from dfq_deploy.generation import GenerateOptions
from dfq_deploy.generation.engine import Stage
from dfq_deploy.generation.generators.dfq import Dfq
from dfq_deploy.generation.generators.psaq_v1 import V1_STAGES, PsaqV1

_TIMED = 2  # steps


def main() -> None:
    """Make, simulate and tabulate."""
    args = asked(__doc__, "w8a8,w6a6,w4a4")
    model, options = model_asked_for(args), GenerateOptions(args.count, args.seed)
    makers: dict[str, Callable[[], ImageSet]] = {
        **{
            f"dfq, {steps} steps": lambda steps=steps: Dfq(steps).generate(model, options)
            for steps in (12, 25, 50, 100, 200)
        },
        "psaq_v1, until the plateau": lambda: PsaqV1().generate(model, options),
        "psaq_v1, 100 steps": lambda: PsaqV1([Stage(100, 30)]).generate(model, options),
        "psaq_v1, 2 x 500 steps": lambda: PsaqV1(V1_STAGES).generate(model, options),
    }
    rows = {}
    for name, make in makers.items():
        rows[name] = judged(args, name, make)
        print(tabulated(args, rows).splitlines()[-1], flush=True)
    exact, took = replace(options, exact=True), []
    for steps in (1, 1 + _TIMED):
        began = time.monotonic()
        PsaqV1([Stage(steps, 30)]).generate(model, exact)
        took.append(time.monotonic() - began)
    print(f"one step of psaq_v1 as published: {(took[1] - took[0]) / _TIMED:.1f} s for {args.count} images")


if __name__ == "__main__":
    main()
