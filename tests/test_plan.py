"""The plan: the same bytes each time, every scale under its fingerprint, and no broken file taken for one."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from calibrators.errors import DeployError, PlanError
from calibrators.plan import QuantPlan, layer_of, make_plan
from calibrators.ranges import Ranges, SiteRange
from calibrators.scheme import SCHEMES, QuantScheme, scheme_named

GOLDEN = "685af634c1253eeb989971832a0c6ff423d62fee027e15b5e1f65c3524e61133"  # sha256 of format 1


def _range(role: str, low: Any, high: Any, axis: int | None = None) -> SiteRange:
    return SiteRange(np.float32(low), np.float32(high), role, axis, (2, 3))


def small_ranges() -> Ranges:
    sites = {
        "stem.input": _range("input", -2, 1),
        "stem.weight": _range("weight", [-1, -0.5], [0.25, 1], axis=0),
        "stem.output": _range("output", 0, 6),
        "attn.qk.lhs": _range("operand", -4, 4),
        "attn.av.lhs": _range("operand", 0, 1),
        "head.input": _range("input", -3, 3),
        "head.weight": _range("weight", [-1, 0], [1, 0], axis=0),
    }
    return Ranges(sites, model="m" * 64, images="i" * 64, observer="percentile 99.999")


def small_plan() -> QuantPlan:
    return make_plan(small_ranges(), SCHEMES["w8a8_asym"], spare={"head": "asked for"})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small_plan().save(tmp_path / "plan.safetensors")
    return tmp_path / "plan.safetensors"


def test_the_bytes_of_a_plan_are_golden(saved: Path) -> None:
    assert hashlib.sha256(saved.read_bytes()).hexdigest() == GOLDEN


@pytest.mark.parametrize("seed", ["0", "1"])
def test_another_process_writes_the_same_bytes(saved: Path, seed: str) -> None:
    other = saved.with_name("other.safetensors")
    code = "import pathlib, sys, test_plan; test_plan.small_plan().save(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    subprocess.run([sys.executable, "-c", code, other], cwd=Path(__file__).parent, env=environment, check=True)
    assert other.read_bytes() == saved.read_bytes()


def test_a_plan_comes_back_as_it_was_saved(saved: Path) -> None:
    plan, loaded = small_plan(), QuantPlan.load(saved)
    assert loaded.fingerprint == plan.fingerprint
    assert (list(loaded.sites), loaded.layers, loaded.spared) == (list(plan.sites), plan.layers, plan.spared)
    for name, site in plan.sites.items():
        np.testing.assert_array_equal(loaded.sites[name].scale, site.scale, strict=True)
        np.testing.assert_array_equal(loaded.sites[name].zero_point, site.zero_point, strict=True)
        assert (loaded.sites[name].codes, loaded.sites[name].axis) == (site.codes, site.axis)


def test_a_dynamic_plan_leaves_convolutions_in_float_and_comes_back(tmp_path: Path) -> None:
    sites = dict(small_ranges().sites)
    sites["stem.weight"] = replace(sites["stem.weight"], shape=(2, 3, 4, 4))
    plan = make_plan(replace(small_ranges(), sites=sites), SCHEMES["w8a8_dynamic"])
    assert {name: q.dynamic for name, q in plan.sites.items()} == {"head.input": True, "head.weight": False}
    assert "no such convolution" in plan.spared["stem.input"]
    plan.save(tmp_path / "plan.safetensors")
    loaded = QuantPlan.load(tmp_path / "plan.safetensors")
    assert loaded.fingerprint == plan.fingerprint
    assert loaded.sites["head.input"].dynamic
    static = replace(plan, sites={k: replace(q, dynamic=False) for k, q in plan.sites.items()})
    assert static.fingerprint != plan.fingerprint


def test_ranges_come_back_as_they_were_saved(tmp_path: Path) -> None:
    ranges = small_ranges()
    ranges.save(tmp_path / "ranges.safetensors")
    loaded = Ranges.load(tmp_path / "ranges.safetensors")
    assert (loaded.model, loaded.images, loaded.observer) == (ranges.model, ranges.images, ranges.observer)
    assert list(loaded.sites) == list(ranges.sites)
    for name, seen in ranges.sites.items():
        again = loaded.sites[name]
        np.testing.assert_array_equal(again.low, seen.low, strict=True)
        np.testing.assert_array_equal(again.high, seen.high, strict=True)
        assert (again.role, again.axis, again.shape) == (seen.role, seen.axis, seen.shape)


@pytest.mark.parametrize("name", small_plan().sites)
def test_the_fingerprint_changes_with_any_scale(name: str) -> None:
    plan = small_plan()
    before, site = plan.fingerprint, plan.sites[name]
    scale = site.scale.copy()
    scale.flat[-1] = np.nextafter(scale.flat[-1], np.float32(9))
    changed = dataclasses.replace(plan, sites={**plan.sites, name: dataclasses.replace(site, scale=scale)})
    assert changed.fingerprint != before


@pytest.mark.parametrize(
    "change", [{"spared": {"head.input": "why not"}}, {"scheme": "w8a8"}, {"model": "n"}, {"images": "j"}]
)
def test_the_fingerprint_changes_with_anything_else_that_is_said(change: dict[str, Any]) -> None:
    assert dataclasses.replace(small_plan(), **change).fingerprint != small_plan().fingerprint


def test_roles_decide_the_format() -> None:
    plan = small_plan()
    assert {name: site.codes.name for name, site in plan.sites.items()} == {
        "stem.input": "uint8",
        "stem.weight": "int8",
        "stem.output": "uint8",
    }
    weight = plan.sites["stem.weight"]
    assert (weight.axis, weight.scale.shape, weight.zero_point.tolist()) == (0, (2,), [0, 0])
    np.testing.assert_array_equal(weight.scale, np.float32([1 / 127, 1 / 127]))
    assert plan.layers == ["stem"]


def test_attention_operands_are_spared_unless_asked_for() -> None:
    plan = small_plan()
    assert "--attention" in plan.spared["attn.qk.lhs"]
    assert "--attention" in plan.spared["attn.av.lhs"]
    asked = make_plan(small_ranges(), SCHEMES["w8a8"], attention=True)
    assert not asked.spared
    assert asked.layers == ["stem", "attn.qk", "attn.av", "head"]


def test_spared_layers_keep_the_reason_that_was_given() -> None:
    plan = make_plan(small_ranges(), SCHEMES["w8a8"], attention=True, spare={"head": "logits", "attn.qk": "asked for"})
    assert plan.spared == {"attn.qk.lhs": "asked for", "head.input": "logits", "head.weight": "logits"}
    assert (
        make_plan(small_ranges(), SCHEMES["w8a8"], spare={"attn.qk": "asked for"}).spared["attn.qk.lhs"] == "asked for"
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_range_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    ranges = small_ranges()
    sites = {**ranges.sites, "head.weight": _range("weight", [-1, 0], [1, bad], axis=0)}
    with pytest.raises(PlanError, match=r"`head\.weight` is not finite"):
        make_plan(dataclasses.replace(ranges, sites=sites), SCHEMES["w8a8"])


def test_a_plan_that_quantizes_nothing_is_refused() -> None:
    with pytest.raises(PlanError, match="quantizes nothing"):
        make_plan(small_ranges(), SCHEMES["w8a8"], spare={"stem": "no", "head": "no"})


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _missing(path: Path) -> None:
    path.unlink()


def _a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _ranges_instead(path: Path) -> None:
    small_ranges().save(path)


def _with(tensors: dict[str, np.ndarray] | None = None, header: dict[str, Any] | None = None) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        plan = small_plan()
        sites = {n: {"codes": q.codes.name, "axis": q.axis} for n, q in plan.sites.items()}
        facts = {"format": 1, "scheme": "", "model": "", "images": "", "spared": {}, "sites": sites}
        text = json.dumps({**facts, **(header or {})})
        save_file({**load_file(path), **(tensors or {})}, path, {"dfq_plan": text})

    return rewrite


DAMAGES = {
    "cut short": _cut_short,
    "empty": _empty,
    "not there": _missing,
    "a folder": _a_folder,
    "ranges": _ranges_instead,
    "other format": _with(header={"format": 2}),
    "header without sites": _with(header={"sites": None}),
    "sites as a list": _with(header={"sites": []}),
    "unknown codes": _with(header={"sites": {"stem.input": {"codes": "int5", "axis": None}}}),
    "tensor missing": _with(header={"sites": {"nowhere.input": {"codes": "int8", "axis": None}}}),
    "negative scale": _with({"stem.input.scale": np.array(-1, np.float32)}),
    "scale of zero": _with({"stem.weight.scale": np.array([1, 0], np.float32)}),
    "scale of NaN": _with({"stem.input.scale": np.array(np.nan, np.float32)}),
    "scale of another type": _with({"stem.input.scale": np.array(1, np.float64)}),
    "zero-point of another type": _with({"stem.input.zero_point": np.array(0, np.int8)}),
    "zero-point of a signed format": _with({"stem.weight.zero_point": np.array([0, 1], np.int8)}),
    "zero-point that is no code": _with(
        {"stem.input.zero_point": np.array(200, np.uint8)},
        {"sites": {"stem.input": {"codes": "uint4", "axis": None}}},
    ),
    "zero-point of another shape": _with({"stem.input.zero_point": np.zeros(2, np.uint8)}),
}


def test_a_rewritten_plan_that_is_not_damaged_loads(saved: Path) -> None:
    _with()(saved)
    assert list(QuantPlan.load(saved).sites) == list(small_plan().sites)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_plan_is_told_in_three_lines(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved)
    with pytest.raises(PlanError) as caught:
        QuantPlan.load(saved)
    what, why, fix = str(caught.value).splitlines()
    assert str(saved) in what
    assert len(why) > len("  why: ")
    assert len(fix) > len("  fix: ")


@pytest.mark.parametrize("damage", [_cut_short, _empty, _missing, _with()])
def test_a_damaged_file_of_ranges_is_refused(saved: Path, damage: Callable[[Path], None]) -> None:
    small_ranges().save(saved)
    damage(saved)
    with pytest.raises(PlanError, match="not a whole plan or ranges file"):
        Ranges.load(saved)


def test_an_error_stays_three_lines_when_its_cause_has_more() -> None:
    assert str(DeployError(what="a\nb", why="c\nd", fix="e")).splitlines() == ["a b", "  why: c d", "  fix: e"]


def test_a_site_belongs_to_the_layer_before_its_last_dot() -> None:
    assert [layer_of("head.input"), layer_of("blocks.0.attn.qk.lhs")] == ["head", "blocks.0.attn.qk"]


def test_an_unknown_scheme_is_told_with_those_that_there_are() -> None:
    with pytest.raises(DeployError) as caught:
        scheme_named("w8a9")
    assert all(name in caught.value.why for name in SCHEMES)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_weights_are_signed_in_every_scheme(scheme: QuantScheme) -> None:
    if scheme.weight is not None:
        assert scheme.weight.signed
