"""On the target machine: the engine of a bundle that was exported elsewhere. No torch, no timm.

`model.onnx` and the plan in the bundle are all that a build needs. What it finds out replaces what the manifest and the
report say of the engine; nothing else in the bundle changes.
"""

import json
from dataclasses import replace
from pathlib import Path

from calibrators.errors import BundleError
from calibrators.files import written_whole
from calibrators.plan import QuantPlan
from calibrators.registry import pick
from exporters.backends import Built
from exporters.bundle import EngineFacts, Manifest, open_bundle, seal_bundle

__all__ = ["build"]


def build(folder: str | Path, *, backend: str | None = None) -> Manifest:
    """Build the engine of the bundle in `folder` for this machine; returns the new manifest.

    Args:
        folder: A bundle, every file as its manifest records it.
        backend: Build for this run-time instead of the one that it was exported for: `trt` and `rtx` take each
            other's bundles.

    Raises:
        BundleError: The bundle is incomplete or altered, or was placed for another kind of run-time.
        BackendError: The run-time does not take the model.
        ExportError: A layer that the plan quantizes is computed in float.
    """
    folder = Path(folder)
    manifest = open_bundle(folder, engine=False)
    name = backend or manifest.backend
    chosen, options = pick("exporters.backends", name), manifest.engine.options
    if chosen.placement(options) != pick("exporters.backends", manifest.backend).placement(options):
        raise BundleError(
            what=f"the model of `{folder}` cannot be built with `{name}`.",
            why=f"what it quantizes was chosen for `{manifest.backend}`.",
            fix=f"export it again with --backend {name}.",
        )
    plan, model = QuantPlan.load(folder / "plan.safetensors"), folder / "model.onnx"
    if name != manifest.backend:
        options = replace(options, targets=())
    chosen.check(plan, options)
    built: Built = chosen.build(model, plan, options)
    facts = EngineFacts.of(built, options)
    kept = [file for file in manifest.files if file not in manifest.engine.files]
    updated = manifest.model_copy(update={"backend": name, "engine": facts})
    seal_bundle(folder, updated, [*kept, *built.files])
    for stale in set(manifest.engine.files) - set(built.files):
        (folder / stale).unlink(missing_ok=True)
    _tell_report(folder / "report.json", facts)
    return open_bundle(folder)


def _tell_report(path: Path, facts: EngineFacts) -> None:
    """What the last check found of the numbers stays as it was."""
    if path.exists():
        report = json.loads(path.read_text(encoding="utf-8"))
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps({**report, "engine": facts.report()}, indent=1), encoding="utf-8")
