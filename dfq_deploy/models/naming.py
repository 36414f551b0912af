"""Naming: what a module returns, whatever library it is from, as tensors by name.

transformers returns mappings, torchvision dicts, others named tuples or a tensor. What a task wants can be spread over
several of their tensors; it is put together here, in the graph, so that an engine has it too.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["named_tensors"]


def named_tensors(found: object) -> dict[str, Tensor]:
    """The tensors in what a module returned, by name; the only one is called `output`."""
    if isinstance(found, Tensor):
        return {"output": found}
    if hasattr(found, "_asdict"):  # a named tuple
        found = found._asdict()
    if not isinstance(found, Mapping):
        return {}
    named = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return named | _of_queries(named)


def _of_queries(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits of a semantic segmentation where there are classes and masks of queries, the last class being no object.

    Source: Cheng et al., MaskFormer, arXiv 2107.06278, semantic inference; as transformers' post-processing has it.
    """
    if not {"class_queries_logits", "masks_queries_logits"} <= named.keys():
        return {}
    classes = named["class_queries_logits"].softmax(-1)[..., :-1]
    return {"logits": torch.einsum("nqc,nqhw->nchw", classes, named["masks_queries_logits"].sigmoid())}
