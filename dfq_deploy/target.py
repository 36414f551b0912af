"""On the target machine: the engine of a bundle that was exported elsewhere. No torch, no timm.

`model.onnx` and the plan in the bundle are all that a build needs. What it finds out replaces what the manifest and the
report say of the engine; the report's other numbers stay, and its verdict is open until the next check.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from calibrators.errors import BundleError, NotHereError
from calibrators.files import is_plain_file, sha256_of, write_json
from calibrators.plan import QuantPlan
from calibrators.registry import pick
from dfq_deploy.workspace import held
from exporters.backends import Built
from exporters.bundle import EngineFacts, Manifest, open_bundle, seal_bundle
from exporters.signing import Signer, signer

__all__ = ["build"]


def build(
    folder: str | Path,
    *,
    backend: str | None = None,
    sign: str | Path | None = None,
    verify: str | Path | None = None,
) -> Manifest:
    """Build the engine of the bundle in `folder` for this machine; returns the new manifest.

    Args:
        folder: A bundle, every file as its manifest records it.
        backend: Build for this run-time instead of the one that it was exported for: `trt` and `rtx` take each
            other's bundles.
        sign: PEM file with the private key that signs the new manifest; None: a signature of the old one goes, since
            the manifest changes.
        verify: PEM file with the public key that the bundle must be signed with before it is built.

    Raises:
        BundleError: The bundle is incomplete or altered, not signed with that key, in an archive, or was placed for
            another kind of run-time.
        RecipeError: A key cannot be read, or another run is working in the folder.
        BackendError: The run-time does not take the model, or is missing while the bundle has an engine already.
        ExportError: A layer that the plan quantizes is computed in float.
    """
    folder = Path(folder)
    if folder.is_file():
        raise BundleError(
            what=f"`{folder}` is a file, and a build writes into the bundle's folder.",
            why="the engine lies beside the model.",
            fix="unpack it, build that folder, and pack it again with `dfq-deploy pack`.",
        )
    signs = None if sign is None else signer(sign)
    open_bundle(folder, engine=False, verify=verify)  # before anything is written there
    with held(folder):
        manifest = open_bundle(folder, engine=False, verify=verify)  # as it is now: an export may just have ended
        return _build(folder, manifest, backend, signs)


def _build(folder: Path, manifest: Manifest, backend: str | None, sign: Signer | None) -> Manifest:
    name = backend or manifest.backend
    chosen, options = pick("exporters.backends", name), manifest.engine.options
    if chosen.placement(options) != pick("exporters.backends", manifest.backend).placement(options):
        raise BundleError(
            what=f"the model of `{folder}` cannot be built with `{name}`.",
            why=f"what it quantizes was chosen for `{manifest.backend}`.",
            fix=f"export it again with --backend {name}.",
        )
    if name != manifest.backend:
        options = replace(options, targets=())
    plan, report = QuantPlan.load(folder / "plan.safetensors"), _report(folder)
    chosen.check(plan, options)
    for timings in folder.glob("timing-*.cache"):  # a build reads them, and no run-time does, which would have looked
        if not is_plain_file(timings) or manifest.files.get(timings.name) != sha256_of(timings):
            timings.unlink()
    built: Built = chosen.build(folder / "model.onnx", plan, options)
    if built.state == "pending" and manifest.engine.state == "built":
        raise NotHereError(
            what=f"the engine of `{folder}` cannot be built here; the one that it has stays.",
            why=built.note,
            fix="run this on the machine that will run the engine.",
        )
    facts = EngineFacts.of(built, options)
    if built.state == "pending" and not built.census.precision:  # what is known of its layers stays known
        facts = manifest.engine.model_copy(update={"options": options, "note": built.note})
    kept = [file for file in manifest.files if file not in manifest.engine.files]
    seal_bundle(
        folder, manifest.model_copy(update={"backend": name, "engine": facts}), [*kept, *built.files], sign=sign
    )
    for stale in set(manifest.engine.files) - set(built.files):
        (folder / stale).unlink(missing_ok=True)
    if report is not None and facts != manifest.engine:
        told = {**report, "engine": facts.report()}
        if facts.state == "built" and report.get("verdict") != "fail":
            told |= {"verdict": "undecided", "reason": "the engine was built after this check: run dfq-deploy check"}
        write_json(folder / "report.json", told)
    return open_bundle(folder)


def _report(folder: Path) -> dict[str, Any] | None:
    """What the last check found, if there was one."""
    path = folder / "report.json"
    if not is_plain_file(path):
        return None
    try:
        report: dict[str, Any] = {**json.loads(path.read_text(encoding="utf-8"))}
    except (TypeError, ValueError) as cause:
        raise BundleError(
            what=f"`{path}` is not a whole report.",
            why=f"{cause}.",
            fix="delete it: the next `dfq-deploy check` writes a new one.",
        ) from cause
    return report
