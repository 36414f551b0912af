"""dfq-deploy itself, by its public functions and with its defaults.

`images` as option makes the synthetic images that the other options, which are schemes, then calibrate on: one set per
model, as a user would keep it. Of an export everything counts from loading the weights to the finished bundle, but not
the check of it.
"""

import shutil
from collections.abc import Mapping
from typing import Any

from peer import Job, Moment, measure

import dfq_deploy as dfq


class _Clock:
    """Notes when the check begins."""

    check: Moment

    def stage(self, name: str, already_done: bool) -> None:  # noqa: ARG002  # its signature is `Watch`'s
        if name == "check":
            self.check = Moment.now()

    def progress(self, done: int, total: int, terms: Mapping[str, float]) -> None:
        """Nothing to note."""

    def tell(self, text: str) -> None:
        """Nothing to note."""


def quantize(job: Job) -> Moment | None:
    """Images for `images`, else the model in the scheme that the option names, with its block if there is one."""
    if job.option == "images":
        dfq.generate(dfq.Recipe(model=job.name, checkpoint=job.checkpoint), job.out)
        return None
    scheme, _, block = job.option.partition(":")
    chosen: dict[str, Any] = {"block": int(block)} if block else {}
    recipe = dfq.Recipe(model=job.name, checkpoint=job.checkpoint, calib=str(job.images), scheme=scheme, **chosen)
    bundle, clock = job.out.with_suffix(".bundle"), _Clock()
    shutil.rmtree(bundle, ignore_errors=True)  # of a run that was cut off: what is there would not be timed
    dfq.export(recipe, bundle, limit=1, watch=clock)
    (bundle / "model.onnx").replace(job.out)
    shutil.rmtree(bundle)
    return clock.check


if __name__ == "__main__":
    measure(quantize, ("dfq-deploy", "onnxruntime", "torch"))
