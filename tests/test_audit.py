"""The audit of calibration images: what is too narrow is found, the same is told as such, pictures are drawn."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from syrupy.assertion import SnapshotAssertion

import dfq_deploy as dfq
from calibrators.affine import CODES, choose_qparams
from calibrators.cut_off import CutOff, reach
from calibrators.errors import ImagesError
from calibrators.images import ImageSet, joined
from calibrators.observers import MinMax, Percentile
from calibrators.plan import QParams, QuantPlan
from calibrators.sites import sites_of
from calibrators.student import Student
from dfq_deploy import audited, coverage
from dfq_deploy.audited import Audit, judged
from dfq_deploy.coverage import Held, SiteCoverage
from dfq_deploy.generation import GenerateOptions
from dfq_deploy.generation.engine import Stage
from dfq_deploy.generation.generators import spdfq
from dfq_deploy.generation.generators.spdfq import Spdfq
from dfq_deploy.generation.making import made_with_next_seed, make_images, parts_of, why_no_next_seed
from dfq_deploy.generation.seen import attention_maps, similarity_histograms
from dfq_deploy.models import Model
from dfq_deploy.models.loading import load_model
from dfq_deploy.recipe import AuditRecipe, CalibrateRecipe, GenerateRecipe
from dfq_deploy.showing.console import console
from dfq_deploy.showing.sets import print_audit

_PICTURES = ("ranges.png", "patch_similarity.png", "attention.png")


@pytest.fixture(scope="module")
def leaves(demo: Model) -> ImageSet:
    return make_images(["dead_leaves"], demo, GenerateOptions(12))


def _formats(scheme: str) -> CalibrateRecipe:
    return CalibrateRecipe(model="demo", scheme=scheme, spare="massive")


def _with_pixels(images: ImageSet, pixels: np.ndarray) -> ImageSet:
    return ImageSet.of(pixels.astype(np.float32), images.preprocess, source=images.source, made_by=dict(images.made_by))


@pytest.fixture(scope="module")
def found(demo: Model, leaves: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Audit, Path]:
    """Leaves held against noise, another seed and the demo's own digits."""
    folder = tmp_path_factory.mktemp("audit")
    leaves.save(folder / "leaves.safetensors")
    recipe = AuditRecipe(model="demo", real=f"npz:{demo.labelled}", limit=24)
    return dfq.audit(folder / "leaves.safetensors", recipe, folder / "out"), folder / "out"


def test_an_audit_holds_ranges_against_all_three(found: tuple[Audit, Path]) -> None:
    audit, out = found
    assert list(audit.others) == ["noise", "seed", "real"]
    assert audit.others["real"] == "24 of npz:held_back.npz"
    assert audit.held_against == "real"
    assert audit.verdict.startswith("by real images: ranges hold 99.9 % of real images' values at every site")
    report = json.loads((out / "audit.json").read_text())
    assert report["verdict"] == audit.verdict
    assert [site["site"] for site in report["sites"]] == [site.site for site in audit.sites]
    assert set(report["sites"][0]["others"]) == {"noise", "seed", "real"}


def test_the_pictures_are_pictures(found: tuple[Audit, Path]) -> None:
    audit, out = found
    assert audit.pictures == _PICTURES
    for name in _PICTURES:
        with Image.open(out / name) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert min(picture.size) > 500 and max(picture.size) < 4000
            assert len(picture.convert("RGB").getcolors(2**24) or []) > 20


def test_the_images_of_the_other_seed_are_kept(found: tuple[Audit, Path], leaves: ImageSet) -> None:
    (kept,) = (found[1] / "work").glob("seed-*.safetensors")
    other = ImageSet.load(kept)
    assert other.made_by["seed"] == leaves.made_by["seed"] + 1
    assert len(other) == len(leaves)
    assert other.fingerprint != leaves.fingerprint


def test_a_range_that_is_too_narrow_is_found_and_named(demo: Model, leaves: ImageSet, tmp_path: Path) -> None:
    pale = _with_pixels(leaves, leaves.pixels[:] * 0.1)
    pale.save(tmp_path / "pale.safetensors")
    leaves.save(tmp_path / "leaves.safetensors")
    recipe = AuditRecipe(model="demo", real=str(tmp_path / "leaves.safetensors"))
    audit = dfq.audit(tmp_path / "pale.safetensors", recipe, tmp_path / "out")
    worst = audit.worst("real")
    assert audit.level == "bad"
    assert worst.others["real"].drift < -0.5
    assert f"every site but {worst.site} (" in audit.verdict
    assert audit.level == judged(audit.sites)[1]


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_fp8", "w8a8_asym"])
def test_the_same_images_twice_differ_in_nothing(demo: Model, leaves: ImageSet, scheme: str) -> None:
    sites = coverage.coverage(demo, _formats(scheme), leaves, {"noise": leaves, "real": leaves})
    assert len(sites) > 10
    for site in sites:
        assert site.others["real"] == replace(site.own, drift=0.0)
        assert (site.own.excess_ppm, site.own.noise_excess_ppm) == (0.0, 0.0)


def test_streaming_equals_all_at_once() -> None:
    values = torch.from_numpy(np.random.default_rng(0).laplace(size=(60, 40)).astype(np.float32))
    ends = {"narrow": (-1.0, 2.0), "wide": (-100.0, 100.0)}
    whole, parts, rest = (CutOff(Percentile(99), ends) for _ in range(3))
    whole.update(values)
    for part in values[:30].split(7):
        parts.update(part)
    rest.update(values[30:])
    parts.merge(rest)
    assert parts.shares() == whole.shares()
    assert whole.shares()["wide"] == 0
    assert whole.shares()["narrow"] == float(((values < -1) | (values > 2)).double().mean())
    np.testing.assert_array_equal(parts.range(), whole.range())


@pytest.mark.parametrize("codes", ["int8", "uint8", "uint4", "float8_e4m3fn"])
def test_a_value_is_cut_off_where_rounding_would_not_have_moved_it_as_far(codes: str) -> None:
    low, high = np.float32(-1.7), np.float32(3.3)
    qparams = QParams(*choose_qparams(low, high, CODES[codes]), CODES[codes], None)
    watch = MinMax()
    watch.update(torch.tensor([-1.7, 3.3]))
    lowest, highest = reach(qparams)
    assert lowest <= low and high <= highest
    step = (highest - lowest) / (16 if codes == "uint4" else 20)
    assert highest - high <= step


def test_the_audit_does_not_depend_on_batches(demo: Model, leaves: ImageSet) -> None:
    twice = _with_pixels(leaves, np.concatenate([leaves.pixels[:], leaves.pixels[:]]))
    sets = {"noise": leaves, "real": twice}
    for site in coverage.coverage(demo, _formats("w8a8_asym"), leaves, sets):
        assert site.others["real"].cut_off_ppm == pytest.approx(site.own.cut_off_ppm, abs=1e-3)


def _site(name: str, **others: tuple[float, float, float]) -> SiteCoverage:
    held = {key: Held(-1, 1, drift, ppm, ppm, by_noise) for key, (drift, ppm, by_noise) in others.items()}
    return SiteCoverage(name, Held(-1, 1, 0, 0, 0, 0), held)


_FINE = {"noise": (0.5, 0.0, 0.0), "seed": (0.05, 20.0, 9e3)}
_CASES = {
    "good": [_site("a", **_FINE, real=(0.1, 90, 5e3)), _site("b", **_FINE, real=(-0.2, 10, 0))],
    "one site too narrow": [_site("a", **_FINE, real=(-1, 2.1e4, 5e3)), _site("b", **_FINE, real=(0, 10, 0))],
    "some sites a little narrow": [_site(n, **_FINE, real=(-0.4, 2e3, 5e3)) for n in "abc"],
    "too wide": [_site(n, **_FINE, real=(1.0, 0, 0)) for n in "ab"],
    "far too wide": [_site(n, **_FINE, real=(2.0, 0, 0)) for n in "ab"],
    "no real images": [_site(n, **_FINE) for n in "ab"],
    "no better than noise": [_site(n, noise=(0, 0, 0), seed=(0.05, 20, 30)) for n in "ab"],
    "noise alone": [_site(n, noise=(0.5, 0, 0)) for n in "ab"],
    "noise alone, and too narrow": [_site(n, noise=(-3.0, 5e4, 0)) for n in "ab"],
}


@pytest.mark.parametrize("case", _CASES)
def test_the_verdict_is_one_sentence(case: str, snapshot: SnapshotAssertion) -> None:
    assert " | ".join(judged(_CASES[case])) == snapshot


def test_the_limits_are_where_levels_change() -> None:
    doubtful, bad = audited.LIMITS_PPM
    cases = {doubtful: "good", doubtful + 1: "doubtful", bad: "doubtful", bad + 1: "bad"}
    for ppm, level in cases.items():
        assert judged([_site("a", **_FINE, real=(0.1, ppm, 5e3))])[1] == level, ppm


def test_the_table_looks_as_it_should(
    snapshot: SnapshotAssertion, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "width", 80)
    against, level, verdict = judged(_CASES["no real images"])
    audit = Audit(
        model="demo",
        scheme="w8a8",
        backend="ort",
        observer="minmax",
        n=16,
        images="synthetic:dfq",
        of={"images": "0b" * 32, "model": "0b" * 32},
        others={"noise": "16 of synthetic:noise", "seed": "16 of synthetic:dfq"},
        absent={"real": "none were given (--real)"},
        sites=tuple(_CASES["no real images"]),
        held_against=against,
        level=level,
        verdict=verdict,
        pictures=("ranges.png",),
        left_out=("no attention.png: why.",),
    )
    print_audit(audit, Path("out"))
    assert capsys.readouterr().out == snapshot


# What there is no other seed of, and no attention.


def test_images_of_no_generator_have_no_other_seed(demo: Model, leaves: ImageSet, tmp_path: Path) -> None:
    ImageSet.of(leaves.pixels[:], demo.preprocess, source="test").save(tmp_path / "images.safetensors")
    audit = dfq.audit(tmp_path / "images.safetensors", AuditRecipe(model="demo"), tmp_path / "out")
    assert audit.absent["seed"] == "no generator made these images"
    assert (audit.held_against, audit.level) == ("noise", "doubtful")


def test_a_model_without_attention_is_audited(tmp_path: Path) -> None:
    command = {"model": "test_resnet", "random_weights": True}
    dfq.generate(GenerateRecipe(generator="dead_leaves", count=3, **command), tmp_path / "images.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "attention.png").write_text("of an earlier audit")
    audit = dfq.audit(tmp_path / "images.safetensors", AuditRecipe(**command), tmp_path / "out")
    assert audit.pictures == ("ranges.png",)
    (note,) = audit.left_out
    assert note.startswith("no patch_similarity.png and no attention.png: `test_resnet")
    assert not (tmp_path / "out" / "attention.png").exists()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda pixels: np.full_like(pixels, 0.3), "image 0 is of one colour"),
        (lambda pixels: pixels[[0] * 12], "all 12 images show the same"),
        (lambda pixels: pixels[[0, 0, 0, 1, 1, 1, 1, 2, 3, 4, 5, 6]], "7 of 12 images show what another one shows"),
        (lambda pixels: pixels[[0] * 8 + [1, 2, 3, 4]] + 1e-3 * np.arange(12).reshape(-1, 1, 1, 1), "8 of 12 images"),
    ],
)
def test_a_degenerate_set_is_refused(demo: Model, leaves: ImageSet, tmp_path: Path, fault, said: str) -> None:
    _with_pixels(leaves, fault(leaves.pixels[:])).save(tmp_path / "images.safetensors")
    with pytest.raises(ImagesError, match=said):
        dfq.audit(tmp_path / "images.safetensors", AuditRecipe(model="demo"), tmp_path / "out")
    assert not (tmp_path / "out" / "audit.json").exists()


# Students, bundles, and where real images come from.


def _taught(images: ImageSet, demo: Model, model: str, scheme: str) -> ImageSet:
    """`images` with a student whose layers all give more than the model's."""
    weights = {name: 1.2 * w.numpy() for name, w in demo.module.state_dict().items() if name.endswith(".weight")}
    student = Student(weights, model, scheme)
    return ImageSet.of(
        images.pixels, images.preprocess, source=images.source, made_by=dict(images.made_by), student=student
    )


def test_a_student_is_audited_in_its_own_formats(demo: Model, leaves: ImageSet, tmp_path: Path) -> None:
    _taught(leaves, demo, demo.fingerprint, "w8a8_asym").save(tmp_path / "images.safetensors")
    leaves.save(tmp_path / "plain.safetensors")
    taught = dfq.audit(tmp_path / "images.safetensors", AuditRecipe(model="demo"), tmp_path / "out")
    plain = dfq.audit(tmp_path / "plain.safetensors", AuditRecipe(model="demo", scheme="w8a8_asym"), tmp_path / "out")
    assert (taught.scheme, taught.absent["seed"]) == ("w8a8_asym", "another seed would teach another student")
    wider = [one.own.high > other.own.high for one, other in zip(taught.sites, plain.sites, strict=True)]
    assert sum(wider) > len(wider) / 2, "the ranges are the model's own"


@pytest.mark.parametrize(("own", "said"), [(True, "learned for w4a4"), (False, "learned for another model")])
def test_a_student_for_something_else_is_refused(
    demo: Model, leaves: ImageSet, tmp_path: Path, own: bool, said: str
) -> None:
    model = demo.fingerprint if own else "f" * 64
    _taught(leaves, demo, model, "w4a4" if own else "w8a8").save(tmp_path / "images.safetensors")
    with pytest.raises(ImagesError, match=said):
        dfq.audit(tmp_path / "images.safetensors", AuditRecipe(model="demo", scheme="w8a8"), tmp_path / "out")


def test_a_bundle_is_audited_as_it_was_calibrated(tmp_path: Path) -> None:
    settings = {"observer": "percentile", "percentile": 99.0, "attention": True, "spare": "massive", "refine": "none"}
    dfq.export(dfq.Recipe(model="demo", generator="dead_leaves", count=8, **settings), tmp_path / "bundle")
    audit = dfq.audit(tmp_path / "bundle", AuditRecipe(), tmp_path / "out")
    plan = QuantPlan.load(tmp_path / "bundle" / "plan.safetensors")
    free = {name for name, site in sites_of(load_model("demo").module).items() if site.fixed is None}
    assert {site.site for site in audit.sites} == {s for s in plan.sites if s in free and not s.endswith(".weight")}
    assert (audit.scheme, audit.backend, audit.observer) == ("w8a8", "ort", "percentile 99.0")
    assert max(site.own.cut_off_ppm for site in audit.sites) > 5_000, "minmax cuts nothing off"
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["observer"] == "percentile 99.0"


def test_another_scheme_for_a_bundle_keeps_the_rest(demo_bundle: Path, tmp_path: Path) -> None:
    audit = dfq.audit(demo_bundle, AuditRecipe(scheme="w8a8_fp8"), tmp_path)
    assert (audit.scheme, audit.backend) == ("w8a8_fp8", "ort")


def test_real_images_keep_their_whole_name(demo: Model, leaves: ImageSet, tmp_path: Path) -> None:
    leaves.save(tmp_path / "images.safetensors")
    folder = tmp_path / "photos of cats"
    folder.mkdir()
    for number in range(5):
        Image.effect_noise((32, 32), 20 + 40 * number).save(folder / f"{number}.png")
    for limit in (3, 128):
        recipe = AuditRecipe(model="demo", real=f"folder:{folder}", limit=limit)
        audit = dfq.audit(tmp_path / "images.safetensors", recipe, tmp_path / "out")
        assert audit.others["real"] == f"{min(limit, 5)} of folder:photos of cats"


# What the pictures show.


_SETS = {
    "one of two generators": lambda demo: make_images(["noise", "spdfq"], demo, GenerateOptions(9, 5)),
    "a later part of a set": lambda demo: Spdfq().generate(demo, GenerateOptions(5, 5, first=6)),
    "with parts left out": lambda demo: Spdfq(True, False, False).generate(demo, GenerateOptions(5, 5, first=3)),
    "joined": lambda demo: joined(
        [
            make_images(["noise", "dead_leaves"], demo, GenerateOptions(3, 4)),
            Spdfq(soft_labels=False).generate(demo, GenerateOptions(5, 5, first=3)),
        ]
    ),
}


@pytest.mark.parametrize("made", _SETS)
def test_priors_drawn_again_are_those_that_were_used(demo: Model, monkeypatch: pytest.MonkeyPatch, made: str) -> None:
    monkeypatch.setattr(spdfq, "_FAST_STAGES", (Stage(1, 0),))
    used: list[dict[str, torch.Tensor]] = []

    def noted(rows: object, priors: list[spdfq._Prior], view: object) -> torch.Tensor:
        used.append({prior.tap.name: prior.rows for prior in priors})
        return torch.zeros(())

    monkeypatch.setattr(spdfq, "_alignment", noted)
    monkeypatch.setattr("dfq_deploy.generation.batching.BATCH", 3)
    images = _SETS[made](demo)
    start = len(images) - 5
    maps = attention_maps(demo, images)
    assert maps.priors is not None
    np.testing.assert_array_equal(maps.images, images.pixels[start : start + 4])
    wanted = torch.cat([priors[maps.layer][:size, 0] for priors, size in zip(used, (3, 2), strict=True)])[:4]
    np.testing.assert_array_equal(maps.priors.reshape(wanted.shape), wanted)


def test_the_next_seed_of_a_part_with_parts_left_out_is_set_alike(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spdfq, "_FAST_STAGES", (Stage(1, 0),))
    monkeypatch.setattr("dfq_deploy.generation.batching.BATCH", 2)
    bare = Spdfq(alignment=False, reinforcement=False, soft_labels=False)
    images = bare.generate(demo, GenerateOptions(3, 7, first=4))
    other = made_with_next_seed(images, demo)
    assert other.fingerprint == bare.generate(demo, GenerateOptions(3, 8, first=4)).fingerprint
    settings = ("first", "alignment", "reinforcement", "soft_labels")
    assert [other.made_by[name] for name in settings] == [4, False, False, False]


def test_joined_files_have_another_seed_that_shares_no_image_with_them(demo: Model) -> None:
    parts = [make_images(["noise"], demo, GenerateOptions(3, seed)) for seed in (5, 6)]
    images = joined([*parts, make_images(["noise", "dead_leaves"], demo, GenerateOptions(4, 5))])
    assert why_no_next_seed(images, demo) is None
    made = [(part["generator"], part["count"], part["seed"]) for part in parts_of(made_with_next_seed(images, demo))]
    assert made == [("noise", 3, 7), ("noise", 3, 8), ("noise", 2, 7), ("dead_leaves", 2, 7)]


def test_files_that_are_not_all_from_generators_have_no_other_seed(demo: Model, leaves: ImageSet) -> None:
    foreign = ImageSet.of(leaves.pixels[:] * np.float32(0.9), demo.preprocess, source="test")
    assert "not all from generators" in (why_no_next_seed(joined([leaves, foreign]), demo) or "")
    assert attention_maps(demo, joined([foreign, leaves])).priors is None


@pytest.mark.parametrize(
    "facts",
    [{"generator": "sd-turbo"}, {"generator": "spdfq"}, {"parts": 3}, {"parts": {"one": 1}}],
    ids=str,
)
def test_facts_that_others_wrote_are_of_no_generator(demo: Model, leaves: ImageSet, facts: dict[str, object]) -> None:
    theirs = ImageSet.of(leaves.pixels[:], demo.preprocess, source="test", made_by=facts)
    assert parts_of(theirs) == ()
    assert why_no_next_seed(theirs, demo) == "no generator made these images"
    assert attention_maps(demo, theirs).priors is None
    counted = {**leaves.made_by, "count": "many"}
    assert parts_of(ImageSet.of(leaves.pixels[:], demo.preprocess, source="test", made_by=counted)) == ()


def test_attention_without_priors_is_that_of_the_first_images(demo: Model, leaves: ImageSet) -> None:
    maps = attention_maps(demo, leaves)
    assert maps.priors is None
    np.testing.assert_array_equal(maps.images, leaves.pixels[:4])
    shares = maps.rows.sum((2, 3))
    assert (shares > 0).all() and (shares <= 1 + 1e-5).all()


def test_similarities_of_all_pairs_are_counted(demo: Model, leaves: ImageSet) -> None:
    counts = similarity_histograms(demo, {"images": leaves})
    assert len(counts) == 3
    for sets in counts.values():
        patches = 8 * 8
        assert sets["images"].sum() == len(leaves) * patches * (patches - 1) // 2


def test_the_report_is_json_where_a_width_is_zero() -> None:
    site = dataclasses.replace(_CASES["good"][0], own=Held(0, 0, float("inf"), 0, 0, 0))
    audit = Audit("m", "w8a8", "ort", "minmax", 1, "i", {}, {}, {}, (site,), "real", "good", "v")
    assert audit.report()["sites"][0]["own"]["drift"] is None
    json.dumps(audit.report(), allow_nan=False)
