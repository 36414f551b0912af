"""One gate, read top to bottom: integrity, images, engine against reference, float and baseline, verdict."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from calibrators.errors import RecipeError
from calibrators.files import sha256_of
from calibrators.images import ImageSet
from calibrators.plan import QuantPlan
from dfq_deploy.evaluate import FLOOR_FACTOR, floor_verdict, layer_tolerance
from dfq_deploy.gating.against import baseline_checks, new_baseline
from dfq_deploy.gating.baseline import Baseline, changes_between
from dfq_deploy.gating.checks import drop_check, layers_check, ratio_check, share_check
from dfq_deploy.gating.integrity import OpenBundle, opened
from dfq_deploy.gating.limits import GateLimits
from dfq_deploy.gating.result import GateCheck, GateResult, worst_of
from dfq_deploy.gating.seeing import Seen, look
from dfq_deploy.models import Model
from dfq_deploy.opening import images_to_check
from dfq_deploy.statistics import Paired
from dfq_deploy.tasks import task_named
from dfq_deploy.watch import SILENT, Watch
from exporters.archive import bundle_folder
from exporters.bundle import MANIFEST, open_bundle

__all__ = ["gate"]

_DEFAULT = GateLimits()


def gate(
    folder: str | Path,
    limits: GateLimits = _DEFAULT,
    *,
    images: str | None = None,
    limit: int | None = None,
    baseline: Path | None = None,
    update: bool = False,
    checkpoint: Path | None = None,
    model: Model | None = None,
    verify: str | Path | None = None,
    watch: Watch = SILENT,
) -> GateResult:
    """Judge the bundle in `folder`: its integrity, and its engine against reference, float and baseline.

    Args:
        folder: A bundle, or a zip archive of one.
        limits: What is let pass.
        images: `folder:PATH`, `npz:PATH` or an ImageSet file. None: those that the bundle was calibrated on.
        limit: Use this many of them, evenly spaced.
        baseline: A file that an earlier gate wrote.
        update: Write that file from this engine instead of comparing with it, unless the engine fails.
        checkpoint: Where the weights lie now, if not where the export found them.
        model: The model, where the bundle was made of one that came from `wrap`.
        verify: PEM file with the public key that the bundle must be signed with; the gate fails if it is not.
        watch: Told how it goes.

    Raises:
        BundleError: There is no bundle.
        RecipeError: The baseline cannot be read, or is to be written and has no name; or `verify` is no key.
        DeployError: Weights or images cannot be had, or the engine cannot be loaded.
    """
    before = _baseline_in(baseline, update=update)
    name = Path(folder).resolve().name
    with bundle_folder(Path(folder)) as place:
        if not (place / MANIFEST).is_file():
            open_bundle(place)  # says so
        judged = sha256_of(place / MANIFEST)  # as it is opened now: an export may write another one meanwhile
        checks, bundle = opened(place, checkpoint, watch, model=model, verify=verify, called=str(folder))
        if bundle is None:
            return _stopped(name, checks, judged)
        seen = look(bundle, _picked(bundle, images, limit), timed=baseline is not None, watch=watch)
        checks += _measured(seen, bundle.reference.plan, limits)
        left_out = {} if seen.labels is not None else {"drop": "no labels"}
        changes: tuple[str, ...] = ()
        if baseline is None:
            left_out["baseline"] = "no --baseline FILE was given"
        elif before is not None and not update:
            more, missing = baseline_checks(before, bundle, seen=seen, limits=limits)
            checks, left_out = checks + more, left_out | missing
        elif worst_of(checks) == "fail":
            left_out["baseline"] = "not written: this engine fails"
        else:
            left_out["baseline"] = "it is written anew"
            after = new_baseline(bundle, seen)
            changes = tuple(changes_between(before, after))
            after.save(baseline)
    return GateResult(
        bundle=name,
        verdict=worst_of(checks),
        mode=seen.mode,
        n=seen.found.n,
        images=seen.found.images,
        checks=tuple(checks),
        left_out=left_out,
        smallest_detectable_drop_pt=seen.against_float.smallest_detectable if seen.against_float else None,
        manifest_sha256=judged,
        changes=changes,
    )


def _picked(bundle: OpenBundle, place: str | None, limit: int | None) -> ImageSet:
    """The images to judge by; those that come with a model, which have labels, only where they are asked for."""
    model = replace(bundle.model, labelled=None)  # what a gate judges is no accident
    images = images_to_check(bundle.folder, bundle.manifest, model, place)
    return images if limit is None else images.spread(limit)


def _baseline_in(path: Path | None, *, update: bool) -> Baseline | None:
    """The baseline in `path`; where it is to be written there may be none yet."""
    if path is None and update:
        raise RecipeError(
            what="--update has nothing to write.",
            why="no --baseline FILE was given.",
            fix="name the file with --baseline.",
        )
    return None if path is None or (update and not path.exists()) else Baseline.load(path)


def _stopped(name: str, checks: list[GateCheck], manifest: str) -> GateResult:
    """A gate that ends before there is anything to compare."""
    return GateResult(
        bundle=name,
        verdict="fail",
        mode="synthetic",  # no label was looked at
        n=0,
        images="",
        checks=tuple(checks),
        left_out={"images": f"{checks[-1].name} failed, so nothing was run"},
        smallest_detectable_drop_pt=Paired(0, 0, 0).smallest_detectable,
        manifest_sha256=manifest,
    )


def _measured(seen: Seen, plan: QuantPlan, limits: GateLimits) -> Iterator[GateCheck]:
    """What was run: the layers, the engine against its reference, and against float."""
    found = seen.found
    body = found.engine.options.body
    yield layers_check(found.layer_error, {layer: layer_tolerance(plan, layer, body) for layer in found.layer_error})
    if not seen.ran:
        yield GateCheck("engine", 0.0, 1.0, (0.0, 0.0), "undecided", f"it has not run here: {found.ran} did")
    within = floor_verdict(found.floor_ratio, found.negligible, found.ran)
    if not found.finite:
        within = "fail", found.reason
    yield ratio_check("engine_reference", found.floor_ratio, FLOOR_FACTOR, n=found.n, found=within)
    if seen.labels is not None and seen.against_float is not None:
        yield drop_check("drop", seen.against_float, limits.max_drop, said="lost against float")
    share = found.agreement["engine_float"]
    said = f"{found.ran} decides as float does"
    if not seen.decisions:
        said = f"{task_named(found.task).AGREEMENT} of {found.ran} with float"
    yield share_check("agreement", share, limits.min_agreement, said=said)
