"""What one command computes, in shards on the machines of a Ray cluster: batches of images, logits of a check.

A shard is what the command would have computed itself, batch for batch and with as many threads, so that what is put
together from shards is what one machine of the same kind gives. Nothing is judged here.
"""

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from calibrators.errors import BackendError, BundleError, ModelError
from calibrators.files import written_whole
from calibrators.images import Pixels
from calibrators.plan import QuantPlan
from calibrators.registry import pick
from dfq_deploy.generation import Elsewhere, GenerateOptions, Progress
from dfq_deploy.generation.device import device_named
from dfq_deploy.generation.engine import fast_dtype
from dfq_deploy.generation.making import generated
from dfq_deploy.logits import images_at_once, logits_by_batch
from dfq_deploy.models import Model
from dfq_deploy.models.loading import model_of
from dfq_deploy.opening import engine_again, load_again, refined_again
from dfq_deploy.recipe import GenerateRecipe
from dfq_deploy.reference import Reference
from dfq_deploy.workers import Order, Task, Workers, first_error_raised, threads_here
from exporters.archive import bundle_folder
from exporters.backends import Engine
from exporters.bundle import Manifest, open_bundle

__all__ = ["batches_elsewhere", "logits_elsewhere"]

_BATCHES = 8  # that a shard of a check holds at most
_NUMBERS = 2**26  # that its images put out, if one batch does not put out more; four to six of each come back


@dataclass(frozen=True)
class _Wanted:
    """What batches are made by.

    Attributes:
        recipe: The model and the method.
        model: Fingerprint of the model.
        device: Where they are made.
        precision: The fast one of that device here.
    """

    recipe: GenerateRecipe
    model: str
    device: str
    precision: str


def batches_elsewhere(workers: Workers, recipe: GenerateRecipe, model: Model, folder: Path) -> Elsewhere:
    """Who has batches made by `workers`, and puts them into `folder` as they come."""
    device = device_named(recipe.device)
    wanted = _Wanted(recipe, model.fingerprint, device, _precision(device))

    def make(generator: str, batches: Sequence[tuple[int, int]], progress: Progress) -> None:
        gpus = int(device == "cuda")
        tasks = [Task((generator, first, count), threads_here(), gpus) for first, count in batches]
        found = workers.answers(Order(_made_batch, wanted, tasks))
        for done, (_, files) in enumerate(first_error_raised(found), start=1):
            for name, content in files.items():
                with written_whole(folder / name) as temporary:
                    temporary.write_bytes(content)
            progress(done, len(tasks), {})

    return make


def _made_batch(wanted: _Wanted, generator: str, first: int, count: int) -> dict[str, bytes]:
    """The files in which a batch is kept; two where the memory did not hold it at once."""
    recipe, device = wanted.recipe, wanted.device
    model = _model_of(recipe)
    if model.fingerprint != wanted.model:
        raise ModelError(
            what=f"`{model.name}` has other weights on one machine than on another.",
            why="they were read under the same name, and differ.",
            fix="give all machines the same file, or --checkpoint a path that they share.",
        )
    if _precision(device) != wanted.precision:
        raise BackendError(
            what=f"one machine computes fastest in {_precision(device)}, the one that began in {wanted.precision}.",
            why="their processors differ, and would make other images.",
            fix="use machines of one kind, or --exact, which computes in float32 everywhere.",
        )
    with tempfile.TemporaryDirectory() as place:
        options = GenerateOptions(
            count, recipe.seed, recipe.exact, keep_in=Path(place), first=first, device=device_named(device)
        )
        generated(generator, pick("dfq_deploy.generation.generators", generator), model, options)
        return {path.name: path.read_bytes() for path in Path(place).glob("batch-*.safetensors")}


def _precision(device: str) -> str:
    return str(fast_dtype(torch.device(device)) or torch.float32).removeprefix("torch.")


@functools.lru_cache(maxsize=1)
def _model_of(recipe: GenerateRecipe) -> Model:
    """The model, for all batches that this process makes."""
    return model_of(recipe)


def logits_elsewhere(
    workers: Workers,
    folder: Path,
    manifest: Manifest,
    pixels: Pixels,
    *,
    numbers: int,
    checkpoint: Path | None,
    absent: str | None,
    progress: Callable[[int, int], object],
) -> Iterator[dict[str, np.ndarray]]:
    """What `logits_by_batch` gives for a bundle and images, computed by `workers` and in the same order.

    A shard that comes before its turn is kept until then.

    Args:
        workers: Who computes.
        folder: The bundle, or an archive of one, where every machine finds it.
        manifest: What it holds.
        pixels: The images; files of a folder are read by the machines.
        numbers: How many an image puts out.
        checkpoint: Where the weights lie, if not where the export found them.
        absent: Why the engine cannot run here; it must be so there, too. None: it can.
        progress: Called with images done and in all.

    Raises:
        DeployError: A machine does not find the same bundle, weights, images or run-time.
    """
    bundle = _Bundle(folder, manifest.model_dump_json(), checkpoint, threads_here(), absent)
    on_gpu = absent is None and (manifest.backend != "ort" or manifest.engine.options.provider != "cpu")
    batch = images_at_once(numbers)
    shard = batch * max(1, min(_BATCHES, _NUMBERS // (batch * numbers)))
    starts = range(0, len(pixels), shard)
    tasks = [Task((start, min(start + shard, len(pixels))), threads_here(), int(on_gpu)) for start in starts]
    found = workers.answers(Order(_logits_of_shard, (bundle, pixels), tasks))
    early: dict[int, list[dict[str, np.ndarray]]] = {}
    done = turn = 0
    for number, batches in first_error_raised(found):
        early[number] = batches
        done += sum(len(each["engine"]) for each in batches)
        progress(done, len(pixels))
        while turn in early:
            yield from early.pop(turn)
            turn += 1


@dataclass(frozen=True)
class _Bundle:
    """Which bundle is looked at, and how."""

    folder: Path
    manifest: str
    checkpoint: Path | None
    threads: int
    absent: str | None


def _logits_of_shard(asked: tuple[_Bundle, Pixels], start: int, stop: int) -> list[dict[str, np.ndarray]]:
    bundle, pixels = asked
    reference, engine, manifest = _opened(bundle)
    return [*logits_by_batch(reference, engine, pixels, manifest.engine.options.body, start=start, stop=stop)]


@functools.lru_cache(maxsize=1)
def _opened(bundle: _Bundle) -> tuple[Reference, Engine, Manifest]:
    """Reference and engine, for all shards that this process looks at."""
    with bundle_folder(bundle.folder) as folder:
        manifest = open_bundle(folder)
        if manifest.model_dump_json() != bundle.manifest:
            raise BundleError(
                what=f"`{bundle.folder}` holds another bundle on one machine than on another.",
                why="their manifests differ.",
                fix="put it where all machines see the same files.",
            )
        model = load_again(folder, manifest, bundle.checkpoint)
        plan = QuantPlan.load(folder / "plan.safetensors")
        engine, _, absent = engine_again(folder, manifest, threads=bundle.threads)
        if (absent is None) != (bundle.absent is None):
            raise BackendError(
                what="the engine runs on one machine and not on another.",
                why=absent or bundle.absent or "",
                fix="give the command on a machine like the others.",
            )
        return Reference(refined_again(folder, manifest, model), plan, model), engine, manifest
