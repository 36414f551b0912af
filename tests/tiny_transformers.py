"""Models of Hugging Face transformers, tiny and with random weights: what tests share, by name."""

from collections.abc import Callable

import torch
import transformers
from torch import nn

__all__ = ["EDGE", "TASKS", "tiny"]

EDGE = 64
TASKS = {
    "clip": "features",
    "detr": "detection",
    "dinov2": "features",
    "dinov3": "features",
    "mask2former": "segmentation",
    "rt_detr": "detection",
    "segformer": "segmentation",
    "siglip": "features",
    "upernet": "segmentation",
    "yolos": "detection",
}
_LABELS = {"num_labels": 7}
_VIT = {
    "initializer_range": 0.2,  # or hardly anything of an image reaches the outputs
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_STAGES = ["stage1", "stage2", "stage3", "stage4"]


def _vit(kind: str, model: str) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**_VIT, image_size=EDGE, patch_size=16)
    return getattr(transformers, model)(config)


def _swin() -> transformers.SwinConfig:
    return transformers.SwinConfig(
        image_size=EDGE,
        patch_size=4,
        embed_dim=16,
        depths=[2, 1, 1, 1],
        num_heads=[2, 2, 4, 4],
        window_size=4,
        out_features=_STAGES,
    )


def _detr() -> nn.Module:
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1] * 4,
        layer_type="basic",
        out_features=["stage3"],
    )
    return transformers.DetrForObjectDetection(
        transformers.DetrConfig(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=backbone,
            d_model=32,
            encoder_layers=2,
            decoder_layers=1,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            num_queries=10,
            **_LABELS,
        )
    )


def _yolos() -> nn.Module:
    config = transformers.YolosConfig(
        **_VIT, image_size=[EDGE, EDGE], patch_size=16, num_detection_tokens=10, **_LABELS
    )
    return transformers.YolosForObjectDetection(config)


def _segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        depths=[1] * 4,
        hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=16,
        **_LABELS,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def _upernet() -> nn.Module:
    config = transformers.UperNetConfig(
        backbone_config=_swin(),
        use_pretrained_backbone=False,
        hidden_size=16,
        pool_scales=[1, 2],
        use_auxiliary_head=False,
        **_LABELS,
    )
    return transformers.UperNetForSemanticSegmentation(config)


def _mask2former() -> nn.Module:
    config = transformers.Mask2FormerConfig(
        backbone_config=_swin(),
        use_pretrained_backbone=False,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=1,
        num_attention_heads=4,
        dim_feedforward=32,
        num_queries=10,
        **_LABELS,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


def _rt_detr() -> nn.Module:
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1] * 4,
        layer_type="basic",
        out_features=_STAGES[1:],
    )
    return transformers.RTDetrForObjectDetection(
        transformers.RTDetrConfig(
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=backbone,
            encoder_in_channels=[16] * 3,
            encoder_hidden_dim=32,
            encoder_ffn_dim=64,
            encoder_attention_heads=4,
            decoder_in_channels=[32] * 3,
            d_model=32,
            decoder_layers=1,
            decoder_ffn_dim=64,
            decoder_attention_heads=4,
            num_queries=10,
            anchor_image_size=[EDGE, EDGE],
            initializer_range=0.2,  # or all places score alike, and which are the best ten is chance
            **_LABELS,
        )
    )


_MAKE: dict[str, Callable[[], nn.Module]] = {
    "clip": lambda: _vit("CLIPVision", "CLIPVisionModel"),
    "detr": _detr,
    "dinov2": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=EDGE, patch_size=16
        )
    ),
    "dinov3": lambda: _vit("DINOv3ViT", "DINOv3ViTModel"),
    "mask2former": _mask2former,
    "rt_detr": _rt_detr,
    "segformer": _segformer,
    "siglip": lambda: _vit("SiglipVision", "SiglipVisionModel"),
    "upernet": _upernet,
    "yolos": _yolos,
}


def tiny(name: str) -> nn.Module:
    """The model, with what starts at 0 and 1 drawn too.

    The exporter folds norms and biases of 0 and 1 away, and a norm makes much of the least change to a token of zeros.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _MAKE[name]().eval()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim == 1 or not parameter.any():
                    parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return module
