"""Modules from Python: what `wrap` finds in them, what it refuses, and every task from end to end."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models.beit import Attention as BeitAttention
from torch import Tensor, nn
from torch.nn import functional as F
from wrapped import EXAMPLE, Small

import dfq_deploy as dfq
from calibrators.errors import BackendError, DeployError, ExportError, ImagesError, ModelError, RecipeError
from calibrators.images import ImageSet
from calibrators.interchange import write_folder
from calibrators.registry import names, pick
from calibrators.scheme import scheme_named
from calibrators.sites import sites_of
from dfq_deploy.evaluate import Check
from dfq_deploy.generation import GenerateOptions
from dfq_deploy.generation.taps import attention_taps
from dfq_deploy.showing.bundles import print_path
from dfq_deploy.sparing import layers_to_spare
from exporters.bundle import open_bundle
from exporters.outputs import Output
from exporters.to_onnx import export_float, torch_parity

OUTPUTS = {
    "classification": {"logits": (6,)},
    "detection": {"logits": (16, 6), "boxes": (16, 4)},
    "features": {"tokens": (16, 16), "pooled": (16,)},
    "masks": {"masks": (6, 4, 4)},
    "segmentation": {"logits": (6, 4, 4)},
}
every_task = pytest.mark.parametrize("task", names("dfq_deploy.tasks"))


def _wrapped(task: str, seed: int = 0):
    return dfq.wrap(Small(task, seed), EXAMPLE, task=task)


# --- what wrapping finds ---


@every_task
def test_outputs_and_sites_of_a_module(task: str) -> None:
    module = Small(task)
    model = dfq.wrap(module, EXAMPLE, task=task)
    assert {output.name: output.shape for output in model.outputs} == OUTPUTS[task]
    assert (model.name, model.task, model.wrapped) == ("Small", task, True)
    layers = {name.rpartition(".")[0] for name in sites_of(model.module)}
    unused = {"head"} if task == "features" else set()
    assert layers == {"head", "stem", "qkv", "merge", "up", "down"} - unused
    assert sites_of(model.module)["stem.input"].fixed == (0.0, 1.0)
    rows = model.rows(EXAMPLE)
    assert rows.shape == (1, sum(output.size for output in model.outputs))
    assert type(module.stem) is nn.Conv2d, "the module given stays as it is"
    assert not module._forward_hooks


def test_the_first_layer_is_the_one_that_reads_the_images_wherever_it_was_made() -> None:
    model = _wrapped("classification")
    assert next(iter(sites_of(model.module))) == "head.input"
    assert model.first == "stem"
    spared = layers_to_spare(model, scheme_named("w8a8"), first_layer=False)
    assert {name for name, why in spared.items() if why.startswith("it reads the image")} == {"stem"}


def test_the_attention_of_a_module_is_found_by_watching() -> None:
    (tap,) = attention_taps(_wrapped("features"))
    assert (tap.name, tap.heads, tap.windows, tap.prefix, tap.tokens) == ("merge", 2, 1, 0, 16)


def test_a_layer_that_runs_twice_gets_no_site() -> None:
    class Twice(Small):
        def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
            return super().forward(images + 0.1 * self.stem(images).mean())

    layers = {name.rpartition(".")[0] for name in sites_of(dfq.wrap(Twice("masks"), EXAMPLE, "masks").module)}
    assert layers == {"head", "qkv", "merge", "up", "down"}


def test_mean_and_deviation_become_the_preprocessing() -> None:
    example = (EXAMPLE - 0.5) / 0.25
    model = dfq.wrap(Small("masks"), example, "masks", mean=(0.5,) * 3, std=(0.25,) * 3)
    assert (model.preprocess.mean, model.preprocess.std) == ((0.5,) * 3, (0.25,) * 3)
    assert sites_of(model.module)["stem.input"].fixed == (-2.0, 2.0)


def test_other_weights_are_another_model() -> None:
    model = _wrapped("masks")
    assert model.fingerprint == _wrapped("masks").fingerprint != _wrapped("masks", seed=1).fingerprint
    assert model.fingerprint != dfq.wrap(Small("masks"), EXAMPLE, "segmentation").fingerprint


def test_other_layers_or_pixels_are_another_model() -> None:
    def wrapped(activation: nn.Module, **pixels: tuple[float, ...]) -> str:
        layers = nn.Sequential(nn.Conv2d(3, 4, 8, 8), activation, nn.Flatten())
        with torch.no_grad():
            layers[0].weight.fill_(0.1), layers[0].bias.zero_()
        return dfq.wrap(layers, EXAMPLE, "features", **pixels).fingerprint

    plain = wrapped(nn.GELU())
    assert plain == wrapped(nn.GELU())
    assert len({plain, wrapped(nn.ReLU()), wrapped(nn.GELU(), mean=(0.5,) * 3)}) == 3


@every_task
def test_nothing_is_cut_off_where_the_task_says_what_lies_where(task: str) -> None:
    wanted = "squash" if task in ("detection", "segmentation", "masks") else "center"
    assert _wrapped(task).preprocess.crop_mode == wanted


def test_torchs_own_encoder_layer_is_quantized() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    model = dfq.wrap(nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.Flatten(2), _Turned(), encoder), EXAMPLE, "features")
    called = []
    for name, layer in model.module.named_modules():
        if name.endswith(("linear1", "linear2")):
            layer.weight_site.register_forward_hook(lambda *_, name=name: called.append(name))
    model.rows(EXAMPLE)
    assert called == ["3.layers.0.linear1", "3.layers.0.linear2"]


def test_timms_attention_in_a_module_has_its_layers() -> None:
    model = dfq.wrap(
        nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.Flatten(2), _Turned(), BeitAttention(16, 2)), EXAMPLE, "features"
    )
    assert "3.qkv.weight" in sites_of(model.module)


def test_a_module_may_hold_another_one_as_module() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Small("masks")

        def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
            return self.module(images)

    assert "module.head.weight" in sites_of(dfq.wrap(Around(), EXAMPLE, "masks").module)


@pytest.mark.parametrize("mask", [None, torch.zeros(16, 16), torch.zeros(1, 16, 16)], ids=["none", "shared", "own"])
def test_attention_of_three_dimensions_is_exported(mask: Tensor | None, tmp_path: Path) -> None:
    class Flat(Small):
        def forward(self, images: Tensor) -> Tensor:
            tokens = self.stem(images).flatten(2).transpose(1, 2)
            q, k, v = self.qkv(tokens).chunk(3, -1)
            bias = mask if mask is None or mask.ndim == 2 else mask.expand(q.shape[0], -1, -1)
            return self.head(F.scaled_dot_product_attention(q, k, v, bias)).transpose(1, 2).unflatten(2, (4, 4))

    found = dfq.export(dfq.wrap(Flat("masks"), EXAMPLE, "masks"), tmp_path, generator="noise", count=8, refine="none")
    assert found.verdict == "pass", found.reason


def test_len_of_a_tensor_follows_the_number_of_images(tmp_path: Path) -> None:
    model = dfq.wrap(_Counted("masks"), EXAMPLE, "features")
    path = tmp_path / "float.onnx"
    export_float(model.module, torch.zeros(2, *EXAMPLE.shape[1:]), path)
    images = np.random.default_rng(0).random((3, *EXAMPLE.shape[1:]), dtype=np.float32)
    assert torch_parity(model.module, path, images) < 1e-5


@pytest.mark.parametrize(
    "bound", [torch.relu, lambda x: x.clamp(-0.5, 0.5), lambda x: x.clamp(max=0.3), lambda x: x.clamp(min=-0.1)]
)
def test_a_layer_without_bias_is_quantized_before_what_bounds_it(
    bound: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    class Unbiased(Small):
        def __init__(self) -> None:
            super().__init__("masks")
            self.head.bias = None

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.stem(images).flatten(2).transpose(1, 2)
            return bound(self.head(tokens)).transpose(1, 2).unflatten(2, (4, 4))

    model = dfq.wrap(Unbiased(), EXAMPLE, "masks")
    found = dfq.export(model, tmp_path, generator="noise", count=8, refine="none", spare="none")
    assert found.verdict == "pass", found.reason
    assert found.engine.census.counts == {"int8": 2}


def test_a_layer_that_is_called_by_keyword_gets_no_site() -> None:
    class Keyword(Small):
        def forward(self, images: Tensor) -> Tensor:
            return self.head(input=self.stem(images).flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (4, 4))

    model = dfq.wrap(Keyword("masks"), EXAMPLE, "masks")
    assert {name.rpartition(".")[0] for name in sites_of(model.module)} == {"stem"}
    assert model.rows(EXAMPLE).shape == (1, 96)


# --- what it refuses ---


class _Branching(Small):
    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        return super().forward(images if images.mean() > 0.5 else -images)


class _OfOneSize(Small):
    def forward(self, images: Tensor) -> Tensor:
        return self.stem(images).reshape(2, 16, 16).mean(2)


class _Counted(Small):
    def forward(self, images: Tensor) -> Tensor:
        return self.stem(images).reshape(len(images), 16, 16).mean(2)


class _Boxes(Small):
    """As torchvision's detectors: another number of boxes per image."""

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:  # type: ignore[override]
        return [{"boxes": images[0, 0, :3, :4]} for _ in images]


class _Mixed(Small):
    def forward(self, images: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return images, {"images": images}


class _Turned(nn.Module):
    def forward(self, found: Tensor) -> Tensor:
        return found.transpose(1, 2)


class _Gives(Small):
    """Puts out what a function makes of the tokens."""

    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__("features")
        self.made = made

    def forward(self, images: Tensor) -> Any:
        return self.made(self.stem(images).flatten(2).transpose(1, 2))


def _given(made: Callable[[Tensor], Any], task: str) -> Callable[[], object]:
    return lambda: dfq.wrap(_Gives(made), EXAMPLE, task)


def _half(task: str) -> nn.Module:
    return Small(task).half()


@pytest.mark.parametrize(
    ("refused", "error", "what", "why"),
    [
        (lambda: dfq.wrap(_Branching("masks"), EXAMPLE, "masks"), ExportError, "cannot export", "data-dependent"),
        (lambda: dfq.wrap(_OfOneSize("masks"), EXAMPLE), ExportError, "cannot export", "batch"),
        (lambda: dfq.wrap(_Boxes("masks"), EXAMPLE, "detection"), ModelError, "puts out a list", "suppression"),
        (lambda: dfq.wrap(_Mixed("masks"), EXAMPLE, "features"), ModelError, "puts out a tuple", "suppression"),
        (
            lambda: dfq.wrap(Small("masks"), EXAMPLE),
            ModelError,
            "no outputs of the task classification",
            "(N, classes)",
        ),
        (lambda: dfq.wrap(Small("masks"), EXAMPLE, "painting"), RecipeError, "no task named `painting`", "features"),
        (lambda: dfq.wrap(Small("masks"), EXAMPLE[:, :2], "masks"), ModelError, "cannot be run", "RuntimeError"),
        (lambda: dfq.wrap(Small("masks"), EXAMPLE[0], "masks"), ModelError, "the example is", "(N, C, H, W)"),
        (lambda: dfq.wrap(Small("masks"), EXAMPLE.half(), "masks"), ModelError, "the example is", "float32"),
        (lambda: dfq.wrap(Small("masks"), EXAMPLE * 2, "masks"), ModelError, "values from", "0 to 1"),
        (lambda: dfq.wrap(_half("masks"), EXAMPLE, "masks"), ModelError, "weights of torch.float16", "float32"),
        (lambda: dfq.wrap(Small("masks"), EXAMPLE, "masks", mean=(0.5,)), ModelError, "1 means", "each channel"),
        (_given(lambda t: t.mean((1, 2))[:, None], "classification"), ModelError, "no outputs", "two classes or more"),
        (
            _given(lambda t: {"0": t, "pool": t.mean(1)}, "features"),
            ModelError,
            "no engine can: 0",
            "not a digit first",
        ),
        (_given(lambda t: t / 0, "features"), ModelError, "NaN or Inf", "compared"),
        (_given(lambda t: {"images": t}, "features"), ModelError, "called images", "input"),
        (lambda: dfq.wrap(nn.Flatten(), EXAMPLE, "features"), ModelError, "no layer to quantize", "nn.Linear"),
        (lambda: dfq.wrap(nn.DataParallel(Small("masks")), EXAMPLE, "masks"), ModelError, "as it is", "spread"),
        (lambda: dfq.wrap(nn.LazyLinear(4), EXAMPLE, "masks"), ModelError, "as it is", "weights"),
        (lambda: dfq.wrap(torch.sigmoid, EXAMPLE), ModelError, "takes a module and a tensor", "runs"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_wrapped_is_refused(
    refused: Callable[[], object], error: type[DeployError], what: str, why: str
) -> None:
    with pytest.raises(error) as caught:
        refused()
    assert what in caught.value.what
    assert why in caught.value.why
    assert "\n" not in caught.value.why


def test_a_field_that_does_not_exist_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no argument named `shceme`"):
        dfq.export(_wrapped("masks"), tmp_path / "run", shceme="w8a8")
    with pytest.raises(RecipeError, match="no argument named `count`"):
        dfq.export(dfq.Recipe(model="demo"), tmp_path / "run", count=3)
    assert not (tmp_path / "run").exists()


def test_tensorrt_takes_one_output(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="it has 2 outputs"):
        dfq.export(_wrapped("detection"), tmp_path / "run", backend="trt")


def test_a_backbone_that_returns_a_list_is_exported(tmp_path: Path) -> None:
    backbone = timm.create_model("resnet18", features_only=True, out_indices=(1, 2)).eval()
    model = dfq.wrap(backbone, torch.rand(1, 3, 32, 32), "features")
    assert {output.name: output.shape for output in model.outputs} == {"output_0": (64, 8, 8), "output_1": (128, 4, 4)}
    found = dfq.export(model, tmp_path / "run", generator="noise", count=4, refine="none", spare="massive")
    assert found.verdict == "pass", found.reason
    with dfq.load(tmp_path / "run") as runner:
        assert [*runner.outputs(np.zeros((2, 3, 32, 32), np.float32))] == ["output_0", "output_1"]


def test_a_module_of_five_channels_goes_from_end_to_end(tmp_path: Path) -> None:
    layers = nn.Conv2d(5, 8, 4, 4), nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 6)
    model = dfq.wrap(nn.Sequential(*layers), torch.rand(1, 5, 32, 32))
    found = dfq.export(model, tmp_path / "run", generator="noise", count=4, refine="none", spare="massive")
    assert found.verdict == "pass", found.reason
    with Image.open(next((tmp_path / "run" / "work").glob("images-*.png"))) as sheet:
        assert sheet.mode == "RGB"
    images = ImageSet.load(next((tmp_path / "run" / "work").glob("images-*.safetensors")))
    with pytest.raises(ImagesError, match="5 channels are no pictures"):
        write_folder(images, tmp_path / "pictures")


# --- every generator on a model without classes ---


@pytest.mark.parametrize("generator", names("dfq_deploy.generation.generators"))
def test_generators_need_no_classes(generator: str) -> None:
    make = pick("dfq_deploy.generation.generators", generator).generate
    model = _wrapped("segmentation")
    if generator == "zeroq":
        with pytest.raises(ImagesError, match="no BatchNorm"):
            make(model, GenerateOptions(count=2))
        return
    images = make(model, GenerateOptions(count=2))
    assert len(images) == 2
    assert "cross_entropy" not in str(images.made_by)


# --- from end to end ---


@pytest.fixture(scope="module", params=names("dfq_deploy.tasks"))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Check]:
    """A task, and a bundle of it with its check."""
    folder = tmp_path_factory.mktemp("wrapped") / request.param
    model = _wrapped(request.param)
    return request.param, folder, dfq.export(model, folder, generator="noise", count=12, refine="none")


def test_an_engine_of_every_task_agrees_with_its_reference(run: tuple[str, Path, Check]) -> None:
    task, folder, found = run
    assert found.verdict == "pass", found.reason
    assert found.task == task
    assert found.agreement["engine_reference"].percent > 97
    assert 80 < found.agreement["engine_float"].percent <= 100
    assert (found.top1, found.drop) == (None, None)
    facts = open_bundle(folder).model
    assert facts.outputs == tuple(Output(name, shape) for name, shape in OUTPUTS[task].items())


def test_a_runner_gives_every_output_by_name(run: tuple[str, Path, Check]) -> None:
    task, folder, _ = run
    images = EXAMPLE.numpy().repeat(3, axis=0)
    with dfq.load(folder) as runner:
        found = runner.outputs(images)
        assert {name: values.shape for name, values in found.items()} == {
            name: (3, *shape) for name, shape in OUTPUTS[task].items()
        }
        assert {name: len(values) for name, values in runner.outputs(images[:0]).items()} == dict.fromkeys(found, 0)
        if len(found) == 1:
            np.testing.assert_array_equal(runner(images), next(iter(found.values())))
        else:
            with pytest.raises(BackendError, match=r"several outputs: .*, "):
                runner(images)


def test_check_and_gate_take_the_module_again(run: tuple[str, Path, Check], tmp_path: Path) -> None:
    task, folder, found = run
    assert dfq.check(folder, model=_wrapped(task)).distance == found.distance
    with pytest.raises(ModelError, match="a module from Python, `Small`") as caught:
        dfq.check(folder)
    assert "dfq_deploy.check(FOLDER, model=" in caught.value.fix
    with pytest.raises(DeployError, match="not the weights"):
        dfq.check(folder, model=_wrapped(task, seed=1))
    if task not in ("classification", "segmentation"):
        return  # a gate takes seconds, and knows of a task whether it decides for classes
    limits = dfq.GateLimits(min_agreement=60, latency_band=1000)
    baseline = tmp_path / "baseline.json"
    gated = dfq.gate(folder, limits, model=_wrapped(task), baseline=baseline, update=True)
    assert gated.verdict == "pass", gated.checks
    assert (gated.power == "") == (task != "classification")
    for name, save in {"json": gated.save, "xml": gated.save_junit, "md": gated.save_markdown}.items():
        save(tmp_path / f"gate.{name}")
    told = json.loads((tmp_path / "gate.json").read_text())["smallest_detectable_drop_pt"]
    assert (told == 100) == (task != "classification")
    again = dfq.gate(folder, limits, model=_wrapped(task), baseline=baseline)
    assert again.verdict == "pass", again.checks
    assert ("baseline_decisions" in again.left_out) == (task != "classification")


def test_the_command_line_says_what_it_cannot_do(run: tuple[str, Path, Check]) -> None:
    task, folder, _ = run
    if task != "detection":
        return  # a process takes seconds, and knows no task
    told = subprocess.run(
        [sys.executable, "-m", "dfq_deploy", "check", str(folder)], capture_output=True, text=True, check=False
    )
    assert told.returncode == 3
    assert "model=dfq_deploy.wrap(module" in told.stderr
    assert "Traceback" not in told.stderr


def test_no_command_is_shown_for_what_only_python_repeats(
    run: tuple[str, Path, Check], capsys: pytest.CaptureFixture[str]
) -> None:
    print_path(run[1])
    assert "calibrated on:" in (shown := capsys.readouterr().out)
    assert "repeat:" not in shown


def test_what_is_for_classifiers_is_refused_for_others(run: tuple[str, Path, Check]) -> None:
    task, folder, _ = run
    picture = np.zeros((40, 40, 3), np.uint8)
    if task == "classification":
        assert len(dfq.infer(folder, [picture])[0].classes) == 5
        return
    with pytest.raises(BackendError, match=f"for classifiers, and `Small` is for {task}"):
        dfq.infer(folder, [picture])


def test_a_report_speaks_of_the_task(run: tuple[str, Path, Check]) -> None:
    task, folder, _ = run
    written = dfq.report(folder)
    page = written.path.read_text(encoding="utf-8")
    assert "dfq_deploy.export(dfq_deploy.wrap(Small(…), example" in page.replace("&#34;", '"')
    assert ("Where the engine decides otherwise" in page) == (task == "classification")
    given = dfq.report(folder, model=_wrapped(task))
    gone = {one.section for one in written.missing} - {one.section for one in given.missing}
    assert gone == {"Audit of the calibration images", "Which layers hurt"}, given.missing


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(example, {"bytes_of_a_picture": np.zeros((40, 40, 3), np.uint8)})
    assert open_bundle(tmp_path / "runs" / "mine").model.name == "Sequential"


# --- scores ---


def test_a_score_of_what_the_model_says_itself_is_full() -> None:
    model, images = _wrapped("segmentation"), np.random.default_rng(0).random((3, 3, 32, 32), np.float32)
    logits = model.rows(torch.from_numpy(images)).reshape(3, 6, 4, 4)
    truth = list(logits.argmax(1).numpy())
    assert dfq.score(model, images, truth, batch_size=2) == {"mIoU": pytest.approx(100)}
    empty = [np.full((4, 4), 255) for _ in truth[1:]]
    assert dfq.score(model, images, [truth[0], *empty]) == {"mIoU": pytest.approx(100)}
    wrong = (truth[0] + 1) % 6
    assert dfq.score(model, images, [wrong, *empty])["mIoU"] < 50
    assert dfq.score(model, images.astype(np.float64), truth)["mIoU"] == pytest.approx(100)
    with pytest.raises(ImagesError, match="nothing to score"):
        dfq.score(model, images[1:], empty)
    with pytest.raises(ImagesError, match="do not fit"):
        dfq.score(model, images[:, :2], truth)
    with pytest.raises(RecipeError, match="a batch of 0 images"):
        dfq.score(model, images, truth, batch_size=0)
    with pytest.raises(RecipeError, match="not Small"):
        dfq.score(Small("segmentation"), images, truth)  # type: ignore[arg-type]


def test_a_score_is_that_of_the_field(run: tuple[str, Path, Check]) -> None:
    task, folder, _ = run
    images = EXAMPLE.numpy().repeat(2, axis=0)
    with dfq.load(folder) as runner:
        if task not in ("detection", "segmentation"):
            with pytest.raises(RecipeError, match=f"no score for {task}"):
                dfq.score(runner, images, [None, None])
            return
        with pytest.raises(ImagesError, match="2 images and 1 truths"):
            dfq.score(runner, images, [None])
        found = runner.outputs(images)
        if task == "segmentation":
            truth = [np.eye(4, dtype=int)] * 2
            classes = found["logits"].argmax(1)
            shares = [
                ((classes == kind) & (truth[0] == kind)).sum() / ((classes == kind) | (truth[0] == kind)).sum()
                for kind in set(np.unique(classes)) | {0, 1}
            ]
            assert dfq.score(runner, images, truth) == {"mIoU": pytest.approx(100 * np.mean(shares))}
        else:
            labels = found["logits"][..., :-1].argmax(-1)
            truth = [{"boxes": boxes, "labels": kinds} for boxes, kinds in zip(found["boxes"], labels, strict=True)]
            whole = dfq.score(runner, images, truth)
            assert whole["mAP50"] > 90
            moved = [{**one, "boxes": one["boxes"] + np.float32([0.4, 0.4, 0, 0])} for one in truth]
            assert dfq.score(runner, images, moved)["mAP"] < whole["mAP"] / 2
