"""Observers: one range, whatever the order, the batches and the shards in which values come."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from calibrators.affine import CODES, Codes, choose_qparams
from calibrators.errors import PlanError, RecipeError
from calibrators.observers import OBSERVERS, Entropy, MinMax, Observer, Percentile, SquaredError, observer_named

FLOATS = st.floats(-(2.0**20), 2.0**20, width=32, allow_subnormal=False)
BATCHES = st.lists(arrays(np.float32, array_shapes(max_dims=2, max_side=6), elements=FLOATS), min_size=1, max_size=6)

unhurried = settings(deadline=None)
every_observer = pytest.mark.parametrize(
    "make",
    [
        MinMax,
        Percentile,
        lambda: Percentile(75.0),
        lambda: Entropy(CODES["int8"]),
        lambda: SquaredError(CODES["int8"]),
    ],
)


def _seen(observer: Observer, *batches: np.ndarray) -> Observer:
    for batch in batches:
        observer.update(torch.from_numpy(batch))
    return observer


def _together(batches: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([batch.ravel() for batch in batches])


@every_observer
@unhurried
@given(batches=BATCHES, shuffle=st.randoms())
@example(batches=[np.float32([-1e-9]), np.float32([1])], shuffle=random.Random(0))  # both near the edge of a bin
@example(batches=[np.float32([0]), np.float32([-3e-7, 1e-6, 2e-6])], shuffle=random.Random(0))
def test_order_and_batches_do_not_matter(
    make: Callable[[], Observer], batches: list[np.ndarray], shuffle: random.Random
) -> None:
    at_once = _together(batches)
    shuffle.shuffle(batches)
    assert _seen(make(), *batches).range() == _seen(make(), at_once).range()


@every_observer
@unhurried
@given(shards=st.lists(BATCHES, min_size=2, max_size=4))
def test_merged_shards_equal_all_at_once(make: Callable[[], Observer], shards: list[list[np.ndarray]]) -> None:
    merged = make()
    for shard in shards:
        merged.merge(_seen(make(), *shard))
    assert merged.range() == _seen(make(), *(batch for shard in shards for batch in shard)).range()


@unhurried
@given(
    shards=st.lists(
        arrays(np.float32, st.tuples(st.integers(1, 5), st.just(3)), elements=FLOATS), min_size=2, max_size=4
    ),
    weight=arrays(np.float32, 3, elements=st.floats(0, 100, width=32)),
)
def test_merged_shards_of_weighted_values_equal_all_at_once(shards: list[np.ndarray], weight: np.ndarray) -> None:
    def make() -> SquaredError:
        return SquaredError(CODES["int8"], torch.from_numpy(weight))

    merged = make()
    for shard in shards:
        merged.merge(_seen(make(), shard))
    whole = _seen(make(), np.concatenate(shards))
    assert merged.range() == whole.range()
    assert _tensors(merged) == _tensors(whole)  # to the last bit, where the same range could be luck


def _tensors(observer: Observer) -> dict[str, list[float]]:
    return {name: part.tolist() for name, part in vars(observer).items() if isinstance(part, torch.Tensor)}


def test_observers_with_other_weights_are_not_merged() -> None:
    weights = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    one, other = (SquaredError(CODES["int8"], weight) for weight in weights)
    with pytest.raises(AssertionError):
        one.merge(other)


@every_observer
def test_merging_an_observer_that_saw_nothing_changes_nothing(make: Callable[[], Observer]) -> None:
    observer = _seen(make(), np.float32([-1, 2]))
    before = observer.range()
    observer.merge(make())
    assert observer.range() == before


@unhurried
@given(batches=BATCHES, percentile=st.sampled_from([75.0, 87.5, 99.8046875, 100.0]))  # exact as binary fractions
@example(batches=[np.float32([0]), np.float32([1e-6, -2e-6, 3e-6, 4e-6])], percentile=75.0)
def test_percentile_is_numpys_to_one_bin_and_within_the_extremes(batches: list[np.ndarray], percentile: float) -> None:
    values = _together(batches)
    low, high = _seen(Percentile(percentile), *batches).range()
    one_bin = 2 * max(np.abs(values).max(), 2.0**-64) / 4096
    assert 0 <= high - np.quantile(values, percentile / 100, method="inverted_cdf") <= one_bin
    assert 0 <= -np.quantile(-values, percentile / 100, method="inverted_cdf") - low <= one_bin
    assert values.min() <= low <= high <= values.max()


def test_percentile_leaves_rare_values_out() -> None:
    values = np.float32(np.random.default_rng(0).uniform(-1, 1, 100_000))
    values[[7, 700]] = -50, 80
    low, high = _seen(Percentile(99.99), values).range()
    np.testing.assert_allclose([low, high], [-1, 1], atol=80 / 2048)


@unhurried
@given(batches=BATCHES)
def test_minmax_is_the_smallest_and_the_largest_value(batches: list[np.ndarray]) -> None:
    values = _together(batches)
    assert _seen(MinMax(), *batches).range() == (values.min(), values.max())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_minmax_per_channel_keeps_one_pair_per_index(axis: int) -> None:
    batches = np.random.default_rng(0).standard_normal((2, 3, 4, 5), dtype=np.float32)
    others = tuple({0, 1, 2} - {axis})
    observer = _seen(MinMax(axis), batches[0])
    observer.merge(_seen(MinMax(axis), batches[1]))
    low, high = observer.range()
    np.testing.assert_array_equal(low, batches.min(0).min(others), strict=True)
    np.testing.assert_array_equal(high, batches.max(0).max(others), strict=True)


@every_observer
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused(make: Callable[[], Observer], bad: float) -> None:
    observer = _seen(make(), np.float32([1, 2]))
    assert observer.finite
    _seen(observer, np.float32([1, bad]), np.float32([3]))
    assert not observer.finite
    with pytest.raises(PlanError, match="NaN or Inf"):
        observer.range()


@every_observer
def test_a_place_that_nothing_passed_has_no_range(make: Callable[[], Observer]) -> None:
    with pytest.raises(PlanError, match="no value has passed"):
        make().range()


@every_observer
@pytest.mark.parametrize("codes", CODES.values(), ids=CODES.keys())
def test_a_place_that_only_zeros_pass_gets_scale_one(make: Callable[[], Observer], codes: Codes) -> None:
    low, high = _seen(make(), np.zeros((3, 4), np.float32)).range()
    assert (low, high) == (0, 0)
    assert choose_qparams(low, high, codes) == (1, 0)


@pytest.mark.parametrize("make", [MinMax, lambda: MinMax(0), Percentile, lambda: SquaredError(CODES["int8"])])
def test_what_is_held_does_not_grow_with_the_images(make: Callable[[], Observer]) -> None:
    batches = np.random.default_rng(0).standard_normal((50, 4, 1000), dtype=np.float32)
    batches *= np.arange(1, 51, dtype=np.float32)[:, None, None]
    assert _bytes_held(_seen(make(), *batches)) == _bytes_held(_seen(make(), batches[0])) < batches[0].nbytes * 10


def _bytes_held(thing: object) -> int:
    if isinstance(thing, torch.Tensor):
        return thing.untyped_storage().nbytes()
    if isinstance(thing, list | tuple):
        return sum(map(_bytes_held, thing))
    return sum(map(_bytes_held, vars(thing).values())) if hasattr(thing, "__dict__") else 8


@pytest.mark.parametrize("percentile", [50.0, 100.001, 0.999, float("nan")])
def test_a_percentile_that_is_none_is_refused(percentile: float) -> None:
    with pytest.raises(RecipeError, match="no usable percentile"):
        observer_named("percentile", percentile, CODES["int8"])


@pytest.mark.parametrize("name", OBSERVERS)
def test_each_observer_made_by_its_name_sees_something_else(name: str) -> None:
    values = np.float32(np.random.default_rng(0).standard_t(3, (5000, 2)) * [1, 9])
    weight = torch.tensor([1.0, 1e-3])
    ranges = {n: _seen(observer_named(n, 99.0, CODES["int8"], weight), values).range() for n in OBSERVERS}
    assert [other for other, found in ranges.items() if found == ranges[name]] == [name]


@pytest.mark.parametrize(
    ("name", "codes"), [("entropy", None), ("mse", None), ("hessian", None), ("entropy", CODES["float8_e4m3fn"])]
)
def test_a_search_without_a_format_to_search_for_is_refused(name: str, codes: Codes | None) -> None:
    with pytest.raises(RecipeError, match=f"`{name}` has nothing to search"):
        observer_named(name, 99.0, codes)


def test_an_unknown_observer_is_told_with_those_that_there_are() -> None:
    with pytest.raises(RecipeError) as caught:
        observer_named("entropie", 99.0, CODES["int8"])
    assert all(name in caught.value.why for name in OBSERVERS)
