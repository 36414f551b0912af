"""Which generator's images calibrate best: many sets of images, one quantizer, the same labelled images to judge by.

Comes in: a model and a `GeneratorsRecipe`. Goes out: a `GeneratorBench`, and the folder's JSON, table and chart. Every
set of images and every single result is a file in `work/`, so that a run that was killed goes on where it was, and one
with more seeds or schemes computes what is missing. A file's name says how many images it is of and is judged by: a run
with fewer of them stands beside one with more, and deletes nothing of it. Nothing is printed.
"""

import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from calibrators.files import write_json, written_whole
from calibrators.images import ImageSet
from dfq_deploy.building import made_with
from dfq_deploy.charts.generators import plot_generators
from dfq_deploy.choices import passes_of
from dfq_deploy.formats import FormatsOf, Job
from dfq_deploy.generation import GenerateOptions, Progress, quiet
from dfq_deploy.generation.device import device_named
from dfq_deploy.generation.generators import STUDENTS
from dfq_deploy.generation.making import make_images
from dfq_deploy.generator_bench.images import draw, images_to_draw, images_to_judge
from dfq_deploy.generator_bench.recipe import REAL, GeneratorsRecipe, form_of
from dfq_deploy.generator_bench.results import Gap, GeneratorBench, Result, Row, gaps_of
from dfq_deploy.measures import Share, without_nan
from dfq_deploy.models import Model
from dfq_deploy.models.loading import model_of
from dfq_deploy.planning import plan_of, suited
from dfq_deploy.reference import Reference, float_rows
from dfq_deploy.simulation import compare, rows_for
from dfq_deploy.watch import SILENT, Watch, counting
from dfq_deploy.workspace import Workspace

__all__ = ["bench_generators"]

_PARTS = 1000  # that the making of one set is told in


def bench_generators(
    recipe: GeneratorsRecipe,
    out: str | Path,
    *,
    images: str | None = None,
    real: str | None = None,
    limit: int | None = None,
    watch: Watch = SILENT,
) -> GeneratorBench:
    """Calibrate on the images of each generator, and measure what the model is worth then; simulated in PyTorch.

    Args:
        recipe: The model, the generators, the number formats, the refine passes and the seeds.
        out: Folder of `generators.json`, `.md` and `.png`; what is finished is kept in its `work/`.
        images: Labelled images to judge by (`folder:PATH`, `npz:PATH`, a file). None: those that the model brings along
            (the demo does).
        real: Real images to calibrate on, for comparison, none of them among those to judge by; each seed draws as many
            as the recipe counts. None: there are none, and nothing can be said of how far a generator goes from noise
            to them.
        limit: Judge by this many of the images, evenly spaced.
        watch: Told how it goes, and of each row when it is finished.

    Raises:
        DeployError: A generator cannot work on the model, images cannot be had, or real ones would be calibrated on and
            judged by; what was finished stays.
    """
    out = Path(out)
    watch.stage("model", False)
    model = model_of(recipe)
    judges = images_to_judge(model, images)
    pool = None if real is None else images_to_draw(model, real, recipe.count, judges)
    judges = judges if limit is None else judges.spread(limit)
    with Workspace(out, SILENT.stage) as work:
        watch.stage("float", False)
        desk = _Desk(recipe, model, judges, _floats(model, judges, work, watch), pool, work)
        for generator in desk.generators:
            watch.stage(generator, False)
            _make_all(desk, generator, watch)
        watch.stage("results", False)
        found = _measured(desk, watch)
        found.save(out)
        plot_generators(found, out / "generators.png")
    return found


@dataclass(frozen=True)
class _Desk:
    """What the benchmark works with.

    Attributes:
        recipe: What is asked for.
        model: The model.
        judges: Labelled images that all results are measured on.
        floats: The float model's logits on them.
        pool: Real calibration images to draw from, or None.
        work: Where finished sets and results are kept.
    """

    recipe: GeneratorsRecipe
    model: Model
    judges: ImageSet
    floats: np.ndarray
    pool: ImageSet | None
    work: Workspace

    @property
    def generators(self) -> tuple[str, ...]:
        """The kinds of images, real ones last."""
        return self.recipe.generator_names + ((REAL,) if self.pool else ())

    def images(self, generator: str, scheme: str, seed: int, progress: Progress = quiet) -> tuple[ImageSet, Path]:
        """A set of images, from its file or made now, and that file. Those that bring a student are made per scheme."""
        quantizer = self.recipe.quantizer(scheme)
        kind, exact = form_of(generator)
        name = f"set-{_in_names(generator)}"  # not images-…, by which an export knows its own
        device = device_named(self.recipe.device)
        facts: list[Any] = [generator, self.recipe.count, seed, str(device), self.model.fingerprint, made_with()]
        formats = FormatsOf(quantizer)
        options = GenerateOptions(self.recipe.count, seed, exact, formats=formats, device=device)
        make = partial(self._make, kind, options, progress)
        if kind in STUDENTS:
            name += f"-{scheme}"
            facts += formats.facts
        if generator == REAL and self.pool is not None:
            facts.append(self.pool.fingerprint)
            make = partial(draw, self.pool, self.recipe.count, seed)
        path = self.work.stage(f"{name}-{self.recipe.count}-{seed}", ".safetensors", facts, make)
        return ImageSet.load(path), path

    def _make(self, generator: str, options: GenerateOptions, progress: Progress, path: Path) -> None:
        """Make a set, from its beginning, so that the seconds beside it are those of the whole."""
        began = time.monotonic()
        made = make_images([generator], self.model, options, progress=progress)
        write_json(_seconds_beside(path), time.monotonic() - began)
        made.save(path)

    def result(self, scheme: str, refine: str, generator: str, seed: int) -> Result:
        """What one set of images gives under one quantizer, from its file or measured now."""
        images, path = self.images(generator, scheme, seed)
        recipe = suited(self.recipe.quantizer(scheme, refine), images)
        facts = [scheme, passes_of(recipe), images.fingerprint, *_judged_by(self.model, self.judges)]
        judged = f"{len(self.judges)}-{scheme}-{recipe.refine}"
        name = f"result-{judged}-{_in_names(generator)}-{self.recipe.count}-{seed}"

        def measure(path: Path) -> None:
            plan, refined, _files = plan_of(Job(recipe, self.model, images, self.work, SILENT))
            reference = Reference(refined, plan, self.model)
            found = compare(reference, self.judges, self.floats)
            assert found.top1 is not None and found.drop is not None
            figures = {
                "drop": found.drop[0],
                "top1": found.top1["simulated"].percent,
                "agreement": found.agreement.percent,
                "sqnr_db": found.sqnr_db,
            }
            write_json(path, without_nan(figures))

        figures = _read(self.work.stage(name, ".json", facts, measure))
        known = {figure: np.nan if value is None else value for figure, value in figures.items()}
        passes = images.made_by.get("passes", {"forward": None, "backward": None})
        seconds = None if generator == REAL else _read(_seconds_beside(path))
        return Result(seed, **known, seconds=seconds, **passes, threads=images.made_by.get("threads"))


def _floats(model: Model, judges: ImageSet, work: Workspace, watch: Watch) -> np.ndarray:
    """The float model's logits on the images that all is judged by: computed once for all results."""

    def write(path: Path) -> None:
        logits = rows_for(partial(float_rows, model), judges, progress=counting(watch))
        with written_whole(path) as temporary:
            np.save(temporary, logits)

    floats: np.ndarray = np.load(work.stage(f"logits-{len(judges)}", ".npy", _judged_by(model, judges), write))
    return floats


def _judged_by(model: Model, judges: ImageSet) -> list[Any]:
    return [judges.fingerprint, model.fingerprint, made_with()]


def _make_all(desk: _Desk, generator: str, watch: Watch) -> None:
    """Make all sets of one generator that are missing."""
    schemes = desk.recipe.scheme_names if form_of(generator)[0] in STUDENTS else desk.recipe.scheme_names[:1]
    sets = [(scheme, seed) for scheme in schemes for seed in desk.recipe.seed_numbers]
    for number, (scheme, seed) in enumerate(sets):

        def tell(step: int, steps: int, terms: Mapping[str, float], before: int = number * _PARTS) -> None:
            watch.progress(before + _PARTS * step // steps, len(sets) * _PARTS, terms)

        desk.images(generator, scheme, seed, tell)
        tell(1, 1, {})


def _measured(desk: _Desk, watch: Watch) -> GeneratorBench:
    """All results, row after row."""
    recipe, judges = desk.recipe, desk.judges
    quantizers = list(itertools.product(recipe.scheme_names, recipe.refine))
    seeds = recipe.seed_numbers
    total = len(quantizers) * len(desk.generators) * len(seeds)
    gaps: list[Gap] = []
    rows: list[Row] = []
    for scheme, refine in quantizers:
        own: list[Row] = []
        for generator in desk.generators:
            results: list[Result] = []
            for seed in seeds:
                results.append(desk.result(scheme, refine, generator, seed))
                watch.progress(len(seeds) * (len(rows) + len(own)) + len(results), total, {})
            own.append(Row(scheme, refine, generator, tuple(results)))
            watch.tell(str(own[-1]))
        found = gaps_of(own)
        gaps += found
        rows += [row.between(found) for row in own]
    return GeneratorBench(
        model=desk.model.name,
        float_top1=Share.of(desk.floats.argmax(1) == judges.labels).percent,
        n=len(judges),
        images=judges.source,
        settings={
            **asdict(recipe),
            "checkpoint": recipe.checkpoint and recipe.checkpoint.name,
            "spare": recipe.quantizer(recipe.scheme_names[0]).spare,
            "real": desk.pool and desk.pool.source,
        },
        versions=made_with(),
        gaps=tuple(gaps),
        rows=tuple(rows),
    )


def _in_names(generator: str) -> str:
    """How a generator is spelled in a file's name, where not every system takes a colon."""
    return generator.replace(":", "-")


def _seconds_beside(path: Path) -> Path:
    """Where the seconds stand that it took to make the images in `path`: not in it, whose bytes its seed decides."""
    return path.with_name(f"{path.name}.seconds")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
