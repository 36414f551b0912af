"""Searched ranges: the least error that any range has, the divergence of TensorRT's method, each end by itself."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from calibrators import range_search
from calibrators.affine import CODES, Codes, choose_qparams, fake_quantize
from calibrators.observers import Entropy, Observer, SquaredError
from calibrators.sites import attach_sites, channel_weights

FORMATS = [
    CODES["int8"],
    CODES["uint8"],
    CODES["int4"],
    CODES["float8_e4m3fn"],
    Codes("six signed bits", -32, 31, lowest=-31),
    Codes("uint4", 0, 15, lowest=0),
]
every_format = pytest.mark.parametrize("codes", FORMATS, ids=lambda codes: codes.name)


def _normal(size: int = 20_000) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(size).astype(np.float32)


def _gelu(size: int = 20_000) -> np.ndarray:
    return nn.functional.gelu(torch.from_numpy(2 * _normal(size))).numpy()


def _heavy(size: int = 20_000) -> np.ndarray:
    return np.random.default_rng(0).standard_t(3, size).astype(np.float32)


every_sample = pytest.mark.parametrize("sample", [_normal, _gelu, _heavy])


def _found(observer: Observer, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    for batch in np.array_split(values, 3):
        observer.update(torch.from_numpy(batch))
    return observer.range()


def _error(values: np.ndarray, ends: tuple[np.ndarray, np.ndarray], codes: Codes, factors: tuple[float, ...]) -> float:
    """Mean squared error of the values themselves, times each factor."""
    scale, zero_point = choose_qparams(*ends, codes)
    scaled = np.outer(factors, values.astype(np.float64))
    return float(np.square(fake_quantize(scaled, scale, zero_point, codes) - scaled).mean())


@every_format
@every_sample
def test_mse_is_the_least_of_a_search_by_brute_force(codes: Codes, sample: Callable[[], np.ndarray]) -> None:
    values = sample()
    ends = _found(SquaredError(codes), values)
    lows = [0.07, 0.3, 0.5, 0.7, 0.85, 1, 1.2, 1.4] if not codes.signed else [None]
    factors = range_search._HEADROOM
    least = min(
        _error(values, (values.min() * np.float32(low or high), values.max() * np.float32(high)), codes, factors)
        for high in np.linspace(0.05, 1.6, 120 if codes.signed else 60)
        for low in lows
    )
    assert _error(values, ends, codes, factors) < 1.03 * least


@every_format
def test_a_plan_gets_exactly_the_scale_that_was_searched(codes: Codes, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def spy(values: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, codes: Codes) -> np.ndarray:
        tried.append((float(scale), int(zero_point)))
        return fake_quantize(values, scale, zero_point, codes)

    monkeypatch.setattr(range_search, "fake_quantize", spy)
    low, high = _found(SquaredError(codes), _heavy())
    assert low.dtype == high.dtype == np.float32
    scale, zero_point = choose_qparams(low, high, codes)
    assert (float(scale), int(zero_point)) in tried


@every_sample
def test_headroom_makes_room_for_larger_values(
    sample: Callable[[], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    values, codes, ranges = sample(), CODES["int8"], {}
    for factors in ((1.0,), (1.0, 1.5)):
        monkeypatch.setattr(range_search, "_HEADROOM", factors)
        ranges[factors] = _found(SquaredError(codes), values)
    without, roomy = ranges.values()
    assert roomy[1] > without[1]
    assert _error(values, roomy, codes, (1.5,)) < _error(values, without, codes, (1.5,))
    assert _error(values, roomy, codes, (1.0,)) > _error(values, without, codes, (1.0,))


@pytest.mark.parametrize("heavy", [0, 1])
def test_one_heavy_channel_gets_the_range_that_is_best_for_it(heavy: int) -> None:
    values = _heavy(40_000).reshape(-1, 2) * np.float32([1, 5])
    weight = torch.tensor([1e-4, 1e-4])
    weight[heavy] = 1
    codes = CODES["int8"]
    ends = _found(SquaredError(codes, weight), values)
    alone = _found(SquaredError(codes), values[:, heavy])
    both = _found(SquaredError(codes), values)
    assert ends[1] == pytest.approx(alone[1], rel=0.05)
    assert heavy == 1 or ends[1] < 0.5 * both[1]


def test_weights_of_a_convolution_broadcast_over_its_window() -> None:
    values = _heavy(4 * 3 * 50 * 20).reshape(4, 3, 50, 20)
    values[:, 1] *= 5
    codes = CODES["int8"]
    ends = _found(SquaredError(codes, torch.tensor([0.0, 1, 0]).reshape(3, 1, 1)), values)
    assert ends[1] == pytest.approx(_found(SquaredError(codes), values[:, 1])[1], rel=0.05)


@torch.inference_mode()
@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1, groups=2)]
)
def test_a_channel_weighs_what_an_error_in_it_adds_to_the_output(layer: nn.Module) -> None:
    module = nn.Sequential(layer)
    attach_sites(module)
    weights = channel_weights(module)["0.input"]
    for channel in range(6):
        error = torch.zeros((1, 6) if isinstance(layer, nn.Linear) else (1, 6, 3, 3))
        error[0, channel].view(-1)[error[0, channel].numel() // 2] = 0.5
        added = (layer(error) - layer(torch.zeros_like(error))).square().sum()
        assert added == pytest.approx(0.25 * weights[channel].item(), rel=1e-5)
    assert (torch.zeros(2, *error.shape[1:]) * weights).shape == (2, *error.shape[1:])


def _migacz(values: np.ndarray) -> float:
    """The threshold of TensorRT's entropy calibration, by the letter: 2048 bins of absolute values, 128 levels."""
    counts, edges = np.histogram(np.abs(values), 2048)
    least, threshold = np.inf, edges[-1]
    for bins in range(128, 2049, 8):
        seen = counts[:bins].astype(float)
        told = np.zeros(bins)
        for run in np.array_split(np.arange(bins), 128):
            hit = run[seen[run] > 0]
            told[hit] = seen[run].sum() / max(len(hit), 1)
        seen[-1] += counts[bins:].sum()
        if (told[seen > 0] == 0).any():
            continue
        p, q = (share[seen > 0] / share.sum() for share in (seen, told))
        if (p * np.log(p / q)).sum() < least:
            least, threshold = (p * np.log(p / q)).sum(), edges[bins]
    return float(threshold)


@every_sample
def test_entropy_is_near_tensorrts(sample: Callable[[int], np.ndarray]) -> None:
    values = sample(200_000)
    low, high = _found(Entropy(CODES["int8"]), values)
    assert max(-low, high) == pytest.approx(_migacz(values), rel=0.2)


def test_entropy_cuts_a_heavy_tail_off() -> None:
    values = _heavy(200_000)
    low, high = _found(Entropy(CODES["int8"]), values)
    assert max(-low, high) < 0.5 * np.abs(values).max()


@pytest.mark.parametrize("make", [Entropy, SquaredError])
def test_the_ends_of_an_asymmetric_range_are_searched_apart(make: Callable[[Codes], Observer]) -> None:
    values = np.concatenate([_normal(50_000) + 2, np.float32([-60, 20])])
    low, high = _found(make(Codes("uint4", 0, 15, lowest=0)), values)
    assert -4 < low < -0.5
    assert 4 < high < 9


@every_format
@pytest.mark.parametrize("value", [3.7, -3.7])
def test_one_value_alone_is_kept(codes: Codes, value: float) -> None:
    for observer in (Entropy(codes), SquaredError(codes)):
        scale, zero_point = choose_qparams(*_found(observer, np.full(9, value, np.float32)), codes)
        again = fake_quantize(np.float64(value), scale, zero_point, codes)
        assert abs(again - value) <= max(0.51 * scale, abs(value) / 16)  # FP8 has 16 steps in the last binade
