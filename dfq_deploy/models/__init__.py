"""Models: a timm name or the demo in, a sited torch model with its preprocessing out.

This room knows timm, weights and attention families. It knows nothing of images, plans or ONNX.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from calibrators.preprocess import Preprocess

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
        name: timm's full name with its pretrained tag, or `demo`.
        module: The torch model in evaluation mode, float32, frozen, every quantizable place a site.
        preprocess: How images become its input.
        fingerprint: SHA-256 over the name and every weight.
        classes: Number of logits.
        class_names: What each logit stands for, where that is known.
        classifiers: Names of the layers that put out the logits.
        labelled: Archive of labelled images that belongs to the model (the demo has one), or None.
    """

    name: str
    module: nn.Module
    preprocess: Preprocess
    fingerprint: str
    classes: int
    class_names: tuple[str, ...] | None
    classifiers: tuple[str, ...]
    labelled: Path | None = None
