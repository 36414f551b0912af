"""What a person sees of what lies on the disk: a bundle and its engine, a plan, images, and what is made of them."""

from pathlib import Path

from rich.table import Table

from calibrators.errors import RecipeError
from calibrators.files import is_plain_file, sha256_of
from calibrators.images import ImageSet, is_image_set
from calibrators.pictures import seen_beside, sheet_beside
from calibrators.plan import QuantPlan
from dfq_deploy.showing.console import STUDENT, console
from exporters.archive import bundle_folder, is_archive
from exporters.bundle import EngineFacts, open_bundle
from exporters.signing import SIGNATURE

__all__ = ["print_converted", "print_engine", "print_images", "print_packed", "print_path", "print_plan"]


def print_path(path: Path, verify: Path | None = None) -> None:
    """Whatever lies at `path`: a bundle, a plan or an ImageSet.

    Raises:
        BundleError: It is a bundle that is not whole, or not signed with the key `verify`.
        RecipeError: It is none, and cannot be signed.
    """
    if path.is_dir() or is_archive(path):
        _print_bundle(path, verify)
    elif verify is not None:
        raise RecipeError(
            what=f"--verify means nothing to `{path}`.",
            why="bundles are signed, plans and images are not.",
            fix="leave it out, or pass a bundle.",
        )
    elif is_image_set(path):
        print_images(ImageSet.load(path), path)
    else:
        print_plan(QuantPlan.load(path))


def _print_bundle(path: Path, verify: Path | None) -> None:
    with bundle_folder(path) as folder:
        manifest = open_bundle(folder, verify=verify)
        console.print(f"{path}: {manifest.model.name}, {manifest.scheme}, for {manifest.backend}", style="bold")
        print_engine(manifest.engine, path)
        console.print(f"  calibrated on: {manifest.images['source']}")
        if manifest.model.student:
            console.print(f"  {STUDENT}")
        console.print(f"  float ONNX against torch: {manifest.float_parity:.1e}")
        for name in manifest.files:
            console.print(f"  {name}: {(folder / name).stat().st_size / 2**20:.1f} MiB")
        if verify is not None:
            console.print(f"  signed with the key of {verify}")
        elif is_plain_file(folder / SIGNATURE):
            console.print("  signed; not verified, which takes --verify")
        if (path / "recipe.toml").is_file() and not manifest.model.wrapped:
            console.print("  repeat: dfq-deploy export --recipe", path / "recipe.toml", "--out DIR")


def print_engine(facts: EngineFacts, folder: Path) -> None:
    """The engine: how far it is, how many layers are computed in what, and why some stay float."""
    targets = f" for {', '.join(facts.options.targets)}" if facts.options.targets else ""
    console.print(f"engine: {facts.state}{targets}{f' ({facts.note})' if facts.note else ''}")
    if facts.state == "pending":
        console.print(f"  build it on the machine that will run it: dfq-deploy build {folder}")
    layers = facts.census.counts
    if layers:
        console.print(f"layers: {', '.join(f'{count} in {kind}' for kind, count in layers.items())}")
    for reason in dict.fromkeys(facts.reasons.values()):
        named = [layer for layer, why in facts.reasons.items() if why == reason]
        console.print(f"  {named[0] if len(named) == 1 else f'{len(named)} like {named[0]}'}: {reason}")
    if facts.kernels:
        console.print(f"kernels: {', '.join(f'{count} {kind}' for kind, count in facts.kernels.items())}")


def print_images(images: ImageSet, path: Path) -> None:
    """An ImageSet: how many, of what size, made how."""
    console.print(f"{path}: {len(images)} images {images.preprocess.shape}, {images.source}")
    for name, value in images.made_by.items():
        console.print(f"  {name}: {value}")
    if images.student is not None:
        console.print(f"  student: {len(images.student.weights)} tensors, learned for {images.student.scheme}")
    similarity, attention = seen_beside(path)
    pictures = {"contact sheet": sheet_beside(path), "patch similarity": similarity, "attention": attention}
    for name, picture in pictures.items():
        if picture.is_file():
            console.print(f"  {name}: {picture}")


def print_plan(plan: QuantPlan) -> None:
    """A plan: each quantized site with its format and scale, and each spared one with its reason."""
    table = Table(title=f"{plan.scheme}: {len(plan.sites)} sites", title_justify="left", box=None, pad_edge=False)
    for column in ("site", "codes", "scale", "zero-point"):
        table.add_column(column)
    for name, q in plan.sites.items():
        per = (
            f"{q.scale.min():.4g} to {q.scale.max():.4g}, {q.scale.size} scales"
            if q.scale.size > 1
            else f"{q.scale:.4g}"
        )
        table.add_row(name, q.codes.name, per, "0" if not q.zero_point.any() else str(q.zero_point))
    console.print(table)
    for reason in dict.fromkeys(plan.spared.values()):
        sites = [name for name, why in plan.spared.items() if why == reason]
        spared = "stay float" if sites[0] not in plan.sites else "differ"
        console.print(f"{len(sites)} sites {spared}: {reason}.")


def print_packed(path: Path) -> None:
    """The archive that a bundle was packed into."""
    console.print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, SHA-256 {sha256_of(path)}")


def print_converted(file: Path, out: Path, to: str) -> None:
    """What was written from what."""
    console.print(f"{out}: {file} as {to}")
