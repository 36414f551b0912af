"""Plans and targets that TensorRT does not take, refused before anything is built; TensorRT for RTX agrees."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tiny_quantized import asked, float_model, plan_for, quantized

from calibrators.affine import CODES
from calibrators.errors import BackendError
from calibrators.plan import QParams, QuantPlan
from exporters.backends import BuildOptions, ort, rtx, trt
from exporters.cast import CastBody
from exporters.census import Body
from exporters.tensorrt.refusals import refuse_model, refuse_plan


@pytest.fixture(scope="module")
def binding() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")


def _saved(model: ir.Model, folder: Path, body: Body = "fp32") -> Path:
    ir.save(model if body == "fp32" else CastBody(body)(model).model, folder / "model.onnx")
    return folder / "model.onnx"


def _unquantized() -> QuantPlan:
    return replace(plan_for("fc"), sites={})


@pytest.mark.parametrize("target", ["sm75", "sm80", "sm86"])
def test_fp8_is_refused_below_sm89(binding: Any, tmp_path: Path, target: str) -> None:
    plan = plan_for("fc", "w8a8_fp8")
    model = quantized("fc", plan)
    with pytest.raises(BackendError, match=f"FP8 cannot be built for {target}") as of_plan:
        refuse_plan(plan, targets=["sm89", target], blocks=())
    with pytest.raises(BackendError) as of_model:
        refuse_model(model, targets=["sm89", target])
    assert str(of_plan.value) == str(of_model.value)
    assert (of_plan.value.why, target in of_plan.value.fix) == ("GPUs have FP8 from sm89 on.", True)
    engine, log = asked(binding, _saved(model, tmp_path), target.upper())
    assert engine is None
    assert "fp8" in " ".join(log.errors())
    refuse_plan(plan, targets=["sm89", "sm120"], blocks=())


@pytest.mark.parametrize("target", ["sm90", "sm70", "SM89", "ampere", "89"])
def test_a_target_that_does_not_exist_is_refused(binding: Any, target: str) -> None:
    with pytest.raises(BackendError, match=f"builds for no `{target}`") as caught:
        rtx.check(plan_for("fc"), BuildOptions(targets=("sm89", target)))
    assert "sm75, sm80, sm86, sm89, sm120, sm121" in caught.value.why


def test_our_targets_are_those_that_rtx_has(binding: Any) -> None:
    theirs = {name.lower() for name in binding.ComputeCapability.__members__} - {"none", "current"}
    assert set(rtx._TARGETS) == theirs
    rtx.check(plan_for("fc"), BuildOptions(targets=tuple(sorted(theirs - {"sm75"}))))


@pytest.mark.parametrize(
    ("scheme", "body"), [("w8a8", "fp32"), ("w8a8", "fp16"), ("w4a16", "fp16"), ("", "fp32"), ("", "bf16")]
)
def test_sm75_takes_float16_only(binding: Any, tmp_path: Path, scheme: str, body: Body) -> None:
    plan = plan_for("fc", scheme) if scheme else _unquantized()
    with pytest.raises(BackendError, match="cannot be built for sm75"):
        rtx.check(plan, BuildOptions(body=body, targets=("sm75", "sm89")))
    engine, log = asked(binding, _saved(quantized("fc", plan), tmp_path, body), "SM75")
    assert engine is None
    assert any("Turing" in text or "sm75" in text for text in log.errors())


def test_sm75_takes_a_float16_model(binding: Any, tmp_path: Path) -> None:
    rtx.check(_unquantized(), BuildOptions(body="fp16", targets=("sm75",)))
    assert asked(binding, _saved(float_model("fc"), tmp_path, "fp16"), "SM75")[0] is not None


def _asymmetric(codes: str, zero: float) -> QuantPlan:
    plan = plan_for("fc")
    site = QParams(np.array(0.05, np.float32), np.array(zero, CODES[codes].zero_dtype), CODES[codes], None)
    return replace(plan, sites={**plan.sites, "fc.input": site})


def test_an_asymmetric_plan_is_refused() -> None:
    for plan in (_asymmetric("uint8", 128), _asymmetric("uint8", 0), _asymmetric("int8", 1), _asymmetric("uint4", 3)):
        with pytest.raises(BackendError, match=r"it is asymmetric \(zero-point != 0\)") as caught:
            refuse_plan(plan, targets=(), blocks=())
        assert "--scheme w8a8, or use --backend ort" in caught.value.fix
    refuse_plan(_asymmetric("int8", 0), targets=(), blocks=())


@pytest.mark.parametrize(("check", "sizes"), [(rtx.check, (16, 32, 64, 128)), (trt.check, (64, 128))])
def test_a_block_that_the_run_time_does_not_take_is_refused(
    check: Callable[[QuantPlan, BuildOptions], None], sizes: tuple[int, ...]
) -> None:
    for size in (8, 16, 32, 64, 128):
        site = replace(plan_for("fc", "w4a16").sites["fc.weight"], block=size)
        plan = replace(plan_for("fc"), sites={"fc.weight": site})
        if size in sizes:
            check(plan, BuildOptions())
            continue
        with pytest.raises(BackendError, match=f"cannot run blocks of {size}") as caught:
            check(plan, BuildOptions())
        assert caught.value.fix.startswith("pass --block 64,")


def test_trt_takes_no_target() -> None:
    with pytest.raises(BackendError, match="takes no --target"):
        trt.check(plan_for("fc"), BuildOptions(targets=("sm89",)))


@pytest.mark.parametrize("provider", ["tensorrt", "rtx"])
def test_tensorrt_within_onnx_runtime_has_the_same_rules(provider: str) -> None:
    with pytest.raises(BackendError, match="asymmetric"):
        ort.check(_asymmetric("uint8", 3), BuildOptions(provider=provider))
