"""The benchmark of generators: what it measures, that it goes on where it was, and what a person sees of it."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from syrupy.assertion import SnapshotAssertion

import dfq_deploy as dfq
from calibrators.errors import ImagesError
from calibrators.images import ImageSet
from dfq_deploy import cli
from dfq_deploy.generation.engine import Stage
from dfq_deploy.generation.generators import psaq_v1, psaq_v2
from dfq_deploy.generator_bench import running
from dfq_deploy.generator_bench.results import GeneratorBench, Result, Row, Spread, gaps_of
from dfq_deploy.models.loading import load_model
from dfq_deploy.opening import open_images
from dfq_deploy.recipe import CalibrateRecipe
from dfq_deploy.showing.console import console
from dfq_deploy.showing.sets import print_generators

_DIGITS = Path(dfq.__file__).parent / "models" / "demo" / "held_back.npz"
_IMAGES, _REAL = "npz:judged.npz", "npz:drawn.npz"  # its halves
_ASKED: dict[str, Any] = {"model": "demo", "generators": "noise,dead_leaves", "schemes": "w4a4", "refine": ("none",)}
_CHEAP = dfq.GeneratorsRecipe(**_ASKED, seeds="0,1", count=4)
_LIMIT = 40


def _run(folder: Path, recipe: dfq.GeneratorsRecipe = _CHEAP, **options: Any) -> GeneratorBench:
    return dfq.bench_generators(recipe, folder, **({"images": _IMAGES, "real": _REAL, "limit": _LIMIT} | options))


@pytest.fixture(scope="module", autouse=True)
def _halves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The demo's digits in two halves, one to judge by and one to calibrate on, in the folder that the tests run in."""
    folder = tmp_path_factory.mktemp("halves")
    with np.load(_DIGITS) as digits, pytest.MonkeyPatch.context() as patch:
        for first, name in enumerate(("judged", "drawn")):
            np.savez(folder / f"{name}.npz", **{key: values[first::2] for key, values in digits.items()})
        patch.chdir(folder)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GeneratorBench]:
    """A finished benchmark; copy the folder before changing it."""
    folder = tmp_path_factory.mktemp("bench") / "run"
    return folder, _run(folder)


@pytest.fixture
def folder(finished: tuple[Path, GeneratorBench], tmp_path: Path) -> Path:
    """A finished benchmark that may go on."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is computed: sets of images by generator and seed, and comparisons."""
    computed: list[str] = []

    def counted(name: Callable[..., str], original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            computed.append(name(*arguments))
            return original(*arguments, **options)

        return call

    of_images = counted(lambda names, _model, options: f"{names[0]} {options.seed}", running.make_images)
    monkeypatch.setattr(running, "make_images", of_images)
    monkeypatch.setattr(running, "compare", counted(lambda *_: "result", running.compare))
    monkeypatch.setattr(running, "float_rows", counted(lambda *_: "float", running.float_rows))
    return computed


# What is measured.


def test_there_is_a_row_per_kind_of_images_and_a_result_per_seed(finished: tuple[Path, GeneratorBench]) -> None:
    _, found = finished
    assert [(row.scheme, row.refine, row.generator) for row in found.rows] == [
        ("w4a4", "none", name) for name in ("noise", "dead_leaves", "real")
    ]
    assert {tuple(result.seed for result in row.results) for row in found.rows} == {(0, 1)}
    assert (found.n, found.model, found.settings["spare"]) == (_LIMIT, "demo", "massive")


def test_a_result_is_that_of_a_simulation_on_the_same_images(
    finished: tuple[Path, GeneratorBench], tmp_path: Path
) -> None:
    folder, found = finished
    (images,) = (folder / "work").glob("set-dead_leaves-4-1-*.safetensors")
    recipe = CalibrateRecipe(model="demo", scheme="w4a4", refine="none", spare="massive", calib=str(images))
    alone = dfq.simulate(recipe, tmp_path / "alone", images=_IMAGES, limit=_LIMIT)
    assert alone.top1 is not None and alone.drop is not None
    result = found.rows[1].results[1]
    assert result.agreement == alone.agreement.percent
    assert (result.top1, result.drop) == (alone.top1["simulated"].percent, alone.drop[0])
    assert result.sqnr_db == alone.sqnr_db
    assert found.float_top1 == alone.top1["float"].percent


def test_real_images_are_drawn_by_the_seed_and_none_is_made(finished: tuple[Path, GeneratorBench]) -> None:
    folder, found = finished
    pool = open_images(_REAL, load_model("demo").preprocess)
    known = {image.tobytes() for image in pool.pixels[:]}
    sets = [ImageSet.load(path) for path in sorted((folder / "work").glob("set-real-*"))]
    assert len(sets) == 2 and sets[0].fingerprint != sets[1].fingerprint
    assert all(len({image.tobytes() for image in images.pixels[:]} & known) == 4 for images in sets)
    assert found.rows[-1].spread("seconds") is found.rows[-1].spread("forward") is None
    noise = found.rows[0].results[0]
    assert noise.seconds is not None and noise.seconds > 0
    assert (noise.forward, noise.backward) == (0, 0)


def _row(generator: str, *agreements: float, top1: float = 50.0) -> Row:
    results = (
        Result(seed, 70.0 - top1, top1, agreement, 3.0, 31.25, 353.1, 353.1, threads=2)
        for seed, agreement in enumerate(agreements)
    )
    return Row("w4a4", "none", generator, tuple(results))


def test_a_spread_is_numpys_mean_and_sample_deviation() -> None:
    values = [60.5, 61.75, 58.25]
    spread = _row("dfq", *values).spread("agreement")
    assert spread is not None
    assert (spread.mean, spread.deviation) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))
    assert Spread.of([3.0]) == Spread(3.0, None)


def test_noise_is_0_and_real_images_are_100() -> None:
    rows = [_row("noise", 9.0, 11.0), _row("dfq", 41.0, 43.0), _row("real", 49.0, 51.0)]
    agreement, top1 = gaps_of(rows)
    assert agreement.why is None
    ways = [row.between((agreement, top1)).recovered["agreement"] for row in rows]
    assert [way and way.mean for way in ways] == [0.0, 80.0, 100.0]
    assert [way and way.deviation for way in ways] == [pytest.approx(np.std([0, 5], ddof=1))] * 3  # 2 of 40 points
    assert rows[1].between((agreement, top1)).shares() == ("80 ± 4", "")
    assert top1.why is not None and "+0.00 points from noise, no better" in top1.why
    assert {row.between((agreement, top1)).recovered["top1"] for row in rows} == {None}


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([_row("noise", 9.0, 11.0)], "there were no real images"),
        ([_row("dfq", 9.0), _row("real", 50.0)], "noise was not among the generators"),
        ([_row("noise", 10.0), _row("real", 9.0)], r"by agreement with float .* -1\.00 points from noise, no better"),
        ([_row("noise", 9.0, 11.0), _row("real", 11.0, 13.0)], r"\+2\.00 .*, within the deviations of both \(2\.83 to"),
    ],
)
def test_a_gap_that_is_none_says_why(rows: list[Row], why: str) -> None:
    gap = gaps_of(rows)[0]
    assert gap.why is not None
    assert re.search(why, gap.why)
    assert gap.share(30.0) is None


# Going on.


def test_float_is_computed_once_for_all_rows(tmp_path: Path, calls: list[str]) -> None:
    _run(tmp_path / "run")
    assert calls.count("float") == -(-_LIMIT // 16), "batches of one walk over the images"
    assert calls.count("result") == 6


def test_a_finished_run_computes_nothing_and_gives_the_same(
    finished: tuple[Path, GeneratorBench], folder: Path, calls: list[str]
) -> None:
    assert _run(folder) == finished[1]
    assert calls == []
    for name in ("generators.json", "generators.md"):
        assert (folder / name).read_bytes() == (finished[0] / name).read_bytes()


def test_the_threads_are_those_that_the_images_were_made_with(
    finished: tuple[Path, GeneratorBench], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    found = _run(folder, dataclasses.replace(_CHEAP, seeds="0,2"))
    before = finished[1].rows[0].results[0].threads
    assert [[result.threads for result in row.results] for row in found.rows] == [[before, 77]] * 2 + [[None, None]]


def test_more_seeds_and_schemes_compute_what_is_missing(folder: Path, calls: list[str]) -> None:
    _run(folder, dataclasses.replace(_CHEAP, seeds="1,2"))
    assert calls == ["noise 2", "dead_leaves 2", *["result"] * 3]
    calls.clear()
    _run(folder, dataclasses.replace(_CHEAP, schemes="w4a4,w6a6"))
    assert calls == ["result"] * 6, "the images are the same for all formats"


def test_other_images_to_judge_by_give_other_results(folder: Path, calls: list[str]) -> None:
    _run(folder, limit=7, real=None)
    assert sorted(set(calls)) == ["float", "result"]


@pytest.mark.parametrize("shorter", ["judged by fewer", "of fewer images", "an export"])
def test_a_shorter_run_in_between_costs_nothing(folder: Path, calls: list[str], shorter: str) -> None:
    kept = {path.name for kind in ("set", "result", "logits") for path in (folder / "work").glob(f"{kind}-*")}
    assert len(kept) == 6 + 4 + 6 + 1, "sets, the seconds of those that were made, results, float"
    if shorter == "judged by fewer":
        _run(folder, limit=7)
        assert set(calls) == {"float", "result"}
    elif shorter == "of fewer images":
        _run(folder, dataclasses.replace(_CHEAP, count=2))
        assert calls == ["noise 0", "noise 1", "dead_leaves 0", "dead_leaves 1", *["result"] * 6]
    else:
        dfq.export(dfq.Recipe(model="demo", generator="noise", count=2, seed=5), folder, limit=1)
    assert kept <= {path.name for path in (folder / "work").iterdir()}
    calls.clear()
    _run(folder)
    assert calls == []


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    compare = running.compare

    def stopped(*arguments: Any, **options: Any) -> Any:
        if calls.count("result") == 4:
            raise KeyboardInterrupt
        return compare(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(running, "compare", stopped)
        _run(tmp_path / "run")
    calls.clear()
    found = _run(tmp_path / "run")
    assert calls == ["result"] * 2
    assert [len(row.results) for row in found.rows] == [2, 2, 2]


def test_a_generator_that_brings_a_student_makes_images_per_scheme(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psaq_v2, "_FAST_STAGES", (Stage(1, 2), Stage(2, 2)))
    recipe = dfq.GeneratorsRecipe(
        model="demo", generators="noise,psaq_v2", schemes="w4a4,w6a6", seeds="3", count=4, refine=("none", "default")
    )
    found = _run(tmp_path / "run", recipe)
    assert [call for call in calls if call not in ("float", "result")] == ["noise 3", "psaq_v2 3", "psaq_v2 3"]
    kept = [path.name.partition("-4-3-")[0] for path in (tmp_path / "run" / "work").glob("set-psaq*.safetensors")]
    assert sorted(kept) == ["set-psaq_v2-w4a4", "set-psaq_v2-w6a6"]
    rows = {(row.scheme, row.refine): row.results for row in found.rows if row.generator == "psaq_v2"}
    assert rows["w4a4", "none"] == rows["w4a4", "default"] != rows["w6a6", "none"]
    assert calls.count("result") == 2 * (2 * 2 + 1), "a student takes no passes by default: one result for both"
    assert rows["w4a4", "none"][0].forward == 3 + 2 + 2  # the images' steps, against the student, the student's own


def test_a_published_form_stands_beside_the_fast_one(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psaq_v1, "_FAST_STAGES", (Stage(2, 2),))
    monkeypatch.setattr(psaq_v1, "V1_STAGES", (Stage(3, 2), Stage(2, 2)))
    recipe = dfq.GeneratorsRecipe(
        **_ASKED | {"generators": "psaq_v1,psaq_v1:exact", "schemes": "w4a4,w6a6"}, seeds="3", count=2
    )
    found = _run(tmp_path / "run", recipe, real=None)
    assert [call for call in calls if call not in ("float", "result")] == ["psaq_v1 3"] * 2
    assert [(row.generator, row.results[0].forward) for row in found.rows] == [
        ("psaq_v1", 2),
        ("psaq_v1:exact", 5),
    ] * 2
    (kept,) = (tmp_path / "run" / "work").glob("set-psaq_v1-exact-2-3-*.safetensors")
    alone = tmp_path / "alone.safetensors"
    dfq.generate(dfq.Recipe(model="demo", generator="psaq_v1", exact=True, seed=3, count=2), alone)
    assert ImageSet.load(kept).fingerprint == ImageSet.load(alone).fingerprint
    for shown in (found.markdown(), (tmp_path / "run" / "generators.json").read_text()):
        assert "psaq_v1:exact" in shown
    calls.clear()
    assert _run(tmp_path / "run", recipe, real=None) == found
    assert calls == []


# What a person sees.


def test_of_one_seed_a_way_is_told_without_a_deviation() -> None:
    rows = [_row("noise", 10.0), _row("dfq", 42.0), _row("real", 50.0)]
    assert [row.between(gaps_of(rows)).recovered["agreement"] for row in rows] == [
        Spread(share, None) for share in (0.0, 80.0, 100.0)
    ]


def _made_up() -> GeneratorBench:
    rows = {
        "none": [
            _row("noise", 9.0, 11.0),
            _row("psaq_v1:exact", 24.5, 22.0, top1=55.0),
            _row("real", 49.0, 51.0, top1=61.0),
        ],
        "default": [_row("noise", 50.0, 53.0), _row("psaq_v1:exact", 52.0, 55.5), _row("real", 51.0, 52.5, top1=49.0)],
    }
    every: list[Row] = []
    gaps = []
    for refine, own in rows.items():
        own = [dataclasses.replace(row, refine=refine) for row in own]
        own[-1] = dataclasses.replace(
            own[-1],
            results=tuple(
                dataclasses.replace(r, seconds=None, forward=None, backward=None, threads=None) for r in own[-1].results
            ),
        )
        gaps += (found := gaps_of(own))
        every += [row.between(found) for row in own]
    settings = {"seeds": "0,1", "count": 32}
    return GeneratorBench("made_up", 70.0, 921, "folder:val", settings, {"torch": "2"}, tuple(gaps), tuple(every))


def test_the_tables_look_as_they_should(
    snapshot: SnapshotAssertion, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "width", 80)
    print_generators(_made_up(), Path("runs/bench"))
    said = capsys.readouterr().out
    assert max(len(line) for line in said.splitlines() if "±" in line) <= 80
    assert "…" not in said
    assert said == snapshot
    assert _made_up().markdown() == snapshot


def test_the_json_holds_all_that_was_found(finished: tuple[Path, GeneratorBench]) -> None:
    folder, found = finished
    report = json.loads((folder / "generators.json").read_text())
    assert report == found.report()
    assert [Result(**result) for result in report["rows"][1]["results"]] == list(found.rows[1].results)
    assert report["rows"][1]["agreement"]["mean"] == np.mean([r["agreement"] for r in report["rows"][1]["results"]])
    assert {"torch", "timm"} <= report["versions"].keys()
    assert (report["settings"]["count"], report["settings"]["seeds"]) == (4, "0,1")


def test_the_chart_is_a_picture(finished: tuple[Path, GeneratorBench]) -> None:
    with Image.open(finished[0] / "generators.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24) or []}
    assert {(47, 111, 159), (160, 44, 44), (118, 118, 118)} <= colours


def test_the_chart_names_what_it_shows(tmp_path: Path) -> None:
    dfq.plot_generators(_made_up(), tmp_path / "chart.svg")
    drawn = (tmp_path / "chart.svg").read_text(encoding="utf-8")
    for text in ("w4a4, ranges alone", "w4a4, refine default", "noise", "psaq_v1", "31 s", "agreement with the float"):
        assert f"<!-- {text}" in drawn or text in drawn, text


def test_each_row_is_told_when_it_is_finished(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "demo", "--generators", "noise,dead_leaves", "--schemes", "w4a4", "--refine", "none"]
    command = ["bench", "generators", *flags, "--seeds", "0,1", "--count", "4", "--limit", str(_LIMIT)]
    assert cli.run([*command, "--images", _IMAGES, "--real", _REAL, "--out", str(folder)]) == 0
    said = capsys.readouterr()
    told = said.err.replace("\n", " ")
    assert all(f"w4a4, none, {name}: agrees with float on" in told for name in ("noise", "dead_leaves", "real"))
    assert "w4a4, refine none" in said.out
    assert str(folder / "generators.json").partition(".json")[0] in said.out.replace("\n", "")


def test_the_help_lists_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "--help"]) == 0
    assert " generators " in capsys.readouterr().out
    assert cli.run(["bench", "generators", "--help"]) == 0
    said = capsys.readouterr().out
    for name in (*(field.name for field in dataclasses.fields(dfq.GeneratorsRecipe)), "out", "images", "real", "limit"):
        assert f"--{name.replace('_', '-')} " in said, name


def test_a_recipe_file_serves_too(
    finished: tuple[Path, GeneratorBench], folder: Path, calls: list[str], tmp_path: Path
) -> None:
    fields = 'model = "demo"\ngenerators = "noise,dead_leaves"\nschemes = "w4a4"\nrefine = ["none"]\nseeds = "0,1"\n'
    (tmp_path / "bench.toml").write_text(f"{fields}count = 4\n")
    command = ["--recipe", str(tmp_path / "bench.toml"), "bench", "generators", "--limit", str(_LIMIT)]
    assert cli.run([*command, "--images", _IMAGES, "--real", _REAL, "--out", str(folder)]) == 0
    assert calls == []


_DEMO = ["--model", "demo", "--out", "o"]
_MISTAKES = {
    "an unknown generator": [*_DEMO, "--generators", "noise,noize"],
    "an unknown form": [*_DEMO, "--generators", "noise,psaq_v1:exakt"],
    "an unknown scheme": [*_DEMO, "--schemes", "w8a8,w3a3"],
    "a scheme that quantizes nothing": [*_DEMO, "--schemes", "float"],
    "an unknown pass": [*_DEMO, "--refine", "none", "--refine", "smoothe"],
    "a generator twice": [*_DEMO, "--generators", "noise,dfq,noise"],
    "no images": [*_DEMO, "--count", "0"],
    "a seed that is none": [*_DEMO, "--seeds", "0,one"],
    "a seed out of range": [*_DEMO, "--seeds", "0,4294967296"],
    "a seed twice": [*_DEMO, "--seeds", "1,1"],
    "a limit of nothing": [*_DEMO, "--limit", "0"],
    "real images that are not there": [*_DEMO, "--real", "folder:nothing"],
    "too few real images": [*_DEMO, "--count", "1000", "--real", f"npz:{_DIGITS}"],
    "real images that are judged by": [*_DEMO, "--real", f"npz:{_DIGITS}"],
    "a few real images that are judged by": [*_DEMO, "--count", "3", "--real", "npz:two_of_four.npz"],
    "no labelled images": ["--model", "test_vit", "--random-weights", "--out", "o"],
    "images without labels": [*_DEMO, "--images", "unlabelled.safetensors"],
    "no words at all": [],
}


@pytest.mark.parametrize("mistake", _MISTAKES)
def test_a_mistake_is_told_in_three_lines(
    mistake: str,
    snapshot: SnapshotAssertion,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    if mistake == "images without labels":
        dfq.generate(dfq.Recipe(model="demo", generator="noise", count=2), "unlabelled.safetensors")
    with np.load(_DIGITS) as digits:
        others = 255 - digits["images"][:2]
        np.savez("two_of_four.npz", images=np.concatenate([digits["images"][:2], others]))
    assert cli.run(["bench", "generators", *_MISTAKES[mistake]]) == 3
    said = capsys.readouterr().err
    message = said[said.index("error:") :]
    assert [line.partition(":")[0] for line in message.splitlines()] == ["error", "  why", "  fix"]
    assert message == snapshot
    assert not (tmp_path / "o").exists(), "told before anything is made"


def test_a_generator_that_cannot_work_on_the_model_is_told_before_results(tmp_path: Path, calls: list[str]) -> None:
    with pytest.raises(ImagesError, match="has no BatchNorm layers"):
        _run(tmp_path / "run", dataclasses.replace(_CHEAP, generators="noise,zeroq"))
    assert "result" not in calls
