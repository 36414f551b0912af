"""What each task makes of outputs, computed by hand: agreement, classes, and the outputs that it refuses."""

import numpy as np
import pytest

from calibrators.errors import ModelError
from calibrators.registry import names
from dfq_deploy.differences import Differences
from dfq_deploy.measures import Share
from dfq_deploy.tasks import task_named
from exporters.outputs import Output, parts_of, rows_of

RANDOM = np.random.default_rng(0)
# A form that each task takes, and one that it does not.
SHAPES = {
    "classification": ({"output": (5,)}, {"output": (5, 7, 7)}),
    "detection": ({"logits": (6, 4), "pred_boxes": (6, 4)}, {"logits": (6, 4)}),
    "features": ({"tokens": (9, 8), "pooled": (8,)}, {}),
    "masks": ({"pred_masks": (3, 8, 8)}, {"pred_masks": (8,)}),
    "segmentation": ({"out": (4, 8, 8)}, {"out": (1, 8, 8)}),
}


def _outputs(task: str) -> tuple[Output, ...]:
    shapes = SHAPES[task][0]
    return tuple(Output(called, shapes[name]) for name, called in task_named(task).pick_outputs(shapes).items())


def _drawn(task: str, images: int = 3) -> dict[str, np.ndarray]:
    drawn = {output.name: RANDOM.normal(size=(images, *output.shape)) for output in _outputs(task)}
    return {name: np.abs(values) if name == "boxes" else values for name, values in drawn.items()}


every_task = pytest.mark.parametrize("task", names("dfq_deploy.tasks"))


@every_task
def test_outputs_agree_with_themselves(task: str) -> None:
    found = _drawn(task)
    np.testing.assert_allclose(task_named(task).agree(found, found), 1.0, rtol=1e-12)


@every_task
def test_other_outputs_agree_less_the_more_they_differ(task: str) -> None:
    wanted = _drawn(task, images=64)
    shares = []
    for noise in (0.05, 5.0):
        found = {name: values + noise * RANDOM.normal(size=values.shape) for name, values in wanted.items()}
        agreement = task_named(task).agree(found, wanted)
        assert agreement.shape == (64,)
        assert ((agreement >= 0) & (agreement <= 1)).all()
        shares.append(agreement.mean())
    assert shares[1] < 0.7 * shares[0]


@every_task
def test_outputs_of_another_kind_are_refused_with_what_is_wanted(task: str) -> None:
    with pytest.raises(ModelError) as caught:
        task_named(task).pick_outputs(SHAPES[task][1])
    assert task in caught.value.what
    assert "(N, " in caught.value.why or "one tensor or more" in caught.value.why


@every_task
def test_only_a_classifier_decides_for_a_class(task: str) -> None:
    decided = task_named(task).decide(_drawn(task))
    assert (decided is None) == (task != "classification")


@pytest.mark.parametrize(
    ("task", "classes"),
    [("classification", 5), ("detection", 3), ("features", 0), ("masks", 0), ("segmentation", 4)],
)
def test_classes_are_counted(task: str, classes: int) -> None:
    assert task_named(task).count_classes(_outputs(task)) == classes


def test_pixel_agreement_is_the_share_of_places() -> None:
    wanted = np.zeros((1, 2, 2, 2))
    wanted[:, 0] = 1.0
    found = wanted.copy()
    found[0, :, 0, 0] = found[0, ::-1, 0, 0]
    assert task_named("segmentation").agree({"logits": found}, {"logits": wanted}).tolist() == [0.75]


def test_mask_iou_is_a_mean_over_masks_and_two_empty_ones_agree() -> None:
    wanted = np.full((1, 2, 2, 2), -1.0)
    found = wanted.copy()
    wanted[0, 0, 0, :] = 1.0  # two places
    found[0, 0, :, 0] = 1.0  # two, one of them shared
    assert task_named("masks").agree({"masks": found}, {"masks": wanted}) == pytest.approx([(1 / 3 + 1) / 2])


def test_a_negative_cosine_is_no_agreement() -> None:
    values = RANDOM.normal(size=(2, 8))
    assert task_named("features").agree({"f": -values}, {"f": values}).tolist() == [0.0, 0.0]


def test_features_that_are_no_numbers_are_no_agreement() -> None:
    values = RANDOM.normal(size=(2, 8))
    assert task_named("features").agree({"f": values * [[1.0], [np.nan]]}, {"f": values}) == pytest.approx([1.0, 0.0])


def _detected(*boxes: tuple[int, float, float]) -> dict[str, np.ndarray]:
    """One image in which boxes of a class lie at x, y with a width and height of 0.2; the rest is no object."""
    logits, places = np.full((1, 6, 4), -9.0), np.full((1, 6, 4), 0.2)
    logits[0, :, 3] = 9.0
    for query, (kind, x, y) in enumerate(boxes):
        logits[0, query, [kind, 3]] = 9.0, -9.0
        places[0, query, :2] = x, y
    return {"logits": logits, "boxes": places}


@pytest.mark.parametrize(
    ("found", "share"),
    [
        (_detected((1, 0.7, 0.7), (0, 0.3, 0.3)), 1.0),  # by other queries
        (_detected((0, 0.3, 0.3)), 0.5),  # one is missing
        (_detected((0, 0.3, 0.3), (1, 0.7, 0.7), (2, 0.5, 0.5)), 2 / 3),  # one is new
        (_detected((0, 0.3, 0.3), (2, 0.7, 0.7)), 0.5),  # one is of another class
        (_detected((0, 0.3, 0.3), (1, 0.8, 0.7)), (1 + 1 / 3) / 2),  # one has moved by half its width
    ],
)
def test_boxes_are_matched_within_their_class(found: dict[str, np.ndarray], share: float) -> None:
    wanted = _detected((0, 0.3, 0.3), (1, 0.7, 0.7))
    assert task_named("detection").agree(found, wanted) == pytest.approx([share])
    assert task_named("detection").agree(wanted, found) == pytest.approx([share])


def test_sigmoid_detectors_have_no_class_for_no_object() -> None:
    outputs = task_named("detection").pick_outputs({"sigmoid_logits": (6, 4), "boxes": (6, 4)})
    assert list(outputs) == ["sigmoid_logits", "boxes"]
    found = {"sigmoid_logits": np.full((1, 6, 4), -9.0), "boxes": np.full((1, 6, 4), 0.2)}
    found["sigmoid_logits"][0, 2, 3] = 5.0  # the last class counts
    other = {**found, "sigmoid_logits": found["sigmoid_logits"][..., ::-1]}
    assert task_named("detection").agree(found, other).tolist() == [0.0]


def test_boxes_that_are_no_numbers_agree_with_nothing() -> None:
    found, wanted = _detected((0, 0.3, 0.3)), _detected((0, 0.3, 0.3))
    found["boxes"] = np.full_like(found["boxes"], np.nan)
    assert task_named("detection").agree(found, wanted).tolist() == [0.0]


# --- rows of outputs ---


def test_rows_give_back_the_outputs_that_they_were_made_of() -> None:
    outputs = (Output("logits", (4, 3)), Output("boxes", (4, 2)))
    parts = [RANDOM.normal(size=(5, *output.shape)).astype(np.float32) for output in outputs]
    found = parts_of(rows_of(parts), outputs)
    assert list(found) == ["logits", "boxes"]
    for part, again in zip(parts, found.values(), strict=True):
        np.testing.assert_array_equal(part, again)
    assert np.shares_memory(rows_of(parts[:1]), parts[0])


def test_differences_do_not_depend_on_the_batches() -> None:
    outputs = (Output("logits", (6, 4)), Output("boxes", (6, 4)))
    rows = {name: RANDOM.uniform(size=(8, 48)) for name in ("a", "b")} | {"moved": RANDOM.uniform(size=(3, 8, 48))}
    pairs = {"ab": ("a", "b"), "moved": ("moved", "b")}
    whole, parts = (Differences(task_named("detection"), outputs, pairs) for _ in range(2))
    whole.add(rows)
    for batch in (slice(0, 3), slice(3, 8)):
        parts.add({name: values[..., batch, :] for name, values in rows.items()})
    for pair in pairs:
        for measure in ("distance", "cosine", "agreement"):
            np.testing.assert_allclose(getattr(whole, measure)(pair), getattr(parts, measure)(pair), rtol=1e-12)
        assert whole.sqnr_db(pair) == parts.sqnr_db(pair)
    assert whole.agreement("moved").shape == (3, 8)
    assert whole.distance("moved").shape == (8,)


def test_a_small_output_counts_as_much_as_a_large_one() -> None:
    outputs = (Output("logits", (2, 3)), Output("boxes", (2, 4)))
    wanted = np.concatenate([np.full((1, 6), 100.0), np.full((1, 8), 0.5)], axis=1)
    found = wanted.copy()
    found[:, 6:] *= 1.1
    seen = Differences(task_named("features"), outputs, {"pair": ("found", "wanted")})
    seen.add({"found": found, "wanted": wanted})
    assert seen.distance("pair") == pytest.approx([0.01 / 2])


def test_the_interval_of_a_mean_share_is_students() -> None:
    share = Share.of(np.array([0.9, 0.8, 1.0, 0.9]))
    assert (share.percent, share.n) == (90.0, 4)
    spread = 3.182 * 100 * np.std([0.9, 0.8, 1.0, 0.9], ddof=1) / 2  # t of 3 degrees of freedom
    assert share.low == pytest.approx(90 - spread, abs=0.01)
    assert share.high == 100.0
    alone = Share.of(np.array([0.9]))
    assert (alone.low, alone.high) == (0.0, 100.0)
