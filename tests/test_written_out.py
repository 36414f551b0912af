"""Attention written out gives what the fused kernel gives, gradients included."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dfq_deploy.generation.attention import rows_of, taps_with_rows
from dfq_deploy.generation.taps import attention_taps
from dfq_deploy.generation.written_out import attention_written_out
from dfq_deploy.models import Model

CPU = torch.device("cpu")
MASK = torch.arange(5) < 4
BIAS = torch.linspace(-2, 2, 25, dtype=torch.float64).view(5, 5)


def attended(options: dict[str, Any]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    outputs = F.scaled_dot_product_attention(*operands, **options)
    return [outputs, *torch.autograd.grad(outputs.square().sum(), operands)]


@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.3}, {"attn_mask": MASK.expand(5, 5)}, {"attn_mask": BIAS}, {"is_causal": True}],
    ids=["plain", "scale", "mask", "bias", "causal"],
)
def test_outputs_and_gradients_are_the_fused_kernels(options: dict[str, Any]) -> None:
    wanted = attended(options)
    with attention_written_out(CPU):
        found = attended(options)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_the_fused_kernel_is_called_on_a_gpu_alone(demo: Model) -> None:
    images = torch.zeros(1, *demo.preprocess.shape)

    def kernels(device: torch.device) -> set[str]:
        with torch.profiler.profile() as seen, attention_written_out(device):
            demo.module(images)
        return {event.key for event in seen.key_averages()}

    assert "aten::scaled_dot_product_attention" in kernels(torch.device("cuda"))
    assert "aten::scaled_dot_product_attention" not in kernels(CPU)


def test_attention_rows_are_seen_all_the_same(demo: Model) -> None:
    images = torch.randn(2, *demo.preprocess.shape, generator=torch.Generator().manual_seed(0))
    taps = taps_with_rows(demo, attention_taps(demo))
    with torch.inference_mode(), rows_of(taps) as rows:
        demo.module(images)
        wanted = [rows.of(tap) for tap in taps]
        with attention_written_out(CPU):
            demo.module(images)
        for tap, row in zip(taps, wanted, strict=True):
            torch.testing.assert_close(rows.of(tap), row)
