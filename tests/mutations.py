"""Ways in which a demo bundle drifts from what it was, each sealed again so that no hash gives it away.

`MUTATIONS` maps what was done to the function that does it to a bundle's folder.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

import dfq_deploy as dfq
from calibrators.plan import QuantPlan
from exporters.bundle import Manifest, open_bundle, seal_bundle

Mutation = Callable[[Path], None]


def reseal(bundle: Path, **changes: object) -> None:
    """Give the manifest `changes`, and the hashes of the files as they are now."""
    manifest = Manifest.model_validate_json((bundle / "manifest.json").read_bytes())
    seal_bundle(bundle, manifest.model_copy(update=changes), list(manifest.files))


def _graph(change: Callable[[ir.Model], None]) -> Mutation:
    def mutate(bundle: Path) -> None:
        model = ir.load(bundle / "model.onnx")
        change(model)
        ir.save(model, bundle / "model.onnx")
        reseal(bundle)

    return mutate


def _constant(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Mutation:
    def write(model: ir.Model) -> None:
        constant = model.graph.initializers[name]
        assert constant.const_value is not None
        values = constant.const_value.numpy()
        constant.const_value = ir.tensor(np.array(change(values), values.dtype, order="C"), name=name)

    return _graph(write)


def _swapped(first: str, second: str) -> Callable[[ir.Model], None]:
    def swap(model: ir.Model) -> None:
        one, two = (model.graph.initializers[f"{layer}.weight.int8"] for layer in (first, second))
        one.const_value, two.const_value = two.const_value, one.const_value

    return swap


def _without(name: str) -> Callable[[ir.Model], None]:
    """A graph in which an Add passes its first operand on."""

    def drop(model: ir.Model) -> None:
        constant = model.graph.initializers[name]
        (add,) = constant.consumers()
        kept = next(value for value in add.inputs if value is not constant and value is not None)
        ir.convenience.replace_all_uses_with(add.outputs[0], kept)
        model.graph.remove(add, safe=True)

    return drop


def _without_residual(model: ir.Model) -> None:
    """A graph in which the last block's second residual is not added."""
    sums = [
        node
        for node in model.graph
        if node.op_type == "Add" and not any(value is not None and value.is_initializer() for value in node.inputs)
    ]
    kept = sums[-1].inputs[1]
    assert kept is not None
    ir.convenience.replace_all_uses_with(sums[-1].outputs[0], kept)
    model.graph.remove(sums[-1], safe=True)


def _attribute(op_type: str, name: str, value: float | str) -> Callable[[ir.Model], None]:
    def write(model: ir.Model) -> None:
        attribute = ir.AttrFloat32 if isinstance(value, float) else ir.AttrString
        for node in model.graph:
            if node.op_type == op_type:
                node.attributes[name] = attribute(name, value)  # type: ignore[arg-type]

    return write


def _preprocess(**changes: object) -> Mutation:
    def write(bundle: Path) -> None:
        reseal(bundle, preprocess=replace(open_bundle(bundle).preprocess, **changes))  # type: ignore[arg-type]

    return write


def _plan_of(**changes: object) -> Mutation:
    def write(bundle: Path) -> None:
        recipe = dfq.Recipe(model="demo", generator="noise", count=8, refine="none", **changes)  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as folder:  # in the bundle its images would replace those of its work/
            plan = Path(folder) / "plan.safetensors"
            dfq.calibrate(recipe, plan)
            shutil.copyfile(plan, bundle / plan.name)
        reseal(bundle)

    return write


def _both(factor: float) -> Mutation:
    """A scale that is wrong in the plan too, so that the reference is as wrong as the engine."""
    site = "blocks.1.mlp.fc2.input"

    def write(bundle: Path) -> None:
        plan = QuantPlan.load(bundle / "plan.safetensors")
        site_of = plan.sites[site]
        changed = replace(site_of, scale=(site_of.scale * np.float32(factor)).astype(np.float32))
        replace(plan, sites={**plan.sites, site: changed}).save(bundle / "plan.safetensors")
        _constant(f"{site}.scale", lambda scale: scale * np.float32(factor))(bundle)

    return write


def _shuffled_classes(bundle: Path) -> None:
    names = (bundle / "classes.txt").read_text().splitlines()
    (bundle / "classes.txt").write_text("\n".join(names[::-1]) + "\n")
    reseal(bundle)


def _one_code(codes: np.ndarray) -> np.ndarray:
    changed = codes.copy()
    changed[0, 0] += 1
    return changed


MUTATIONS: dict[str, Mutation] = {
    "an input's scale + 2 %": _constant("blocks.1.mlp.fc2.input.scale", lambda scale: scale * np.float32(1.02)),
    "a weight's scales + 2 %": _constant("blocks.0.attn.qkv.weight.scale", lambda scale: scale * np.float32(1.02)),
    "one channel's scale + 10 %": _constant(
        "blocks.2.mlp.fc1.weight.scale", lambda scale: np.r_[scale[:5], scale[5] * 1.1, scale[6:]]
    ),
    "an input's scale + 0.1 %": _constant("blocks.1.mlp.fc2.input.scale", lambda scale: scale * np.float32(1.001)),
    "weights of two layers swapped": _graph(_swapped("blocks.0.mlp.fc1", "blocks.2.mlp.fc1")),
    "one weight's code + 1": _constant("blocks.3.mlp.fc2.weight.int8", _one_code),
    "an input's zero-point + 1": _constant("blocks.2.attn.proj.input.zero_point", lambda zero: zero + 1),
    "the head's rows permuted": _constant("head.weight", lambda weight: np.roll(weight, 1, axis=1)),
    "a planned layer's bias dropped": _graph(_without("blocks.1.mlp.fc1.bias")),
    "the head's bias zeroed": _constant("head.bias", np.zeros_like),
    "a LayerNorm's weights + 2 %": _constant("blocks.2.norm1.weight", lambda weight: weight * 1.02),
    "positions rolled by one": _constant("pos_embed", lambda positions: np.roll(positions, 1, axis=1)),
    "a weight of NaN": _constant("norm.weight", lambda weight: weight * np.nan),
    "attention's scale + 2 %": _constant("val_35", lambda scale: scale * 1.02),
    "the last residual not added": _graph(_without_residual),
    "LayerNorm's epsilon 1e-6 to 1e-3": _graph(_attribute("LayerNormalization", "epsilon", 1e-3)),
    "GELU approximated by tanh": _graph(_attribute("Gelu", "approximate", "tanh")),
    "another mean in the preprocessing": _preprocess(mean=(0.485, 0.456, 0.406)),
    "another crop in the preprocessing": _preprocess(crop_pct=0.9),
    "classes in another order": _shuffled_classes,
    "another model's plan": _plan_of(random_weights=True),
    "another seed's plan": _plan_of(seed=1),
    "an input's scale x 1.3, in the plan too": _both(1.3),
    "an input's scale x 30, in the plan too": _both(30.0),
}
