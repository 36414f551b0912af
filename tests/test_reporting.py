"""A report shows what the files say, names what it lacks, trusts no name, and is a page that people can use."""

import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import dfq_deploy as dfq
from calibrators.errors import BundleError
from calibrators.files import sha256_of
from dfq_deploy import cli, pipeline
from dfq_deploy.charts.panels import Panel, Series, draw_panels
from dfq_deploy.disagreements import DISAGREEMENTS
from dfq_deploy.evaluate import Check
from dfq_deploy.gating.result import GateResult, sums_of
from dfq_deploy.recipe import Recipe
from dfq_deploy.reporting import measuring
from dfq_deploy.reporting.checked import read_audit_of, read_check
from dfq_deploy.reporting.facts import Missing
from dfq_deploy.reporting.layers import in_network_order, kinds_of, precision_map
from dfq_deploy.reporting.repeating import export_command, neutral, python_calls
from exporters.bundle import MANIFEST, open_bundle

_HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> $\\frac$ {{ 7 * 7 }}"


@pytest.fixture
def run(demo_report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it that may be changed, timed by few calls."""
    monkeypatch.setattr(measuring, "_MOST", 2)
    return Path(shutil.copytree(demo_report, tmp_path / "run"))


@dataclass
class Page(HTMLParser):
    """What matters of a page: its elements with their attributes, and its text outside of styles."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: str = ""
    _style: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.text += re.sub(r"\s+", " ", data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def sections(self) -> list[str]:
        return [str(one["id"]) for one in self.of("section")]


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def write_gate(folder: Path, facts: dict[str, Any]) -> None:
    """A gate's report whose fields a later version or a hand wrote, of this bundle."""
    path = folder / "gate.json"
    path.write_text(json.dumps(facts))
    path.with_suffix(".sha256").write_text(sums_of(sha256_of(folder / MANIFEST), path))


def change_report(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    facts = json.loads((folder / "report.json").read_text())
    change(facts)
    (folder / "report.json").write_text(json.dumps(facts))


def test_every_section_is_there_with_the_figures_of_the_files(demo_report: Path) -> None:
    page, found = read(demo_report / "report.html"), json.loads((demo_report / "report.json").read_text())
    assert page.sections() == [
        "accuracy",
        "cost",
        "layers",
        "sensitivity",
        "images",
        "disagreements",
        "provenance",
    ]
    for share in (*found["top1"].values(), *found["agreement"].values()):
        assert f"{share:.2f}" in page.text
    manifest = json.loads((demo_report / MANIFEST).read_text())
    for value in (manifest["model"]["fingerprint"], *manifest["files"].values(), *manifest["versions"].values()):
        assert value in page.text
    cells = [one["class"] for one in page.of("td") if one.get("title")]
    assert sorted(map(str, cells)) == sorted(manifest["engine"]["precision"].values())
    assert "Pass" in page.text
    assert f"{found['reason']}." in page.text


def test_the_page_loads_nothing_and_names_no_folder_of_this_machine(demo_report: Path) -> None:
    page, text = read(demo_report / "report.html"), (demo_report / "report.html").read_text()
    assert not page.of("script")
    assert not page.of("iframe")
    links = {one["href"] for one in page.of("a")} | {one["href"] for one in page.of("link")}
    assert all(str(link).startswith("#") or link == "data:," for link in links)
    assert {str(one["src"])[:16] for one in page.of("img")} == {"data:image/webp;"}
    assert set(re.findall(r"https?://[^\"' )]*", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert str(demo_report.parent) not in text
    assert {f"#{name}" for name in page.sections()} >= {link for link in links if link not in ("#main", "data:,")}


def test_every_table_and_picture_says_what_it_is(demo_report: Path) -> None:
    page = read(demo_report / "report.html")
    assert len(page.of("caption")) == len(page.of("table"))
    assert all(one.get("scope") in ("row", "col") for one in page.of("th"))
    assert all(one["alt"] for one in page.of("img"))
    assert all(one["role"] == "img" and one["aria-label"] for one in page.of("svg"))
    assert len(page.of("h1")) == 1


def test_names_are_escaped_wherever_they_come_from(run: Path) -> None:
    (run / "classes.txt").write_text("\n".join([_HOSTILE] * 10), encoding="utf-8")
    manifest = json.loads((run / MANIFEST).read_text())
    manifest["files"]["classes.txt"] = sha256_of(run / "classes.txt")
    manifest["model"]["name"] = manifest["images"]["source"] = manifest["recipe"]["model"] = _HOSTILE
    manifest["versions"] = {_HOSTILE: _HOSTILE}
    manifest["engine"]["note"] = _HOSTILE
    layers = list(manifest["engine"]["precision"])
    manifest["engine"]["precision"] = {f"{_HOSTILE}.{number}": "int8" for number, _ in enumerate(layers)}
    manifest["engine"]["reasons"] = {f"{_HOSTILE}.0": _HOSTILE}
    (run / MANIFEST).write_text(json.dumps(manifest))
    decision = {"index": 3, "percent": 50.0}
    shown = {"image": 0, "name": _HOSTILE, "label": 3, "float": decision, "reference": decision, "engine": decision}
    change_report(
        run,
        lambda facts: facts.update(
            images=_HOSTILE,
            reason=_HOSTILE,
            ran=_HOSTILE,
            disagreed=1,
            disagreements=[shown],
            asked={"images": _HOSTILE},
        ),
    )
    checks = [
        {"name": _HOSTILE, "value": _HOSTILE, "limit": [_HOSTILE], "interval": {"a": _HOSTILE}, "verdict": _HOSTILE}
    ]
    gate = {"verdict": _HOSTILE, "mode": _HOSTILE, "n": 1, "checks": checks}
    write_gate(run, gate)
    for name in ("report.html", "compare.html"):
        dfq.report(run, quick=True, compare=run if name == "compare.html" else None)
        page, text = read(run / name), (run / name).read_text()
        assert not page.of("script")
        assert {str(one["src"])[:5] for one in page.of("img")} <= {"data:"}
        assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
        assert "alert(1)" in page.text
        assert "49" not in re.findall(r"\$ (\d+)", text), "a name was taken for a template"


def test_a_bundle_alone_has_what_it_can_have_and_names_the_rest(run: Path) -> None:
    shutil.rmtree(run / "work")
    (run / "report.json").unlink()
    found = dfq.report(run)
    page = read(found.path)
    assert page.sections() == ["cost", "layers", "provenance", "left-out"]
    assert "Not checked" in page.text
    named = {one.section for one in found.missing}
    assert named == {
        "Verdict, accuracy and agreement",
        "Calibration images",
        "Audit of the calibration images",
        "Which layers hurt",
        "Time against float",
    }
    for one in found.missing:
        assert one.section in page.text
        assert one.why in page.text
    assert not (run / "work").exists(), "a bundle that is deployed was written to"


def test_float_that_was_kept_in_the_bundle_is_timed(run: Path) -> None:
    (float_model,) = (run / "work").glob("float-*.onnx")
    shutil.move(float_model, run / "float.onnx")
    shutil.rmtree(run / "work")
    assert "Time against float" not in {one.section for one in dfq.report(run).missing}
    assert "times as fast" in read(run / "report.html").text


def test_nothing_is_measured_twice_nor_when_it_must_be_quick(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_bundle: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(measuring, "sensitivity", refuse)
    monkeypatch.setattr(measuring, "audit_against_noise", refuse)
    assert not dfq.report(run, quick=True).missing
    assert not dfq.report(run).missing
    fresh = Path(shutil.copytree(demo_bundle, tmp_path / "fresh"))
    assert len(dfq.report(fresh, quick=True).missing) == 2
    with pytest.raises(AssertionError, match="measured"):
        dfq.report(fresh)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff", b'{"n": "many"}', b"[" * 100_000, b'{"n": 1e999}'],
    ids=["empty", "a list", "cut off", "no text", "another kind", "deep", "infinite"],
)
def test_files_that_do_not_read_are_named(run: Path, content: bytes) -> None:
    (run / "report.json").write_bytes(content)
    (run / "gate.json").write_bytes(content)
    (run / "audit").mkdir()
    (run / "audit" / "audit.json").write_bytes(content)
    found = {one.section: one.why for one in dfq.report(run, quick=True).missing}
    assert found.keys() == {"Verdict, accuracy and agreement", "The gate", "Audit of the calibration images"}
    assert all("cannot be read" in why for why in found.values())


def test_what_a_hand_wrote_into_the_files_does_no_harm(run: Path) -> None:
    change_report(run, lambda facts: facts["intervals_95"].update(engine_float=[float("nan"), float("inf")]))
    manifest = json.loads((run / MANIFEST).read_text())
    manifest["images"] = {"source": "", "fingerprint": ""}
    manifest["recipe"] |= {"model": ["no text"], "count": {}}
    (run / MANIFEST).write_text(json.dumps(manifest))
    named = {one.section for one in dfq.report(run, quick=True).missing}
    assert {"Verdict, accuracy and agreement", "Calibration images"} <= named
    dfq.report(run, compare=run, quick=True)


def test_a_check_of_other_files_is_doubted(run: Path) -> None:
    dfq.report(run, quick=True)
    assert "check it again" not in read(run / "report.html").text
    change_report(run, lambda facts: facts["of"].update({"model.onnx": "0" * 64}))
    dfq.report(run, quick=True)
    assert "check it again" in read(run / "report.html").text


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        ([0.5, -0.2, 1.2], "loses 0.50 points of top-1 on 360 labelled images, no more than chance explains"),
        ([2.0, 1.0, 3.0], "loses 2.00 points of top-1 on 360 labelled images, more than chance explains"),
        ([-2.0, -3.0, -1.0], "gains 2.00 points of top-1 on 360 labelled images, which chance does not explain"),
        (None, "the 360 images have no labels"),
    ],
)
def test_the_verdict_says_what_it_means_for_accuracy(run: Path, drop: list[float] | None, said: str) -> None:
    change_report(run, lambda facts: facts.update(drop=drop, top1=facts["top1"] if drop else None))
    dfq.report(run, quick=True)
    assert said in read(run / "report.html").text


def test_the_gate_and_an_audit_that_ran_are_shown(run: Path) -> None:
    gate = {
        "verdict": "undecided",
        "mode": "labels",
        "n": 921,
        "checks": [{"name": "drop", "value": 0.25, "limit": 1.0, "interval": [-0.5, 1.25], "verdict": "undecided"}],
        "smallest_detectable_drop_pt": 1.75,
        "new in a later version": [],
    }
    write_gate(run, gate)
    (cached,) = (run / "work").glob("audit-*.json")
    audit = {**json.loads(cached.read_text()), "level": "good", "verdict": "by real images: all is well."}
    (run / "audit").mkdir()
    (run / "audit" / "audit.json").write_text(json.dumps(audit))
    dfq.report(run, quick=True)
    page = read(run / "report.html")
    assert "gate" in page.sections()
    assert " ".join(page.text.split()).count("undecided by drop") == 1, "beside the verdict"
    for figure in ("0.25", "-0.5 \N{EN DASH} 1.25", "1.75 points", "undecided", "By real images: all is well."):
        assert figure in page.text
    for other in ({"of": {**audit["of"], "images": "0b" * 32}}, {"scheme": "w4a4"}, {"of": {}}):
        (run / "audit" / "audit.json").write_text(json.dumps(audit | other))
        (why,) = [one.why for one in dfq.report(run, quick=True).missing if "Audit" in one.section]
        assert why.startswith("The audit is not of this bundle.")


def test_an_audit_of_other_formats_is_of_a_bundle_whose_own_have_no_ranges(run: Path) -> None:
    (cached,) = (run / "work").glob("audit-*.json")
    (run / "audit").mkdir()
    shutil.copyfile(cached, run / "audit" / "audit.json")
    manifest = open_bundle(run)
    for scheme in ("w8a8_dynamic", "w4a16", "float"):
        assert read_audit_of(run, manifest.model_copy(update={"scheme": scheme})).scheme == "w8a8"
    with pytest.raises(BundleError, match="is not of this bundle"):
        read_audit_of(run, manifest.model_copy(update={"scheme": "w8a8_asym"}))


def test_images_that_came_from_a_file_are_shown(run: Path, tmp_path: Path) -> None:
    (images,) = (run / "work").glob("images-*.safetensors")
    images.rename(tmp_path / "images.safetensors")
    facts = json.loads((run / MANIFEST).read_text())
    facts["recipe"]["calib"] = str(tmp_path / "images.safetensors")
    (run / MANIFEST).write_text(json.dumps(facts))
    assert "Calibration images" not in {one.section for one in dfq.report(run, quick=True).missing}
    (tmp_path / "images.safetensors").unlink()
    (why,) = [one.why for one in dfq.report(run, quick=True).missing if one.section == "Calibration images"]
    assert why.endswith("They lay in `images.safetensors`, which is not deployed.")


def test_a_gate_that_may_have_judged_another_bundle_is_left_out(run: Path) -> None:
    def left_out() -> list[Missing]:
        return [one for one in dfq.report(run, quick=True).missing if one.section == "The gate"]

    path = run / "gate.json"
    found = GateResult("run", "pass", "synthetic", 0, "", (), {}, None, sha256_of(run / MANIFEST))
    found.save(path)
    assert not left_out() and "gate" in read(run / "report.html").sections()
    dataclasses.replace(found, manifest_sha256="0b" * 32).save(path)
    (why,) = left_out()
    assert why.why.startswith("The gate may have judged another bundle.")
    assert why.fix.startswith("Run `dfq-deploy gate ")
    assert "gate" not in read(run / "report.html").sections()
    found.save(path)
    path.write_text(path.read_text().replace("pass", "fail"))
    assert left_out()
    found.save(path)
    path.with_suffix(".sha256").unlink()
    assert left_out()


def test_the_command_repeats_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Recipe(
        model="demo",
        checkpoint=Path("a folder") / "weights.safetensors",
        generator="noise",
        calib="folder:" + str(Path("some", "where", "my images")),
        refine="none",
        attention=True,
        percentile=99.9,
        optimization_level=None,
    )
    command = shlex.split(export_command(asked.facts(), "run 1"))
    given: list[tuple[Recipe, Path]] = []

    def keep(recipe: Recipe, out: Path, **_: object) -> Check:
        given.append((recipe, out))
        raise BundleError(what="stopped", why="it is enough", fix="none")

    monkeypatch.setattr(pipeline, "export", keep)
    assert cli.run(command[1:]) == 3
    ((recipe, out),) = given
    assert out == Path("run 1")
    here = Path.cwd()
    neutral_facts = {"checkpoint": str(here / "weights.safetensors"), "calib": f"folder:{here / 'my images'}"}
    assert recipe.facts() == {**asked.facts(), **neutral_facts}
    assert neutral(str(Path("a", "b.st")) + "," + str(Path("c.st"))) == "b.st,c.st"
    shown = read(run / "report.html").text
    assert "dfq-deploy export --model demo --generator noise --count 8 --refine none --out run" in shown
    assert "dfq-deploy check run" in shown


def test_the_calls_repeat_a_run_that_only_python_has(run: Path) -> None:
    manifest = open_bundle(run)
    manifest = manifest.model_copy(update={"recipe": manifest.recipe | {"calib": "folder:/some/where/images"}})
    change_report(run, lambda facts: facts.update(asked={"images": "npz:/some/where/digits.npz", "limit": 4}))
    export, check = python_calls(manifest, read_check(run), "run")
    assert "calib='folder:images'" in export
    assert check.endswith(", images='npz:digits.npz', limit=4)")


def test_two_runs_stand_side_by_side(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    manifest = json.loads((other / MANIFEST).read_text())
    manifest["engine"]["precision"]["blocks.2.mlp.fc1"] = "fp32"
    manifest["recipe"]["observer"] = "mse"
    (other / MANIFEST).write_text(json.dumps(manifest))

    def worsen(facts: dict[str, Any]) -> None:
        facts.update(verdict="fail", reason="made up")
        facts["agreement"]["engine_float"], facts["intervals_95"]["engine_float"] = 50.0, [45.0, 55.0]

    change_report(other, worsen)
    found = dfq.report(run, compare=other, quick=True)
    assert found.path == run / "compare.html"
    page = read(found.path)
    assert [str(one["class"]) for one in page.of("div") if "verdict" in str(one.get("class"))] == [
        "verdict pass",
        "verdict fail",
    ]
    differing = [str(one["title"]) for one in page.of("td") if "differs" in str(one.get("class"))]
    assert sorted(differing) == ["blocks.2.mlp.fc1: fp32", "blocks.2.mlp.fc1: int8"]
    assert "1 of 26 layers" in page.text
    assert page.text.count("(differs)") == 1
    assert "observer" in page.text
    assert "A: run" in page.text
    assert "B: other" in page.text
    assert "Mind" not in page.text
    change_report(other, lambda facts: facts["of"].update(images="0" * 64))
    dfq.report(run, compare=other, quick=True)
    assert "checked on different images" in read(run / "compare.html").text


def test_the_command_tells_what_it_wrote_and_left_out(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    assert cli.run(["report", "run", "--quick", "--out", "page.html"]) == 0
    assert capsys.readouterr().out == "report: page.html\n"
    (run / "report.json").unlink()
    assert cli.run(["report", "run", "--quick"]) == 0
    assert "left out, Verdict, accuracy and agreement: There is no report.json." in capsys.readouterr().out


# What a check recorded


def test_pictures_of_another_check_are_not_shown(run: Path) -> None:
    decision = {"index": 0, "percent": 50.0}
    shown = {"image": 0, "name": "", "label": None, "float": decision, "reference": decision, "engine": decision}

    def add(facts: dict[str, Any]) -> None:
        facts.update(disagreed=1, disagreements=[shown])
        facts["of"]["disagreements.png"] = "0" * 64

    change_report(run, add)
    Image.new("RGB", (32, 32)).save(run / DISAGREEMENTS)
    (missing,) = dfq.report(run, quick=True).missing
    assert (missing.section, "another check" in missing.why) == ("Pictures of the disagreements", True)
    change_report(run, lambda facts: facts["of"].update({"disagreements.png": sha256_of(run / DISAGREEMENTS)}))
    assert not dfq.report(run, quick=True).missing
    assert len([one for one in read(run / "report.html").of("img") if "Image 0" in str(one["alt"])]) == 1


# Layers


def test_layers_are_grouped_by_kind_in_the_order_of_the_network() -> None:
    names = [
        "patch.proj",
        *(f"layers.{a}.blocks.{b}.attn.qkv" for a in (0, 1) for b in (10, 2)),
        "norm2d.0.fc",
        "x.0.fc",
    ]
    kinds = {kind.name: kind for kind in kinds_of(names)}
    assert kinds["layers.*.blocks.*.attn.qkv"].members == tuple(
        f"layers.{a}.blocks.{b}.attn.qkv" for a in (0, 1) for b in (2, 10)
    )
    assert kinds["layers.*.blocks.*.attn.qkv"].short == "attn.qkv"
    assert {kinds["norm2d.*.fc"].short, kinds["x.*.fc"].short} == {"norm2d.*.fc", "x.*.fc"}, "two rows of one name"
    rows = precision_map({"a.0.b": "int8", "a.1.b": "fp32"}, {"a.1.b": "why"}, {"a.0.b": "int8", "a.1.b": "int4"})
    assert [(cell.text, cell.reason, cell.differs) for cell in rows[0][1]] == [("8", "", False), ("32", "why", True)]


def test_layers_of_two_bundles_are_in_one_order() -> None:
    model = ["patch", *(f"blocks.{n}.{kind}" for n in (0, 1) for kind in ("qkv", "proj", "fc1", "fc2")), "head"]
    spared = ("blocks.0.qkv", "blocks.1.fc1")
    int8 = {layer: "int8" for layer in model if layer not in spared} | dict.fromkeys(spared, "fp32")
    int4 = {layer: "int4" for layer in model if layer != "patch"} | {"patch": "fp16"}
    assert in_network_order(int8, int4) == in_network_order(int4, int8) == model
    assert sorted(in_network_order({}, int8)) == sorted(model), "each once, whatever can be told of the order"


def test_a_chart_takes_the_pages_colours_and_any_name() -> None:
    names = (f"{_HOSTILE}.0", f"{_HOSTILE}.1")
    drawn = [Series(_HOSTILE, "engine", {names[0]: 1.0, names[1]: float("nan")}), Series("none", "bad", {}, "o")]
    svg = draw_panels([Panel(_HOSTILE, names)], drawn, key="a", axis=_HOSTILE, says=_HOSTILE, line=(_HOSTILE, 2.0))
    page = Page()
    page.feed(svg)
    assert not page.of("script")
    assert not page.of("img")
    assert "alert(1)" in page.text
    assert "var(--engine)" in svg
    assert not re.findall(r"#0102\w\w", svg)
    assert svg == draw_panels(
        [Panel(_HOSTILE, names)], drawn, key="a", axis=_HOSTILE, says=_HOSTILE, line=(_HOSTILE, 2.0)
    )
