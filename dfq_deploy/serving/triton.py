"""A model repository for NVIDIA Triton Inference Server: the engine of a bundle, and what Triton has to know of it.

Three models. NAME is the engine, on Triton's ONNX Runtime or TensorRT backend. NAME_preprocess turns image files into
its input, on the Python backend. NAME_encoded is both, as an ensemble. Triton's ONNX Runtime backend passes on none of
the session options that `dfq_deploy.load` sets: weights that only floats meet it would therefore multiply with
activations rounded to INT8, and so the repository's model has them as floats.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx_ir as ir

from calibrators.errors import BackendError, BundleError
from calibrators.files import folder_written_whole
from dfq_deploy.serving import triton_configs as configs
from dfq_deploy.serving.options import RepoOptions, gathers, name_for
from exporters.archive import bundle_folder
from exporters.bundle import Manifest, open_bundle
from exporters.unpack import unpack_weights

__all__ = ["Repository", "serve_repo"]

_EXTERNAL_FROM_BYTES = 2**30  # protobuf holds no more than two of these
_PROVIDERS = ("", "cpu", "cuda")


@dataclass(frozen=True)
class Repository:
    """What was written.

    Attributes:
        folder: The repository.
        models: Its models: the engine, the preprocessing, both.
        notes: What to know before Triton loads it.
    """

    folder: Path
    models: tuple[str, str, str]
    notes: tuple[str, ...]


def serve_repo(folder: str | Path, out: str | Path, options: RepoOptions | None = None) -> Repository:
    """Write the model repository `out` for the bundle in `folder`, whole or not at all.

    Args:
        folder: A bundle with a built engine, or a zip archive of one; it need not be one that runs here.
        out: Folder to write, where nothing is yet.
        options: What its configuration says.

    Raises:
        BundleError: The bundle is incomplete or altered, its engine is pending, or something lies at `out`.
        BackendError: Triton has no backend for the engine.
        RecipeError: The options do not suit the bundle.
    """
    options = options or RepoOptions()
    with bundle_folder(Path(folder)) as opened:
        manifest = open_bundle(opened, verify=options.verify)
        _refuse_unservable(opened, manifest)
        return _written(opened, manifest, Path(out), options)


def _written(folder: Path, manifest: Manifest, out: Path, options: RepoOptions) -> Repository:
    if out.exists():
        raise BundleError(
            what=f"something lies at `{out}` already.",
            why="a model repository is written whole, or not at all.",
            fix="pass another --out, or delete it; Triton takes several folders with --model-repository.",
        )
    name, gather = name_for(options, manifest), gathers(options, manifest)
    names = (name, f"{name}_preprocess", f"{name}_encoded")
    labels = "classes.txt" in manifest.files
    with folder_written_whole(out) as repository:
        for one in names:
            (repository / one / "1").mkdir(parents=True)
        notes = _put_engine(folder, manifest, repository / name / "1")
        shutil.copyfile(Path(__file__).with_name("triton_model.py"), repository / names[1] / "1" / "model.py")
        facts = {**asdict(manifest.preprocess), "max_pixels": options.max_pixels}
        texts = (
            configs.engine(name, manifest, options, labels=labels, gather=gather),
            configs.preprocess(names[1], manifest, options, facts=facts),
            configs.ensemble(names, manifest, labels=labels),
        )
        for one, text in zip(names, texts, strict=True):
            (repository / one / "config.pbtxt").write_text(text, encoding="utf-8")
        if labels:
            for one in (names[0], names[2]):
                shutil.copyfile(folder / "classes.txt", repository / one / configs.LABELS)
    python = f"{names[1]} needs Pillow in Triton's Python: pip install pillow in its image."
    return Repository(out, names, (*notes, python))


def _refuse_unservable(folder: Path, manifest: Manifest) -> None:
    """Return if Triton has a backend for the engine, and the engine is there."""
    facts, provider = manifest.engine, manifest.engine.options.provider
    if facts.state == "pending":
        raise BundleError(
            what=f"the engine of `{folder}` is not built yet.",
            why=facts.note,
            fix=f"run this on the machine that will run the engine: dfq-deploy build {folder}",
        )
    if manifest.backend not in ("ort", "trt") or provider not in _PROVIDERS:
        raise BackendError(
            what=f"Triton does not serve engines for `{provider if manifest.backend == 'ort' else manifest.backend}`.",
            why="its backends here are ONNX Runtime on cpu or cuda, and TensorRT.",
            fix=f"dfq-deploy build {folder} --backend trt, on the machine that will run it."
            if manifest.backend == "rtx"
            else "export with --backend trt.",
        )
    if (channels := manifest.preprocess.shape[0]) not in (1, 3):
        raise BackendError(
            what=f"`{folder}` cannot be served with its preprocessing.",
            why=f"pictures have 1 or 3 channels, the model takes {channels}.",
            fix="serve it with dfq-deploy serve, which takes arrays that are model-ready.",
        )
    if manifest.backend == "trt" and facts.options.batch[0] > 1:
        raise BackendError(
            what=f"the engine of `{folder}` takes {facts.options.batch[0]} images or more.",
            why="Triton sends what it has, down to one.",
            fix="export with --batch 1,8,32.",
        )


def _put_engine(folder: Path, manifest: Manifest, place: Path) -> tuple[str, ...]:
    """Put what Triton loads into `place`; returns what to know of it."""
    if manifest.backend == "trt":
        shutil.copyfile(folder / "model.engine", place / "model.plan")
        made_for = manifest.engine.made_for
        return (f"the engine is for TensorRT {made_for['tensorrt']} and {made_for['gpu']}: Triton must have both.",)
    model = ir.load(folder / "model.onnx")
    unpacked = unpack_weights(model)
    if not unpacked:
        for file in ("model.onnx", "model.onnx.data"):
            if file in manifest.files:
                shutil.copyfile(folder / file, place / file)
        return ()
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    ir.save(model, place / "model.onnx", external_data="model.onnx.data" if size >= _EXTERNAL_FROM_BYTES else None)
    return (f"{unpacked} weights are floats in the copy of the model: Triton would round activations for packed ones.",)
