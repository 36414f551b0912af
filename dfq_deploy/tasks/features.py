"""Features: embeddings of an image or of its patches, of whatever shape, which something else makes use of."""

from collections.abc import Sequence

import numpy as np

from dfq_deploy.measures import cosine
from dfq_deploy.tasks import Found, Shapes, unsuitable
from exporters.outputs import Output

__all__ = ["agree", "count_classes", "decide", "pick_outputs"]

AGREEMENT = "cosine of the features"
CROP_MODE = "center"
TAKES_ALL = True


def pick_outputs(shapes: Shapes) -> dict[str, str]:
    """All tensors, by the model's names.

    Raises:
        ModelError: There is none.
    """
    if not shapes:
        raise unsuitable(shapes, "features", "one tensor or more, by name if there are several")
    return {name: name for name in shapes}


def count_classes(outputs: Sequence[Output]) -> int:  # noqa: ARG001  # the verbs of all tasks have one signature
    """None: features tell no classes apart."""
    return 0


def decide(found: Found) -> None:  # noqa: ARG001
    """Nothing: features decide nothing by themselves."""
    return


def agree(found: Found, wanted: Found) -> np.ndarray:
    """Cosine of each tensor as one vector, the mean over the tensors; 0 where negative or NaN, 1 of equal ones."""
    pairs = ([part.reshape(len(part), -1).astype(np.float64) for part in (found[n], wanted[n])] for n in wanted)
    return np.asarray(np.fmax(np.mean([cosine(*pair) for pair in pairs], axis=0), 0.0))
