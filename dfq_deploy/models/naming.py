"""Naming: what a module returns, whatever library it is from, as tensors by name.

transformers returns mappings, torchvision dicts, others named tuples or a tensor. What a task wants can be spread over
several of their tensors; it is put together here, in the graph, so that an engine has it too.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["named_tensors"]


def named_tensors(found: object, module: nn.Module) -> dict[str, Tensor]:
    """The tensors in what `module` returned, by name.

    The only one is called `output`, those of a plain tuple or list `output_0` and so on, if it holds nothing else.
    """
    if isinstance(found, Tensor):
        return {"output": found}
    if hasattr(found, "_asdict"):  # a named tuple
        found = found._asdict()
    if isinstance(found, tuple | list) and all(isinstance(value, Tensor) for value in found):
        found = {f"output_{place}": value for place, value in enumerate(found)}
    if not isinstance(found, Mapping):
        return {}
    named = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if _has_sigmoid(named, module):
        named["sigmoid_logits"] = named.pop("logits")
    return named | _of_queries(named)


def _has_sigmoid(named: Mapping[str, Tensor], module: nn.Module) -> bool:
    """Whether it is a detector whose configuration has as many labels as there are logits: none is for no object.

    transformers calls them `logits` in RT-DETR and Deformable DETR, too.
    """
    labels = getattr(getattr(module, "config", None), "num_labels", None)
    return {"logits", "pred_boxes"} <= named.keys() and named["logits"].shape[-1] == labels


def _of_queries(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits of a semantic segmentation where there are classes and masks of queries, the last class being no object.

    Source: Cheng et al., MaskFormer, arXiv 2107.06278, semantic inference; as transformers' post-processing has it.
    """
    if not {"class_queries_logits", "masks_queries_logits"} <= named.keys():
        return {}
    classes = named["class_queries_logits"].softmax(-1)[..., :-1]
    return {"logits": torch.einsum("nqc,nqhw->nchw", classes, named["masks_queries_logits"].sigmoid())}
