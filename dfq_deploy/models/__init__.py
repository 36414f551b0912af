"""Models: a timm name, the demo or a module of the user's in, a sited torch model with its preprocessing out.

This room knows timm, weights and attention families. It knows nothing of images, plans or ONNX.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from calibrators.preprocess import Preprocess
from exporters.outputs import Output

__all__ = ["ALIASES", "Model"]

ALIASES = {
    "vit_t": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_s": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_b": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "deit_t": "deit_tiny_patch16_224.fb_in1k",
    "deit_s": "deit_small_patch16_224.fb_in1k",
    "deit_b": "deit_base_patch16_224.fb_in1k",
    "swin_t": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_s": "swin_small_patch4_window7_224.ms_in1k",
    "swin_b": "swin_base_patch4_window7_224.ms_in1k",
}


@dataclass(frozen=True)
class Model:
    """A model ready to be quantized.

    Attributes:
        name: timm's full name with its pretrained tag, `demo`, or what a module of the user's is called.
        module: The torch model in evaluation mode, float32, frozen, every quantizable place a site. It puts out a
            tensor (N, …), or a tuple of several, in the order of `outputs`.
        preprocess: How images become its input.
        fingerprint: SHA-256 over the name and every weight.
        classes: Number of classes that it tells apart; 0 where it knows none.
        class_names: What each logit stands for, where that is known.
        classifiers: Names of the layers that put out the logits.
        labelled: Archive of labelled images that belongs to the model (the demo has one), or None.
        task: What its outputs are: a file's name in `dfq_deploy/tasks`.
        outputs: What it puts out; if none are given, the logits of a classifier.
        first: Name of the layer that reads the images or, where none reads them as they are, that runs first; empty
            where it has no site.
        wrapped: Whether it came from Python and not by its name, so that nobody else can load it again.
    """

    name: str
    module: nn.Module
    preprocess: Preprocess
    fingerprint: str
    classes: int
    class_names: tuple[str, ...] | None
    classifiers: tuple[str, ...]
    labelled: Path | None = None
    task: str = "classification"
    outputs: tuple[Output, ...] = ()
    first: str = ""
    wrapped: bool = False

    def __post_init__(self) -> None:
        if not self.outputs:
            object.__setattr__(self, "outputs", (Output("logits", (self.classes,)),))

    @property
    def numbers(self) -> int:
        """How many numbers come out for an image, all outputs together."""
        return sum(output.size for output in self.outputs)

    def rows(self, images: Tensor) -> Tensor:
        """What the module puts out for images (N, C, H, W), all outputs side by side: (N, numbers)."""
        found: Tensor | tuple[Tensor, ...] = self.module(images)
        if isinstance(found, Tensor):
            return found.flatten(1)
        return torch.cat([part.flatten(1) for part in found], 1)

    def parts(self, rows: Tensor) -> Sequence[Tensor]:
        """The outputs, each (N, numbers), that `rows` holds side by side."""
        return torch.split(rows, [output.size for output in self.outputs], 1)
