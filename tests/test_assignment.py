"""Which format each layer gets under a budget: the choice itself, and the bundle that comes of it."""

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dfq_deploy as dfq
from calibrators.errors import BackendError, PlanError, RecipeError
from calibrators.plan import QuantPlan
from dfq_deploy.assignment import Budget, _cheapest

_DEMO = {"model": "demo", "generator": "noise", "count": 8, "refine": "none", "auto": True}
_LAYERS = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]),
    st.fixed_dictionaries({name: st.tuples(st.integers(0, 20), st.integers(0, 20)) for name in ("int8", "int4")}),
    min_size=1,
)


@given(_LAYERS, st.integers(1, 40))
def test_no_other_choice_within_the_budget_costs_less(
    layers: dict[str, dict[str, tuple[int, int]]], allowed: int
) -> None:
    noise = {layer: {name: float(pair[0]) for name, pair in own.items()} for layer, own in layers.items()}
    costs = {layer: {"float": 10.0, **{k: float(pair[1]) for k, pair in own.items()}} for layer, own in layers.items()}
    found = _cheapest(costs, noise, allowed)
    assert found.keys() == layers.keys()

    def cost(choice: dict[str, str]) -> float:
        return sum(costs[layer][name] for layer, name in choice.items())

    def loud(choice: dict[str, str]) -> float:
        return sum(0.0 if name == "float" else noise[layer][name] for layer, name in choice.items())

    possible = [dict(zip(costs, names, strict=True)) for names in itertools.product(*costs.values())]
    assert loud(found) <= allowed * (1 + 1e-6)
    assert cost(found) <= min(cost(choice) for choice in possible if loud(choice) <= allowed) + 1e-6


def test_a_budget_in_points_and_one_in_agreement_ask_for_the_same_noise() -> None:
    assert math.isclose(Budget.of(0.3, None).wanted_db, Budget.of(9.9, 98).wanted_db)
    assert Budget.of(0.1, None).wanted_db > Budget.of(1.0, None).wanted_db


@pytest.fixture
def folder(demo_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of the demo whose finished stages may be used."""
    copy = tmp_path / "bundle"
    shutil.copytree(demo_bundle, copy)
    return copy


def test_a_looser_budget_gives_a_smaller_engine_that_still_agrees(folder: Path) -> None:
    sizes, counts = [], []
    for max_drop in (0.02, 0.1, 1.0):
        recipe = dfq.Recipe(**_DEMO, least="size", block=32, max_drop=max_drop)
        assert dfq.export(recipe, folder, limit=16).verdict == "pass"
        (file,) = sorted((folder / "work").glob("formats-*.json"), key=lambda path: path.stat().st_mtime)[-1:]
        found = json.loads(file.read_text())
        plan = QuantPlan.load(folder / "plan.safetensors")
        assert {layer for layer, name in found["formats"].items() if name != "float"} == set(plan.layers)
        assert 100 * found["changed"] <= max_drop / 0.15 + 1e-6
        sizes.append(found["total"]["this"])
        counts.append(set(found["formats"].values()))
        for layer, name in found["formats"].items():
            if name == "float":
                assert "of --max-drop" in plan.spared[f"{layer}.weight"]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    assert any({"w8a8", "w4a16"} <= both for both in counts), "one plan may hold both"


def test_times_come_from_the_run_time_and_decide(folder: Path) -> None:
    recipe = dfq.Recipe(**_DEMO)
    assert dfq.export(recipe, folder, limit=16).verdict == "pass"
    (file,) = (folder / "work").glob("formats-*.json")
    found = json.loads(file.read_text())
    assert found["total"]["this"] <= min(found["total"]["float"], found["total"]["w8a8"]) + 1e-6
    assert all(time > 0 for own in found["costs"].values() for time in own.values())


def test_a_budget_that_nothing_fits_is_refused(folder: Path) -> None:
    with pytest.raises(PlanError, match="leaves no layer to quantize"):
        dfq.export(dfq.Recipe(**_DEMO, least="size", max_drop=1e-9), folder, limit=1)


def test_tensorrt_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="how long each layer takes"):
        dfq.export(dfq.Recipe(**_DEMO, backend="rtx"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "wrong",
    [{"max_drop": 0.0}, {"max_drop": 11.0}, {"min_agreement": 100.0}, {"least": "heat"}, {"scheme": "float"}],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        dfq.Recipe(**{**_DEMO, **wrong})
