"""The float ONNX model computes what torch does, and each site is found in it by its name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from calibrators.errors import ExportError
from calibrators.plan import layer_of
from calibrators.sites import Mode, attach_sites, sites_of
from dfq_deploy.models.families import swin
from dfq_deploy.models.loading import load_model
from exporters.to_onnx import export_float, save_model, torch_parity
from exporters.tracing import OPSET

_SIZE = {"demo": 32, "test_vit": 160, "small_swin": 32}


def _small_swin() -> nn.Module:
    """Two stages of a window and a shifted window each: all that Swin has, in 40 thousand parameters."""
    torch.manual_seed(0)
    module = SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=10
    )
    for parameter in module.parameters():  # norms and biases off the 0 and 1 that a simplifier would delete
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.1)
    module.eval().requires_grad_(False)
    attach_sites(module)
    swin.attach_attention(module)
    return module


_MODULES: dict[str, Callable[[], nn.Module]] = {
    "demo": lambda: load_model("demo").module,
    "test_vit": lambda: load_model("test_vit", random_weights=True).module,
    "small_swin": _small_swin,
}


@pytest.fixture(scope="module", params=list(_MODULES))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    name: str = request.param
    module, path = _MODULES[name](), tmp_path_factory.mktemp(name) / "float.onnx"
    export_float(module, torch.zeros(2, 3, _SIZE[name], _SIZE[name]), path)
    return module, path


@pytest.fixture(scope="module")
def demo_float(demo_bundle: Path) -> Path:
    (found,) = (demo_bundle / "work").glob("float-*.onnx")
    return found


def _images(path: Path, count: int) -> np.ndarray:
    _, *shape = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    return np.random.default_rng(0).normal(size=(count, *(d.dim_value for d in shape))).astype(np.float32)


def test_every_site_is_a_tensor_of_that_name(exported: tuple[nn.Module, Path]) -> None:
    module, path = exported
    graph = ir.load(path).graph
    tensors = {value.name for node in graph for value in [*node.inputs, *node.outputs] if value is not None}
    first = next(name for name in sites_of(module) if name.endswith(".input"))
    assert sites_of(module).keys() - tensors == {first}, "only the first layer's input has another name: images"


def test_every_layer_is_a_node_that_reads_what_its_sites_name(exported: tuple[nn.Module, Path]) -> None:
    module, path = exported
    nodes = {node.name: node for node in ir.load(path).graph}
    wanted = {"input": 0, "weight": 1, "lhs": 0, "rhs": 1}
    for site in sites_of(module):
        node, role = nodes[layer_of(site)], site.rpartition(".")[2]
        assert node.op_type in ("MatMul", "Conv"), site
        value = node.outputs[0] if role == "output" else node.inputs[wanted[role]]
        assert value is not None
        producer = value.producer()
        if producer is not None and producer.op_type == "Unsqueeze" and role == "input":  # a former Gemm
            value = producer.inputs[0]
            assert value is not None
        assert value.name == site or value.is_graph_input(), site


def test_weights_are_torchs_own_numbers(exported: tuple[nn.Module, Path]) -> None:
    module, path = exported
    constants = ir.load(path).graph.initializers
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert layers
    for name, layer in layers:
        stored = constants[f"{name}.weight"].const_value
        assert stored is not None
        wanted = layer.weight.numpy()
        np.testing.assert_array_equal(stored.numpy(), wanted.T if isinstance(layer, nn.Linear) else wanted)


@pytest.mark.parametrize("count", [1, 3])
def test_it_computes_what_torch_does_for_any_number_of_images(exported: tuple[nn.Module, Path], count: int) -> None:
    module, path = exported
    assert torch_parity(module, path, _images(path, count)) < 1e-5


def test_it_is_valid_onnx_of_the_one_opset_and_holds_no_gemm(exported: tuple[nn.Module, Path]) -> None:
    _, path = exported
    onnx.checker.check_model(str(path), full_check=True)
    model = ir.load(path)
    assert OPSET == 20
    assert dict(model.opset_imports) == {"": OPSET}
    assert "Gemm" not in {node.op_type for node in model.graph}
    assert [value.name for value in [*model.graph.inputs, *model.graph.outputs]] == ["images", "logits"]


def test_the_export_leaves_the_sites_off(exported: tuple[nn.Module, Path]) -> None:
    module, _ = exported
    assert {site.mode for site in sites_of(module).values()} == {Mode.OFF}


def test_parity_sees_a_changed_weight(demo_float: Path) -> None:
    module = load_model("demo").module
    images = _images(demo_float, 3)
    assert torch_parity(module, demo_float, images) < 1e-5
    module.get_parameter("blocks.1.mlp.fc1.weight").data.mul_(1.01)
    assert torch_parity(module, demo_float, images) > 1e-4


def test_parity_sees_nan_in_any_output_and_another_shape(demo_float: Path) -> None:
    images = _images(demo_float, 3)
    module = load_model("demo").module
    for change, wanted in ((lambda x: x * float("nan"), np.isnan), (lambda x: x[:, :1], np.isinf)):
        module.register_forward_hook(lambda _module, _inputs, found, change=change: change(found))
        assert wanted(torch_parity(module, demo_float, images))


def test_large_weights_go_to_a_file_beside_the_model(demo_float: Path, tmp_path: Path) -> None:
    model = ir.load(demo_float)
    path = tmp_path / "model.onnx"
    save_model(model, path, external_data_from_bytes=1000)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    assert path.stat().st_size < weights / 2
    assert path.stat().st_size + path.with_name("model.onnx.data").stat().st_size >= weights
    onnx.checker.check_model(str(path), full_check=True)
    images = _images(demo_float, 2)
    one, two = (onnxruntime.InferenceSession(str(p)).run(None, {"images": images})[0] for p in (demo_float, path))
    np.testing.assert_array_equal(one, two)


def test_small_weights_stay_in_the_model(demo_float: Path, tmp_path: Path) -> None:
    save_model(ir.load(demo_float), tmp_path / "model.onnx", external_data_from_bytes=1 << 30)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


class _DependsOnData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.mean((2, 3)))
        return y if y.sum() > 0 else -y


def test_a_model_whose_path_depends_on_its_data_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module = _DependsOnData().eval()
    attach_sites(module)
    with pytest.raises(ExportError, match="torch cannot export this model") as caught:
        export_float(module, torch.zeros(2, 3, 8, 8), tmp_path / "float.onnx")
    assert "data-dependent" in caught.value.why
    assert caught.value.why.endswith(": return y if y.sum() > 0 else -y)")
    assert "\n" not in caught.value.why
    assert capfd.readouterr().err == ""
    assert not list(tmp_path.iterdir())
    assert {site.mode for site in sites_of(module).values()} == {Mode.OFF}


class _ClipsOneTensorTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = 3 * self.fc(x.mean((2, 3)))
        return y.clamp(-0.2, 0.2).relu() + y.clamp(-0.1, 0.3).relu()


def test_bounds_that_torchs_exporter_loses_are_kept(tmp_path: Path) -> None:
    module = _ClipsOneTensorTwice().eval()
    attach_sites(module)
    export_float(module, torch.zeros(2, 3, 8, 8), tmp_path / "float.onnx")
    images = np.random.default_rng(0).random((3, 3, 8, 8), dtype=np.float32)
    assert torch_parity(module, tmp_path / "float.onnx", images) < 1e-5


class _ClipsAfterNoBias(nn.Module):
    """A bias of zeros, which a simplifier takes out, between a product and a bound."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.mean(1)).relu().mean(1)
        return y


def test_no_bound_follows_a_product_that_lost_its_bias(tmp_path: Path) -> None:
    module = _ClipsAfterNoBias().eval()
    attach_sites(module)
    export_float(module, torch.zeros(2, 3, 8, 8), tmp_path / "float.onnx")
    graph = ir.load(tmp_path / "float.onnx").graph
    assert not [node for node in graph if node.op_type in ("Relu", "Clip")]
    assert torch_parity(module, tmp_path / "float.onnx", np.ones((3, 3, 8, 8), np.float32)) < 1e-5


class _RunsTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.fc(x.mean((2, 3))))
        return y


class _TiedWeights(nn.Module):
    """Two layers with one weight, of which one has a site."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x.mean(1))).mean(1)
        return y


class _ScaledProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.mean((2, 3)), self.weight, alpha=2.0, beta=0.5)


@pytest.mark.parametrize("kind", [_RunsTwice, _TiedWeights, _ScaledProduct])
def test_layers_that_share_or_scale_a_weight_compute_what_they_did(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = kind().eval()
    if kind is _TiedWeights:
        attach_sites(module)
    export_float(module, torch.zeros(2, 3, 8, 8), tmp_path / "float.onnx")
    images = np.random.default_rng(0).random((3, 3, 8, 8), dtype=np.float32)
    assert torch_parity(module, tmp_path / "float.onnx", images) < 1e-5


class _PutsOutWhatItReads(nn.Module):
    """What a layer with a site reads is an output, and so is what a convolution with a site puts out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv = nn.Linear(8, 4), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = 2 * x.mean(1)
        return tokens, self.fc(tokens), self.conv(x)


def test_outputs_have_the_names_that_were_asked_for(tmp_path: Path) -> None:
    module = _PutsOutWhatItReads().eval()
    attach_sites(module)
    names = ["tokens", "classes", "maps"]
    export_float(module, torch.zeros(2, 3, 8, 8), tmp_path / "float.onnx", outputs=names)
    assert [value.name for value in ir.load(tmp_path / "float.onnx").graph.outputs] == names


class _Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.mean((2, 3)).abs() + 1).neg().relu()


def test_an_output_of_nothing_but_zeros_is_equal_to_itself(tmp_path: Path) -> None:
    export_float(_Zero(), torch.zeros(2, 3, 8, 8), tmp_path / "float.onnx")
    assert torch_parity(_Zero(), tmp_path / "float.onnx", np.ones((2, 3, 8, 8), np.float32)) == 0


def test_a_layer_that_runs_twice_is_refused_by_name(tmp_path: Path) -> None:
    module = _RunsTwice().eval()
    attach_sites(module)
    with pytest.raises(ExportError, match="`fc` runs more than once"):
        export_float(module, torch.zeros(2, 3, 8, 8), tmp_path / "float.onnx")
