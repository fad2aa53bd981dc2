"""The metric of recognition against a slow float64 loop, and its laws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quickmerge.errors import QuickmergeError
from quickmerge.recognition.metric import exact, exact_curve, meaning, meaning_floor, threshold_curve

WORDS = [f"word {letter}" for letter in "abcdefgh"]
LABELS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5, unique=True)
IMAGES = st.lists(st.tuples(LABELS, st.lists(st.sampled_from(WORDS), max_size=6, unique=True)), min_size=1, max_size=5)


def encode(texts):
    """A fixed random unit vector for each text."""
    rows = [torch.randn(6, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in texts]
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1) if rows else torch.zeros(0, 6)


def slow(references, predictions, threshold=None):
    """The formulas of the paper, one pair at a time."""
    totals = [0.0, 0.0, 0.0]
    for wanted, got in zip(references, predictions, strict=True):

        def cosine(a, b):
            value = sum(x * y for x, y in zip(encode([a])[0].tolist(), encode([b])[0].tolist(), strict=True))
            return 0.0 if threshold is not None and value < threshold - 1e-5 else value

        if got:
            recall = math.fsum(max(cosine(r, g) for g in got) for r in wanted) / len(wanted)
            precision = math.fsum(max(cosine(r, g) for r in wanted) for g in got) / len(got)
            f1 = 2 * recall * precision / (recall + precision) if recall + precision > 0 else 0.0
            totals = [t + v for t, v in zip(totals, (recall, precision, f1), strict=True)]
    return [total / len(references) for total in totals]


@given(IMAGES, st.sampled_from([None, 0.0, 0.3, 1.0]))
def test_all_images_at_once_are_each_pair_by_itself(images, threshold) -> None:
    references, predictions = map(list, zip(*images, strict=True))
    found = meaning(references, predictions, encode, threshold=threshold)
    wanted = slow(references, predictions, threshold)
    assert [found.recall, found.precision, found.f1] == pytest.approx(wanted, abs=1e-6)


@given(st.lists(LABELS, min_size=1, max_size=4), st.randoms())
def test_perfect_predictions_score_one_in_any_order(references, random) -> None:
    shuffled = [random.sample(labels, len(labels)) for labels in references]
    found = meaning(references, shuffled, encode)
    assert [found.recall, found.precision, found.f1] == pytest.approx([1, 1, 1], abs=1e-6)
    letter = exact(references, shuffled)
    assert (letter.recall, letter.precision) == (1, 1)


@given(IMAGES, st.randoms())
def test_the_order_of_images_and_labels_does_not_count(images, random) -> None:
    references, predictions = zip(*images, strict=True)
    mixed = random.sample(images, len(images))
    other = [[random.sample(labels, len(labels)) for labels in part] for part in zip(*mixed, strict=True)]
    one, two = meaning(references, predictions, encode), meaning(*other, encode)
    assert list(one.as_dict().values()) == pytest.approx(list(two.as_dict().values()), abs=1e-9)


def test_no_prediction_scores_nothing_and_more_predictions_never_lower_the_recall() -> None:
    assert meaning([["word a"]], [[]], encode).as_dict() == {"recall": 0, "precision": 0, "f1": 0}
    assert exact([["word a"]], [[]]).as_dict() == {"recall": 0, "precision": 0, "predictions": 0}
    recalls = [meaning([WORDS[:3]], [WORDS[::-1]], encode, at=k).recall for k in range(1, 9)]
    assert recalls == sorted(recalls) and recalls[-1] == pytest.approx(1)


def test_the_floor_uses_no_image_s_own_references() -> None:
    references = [[word] for word in WORDS]
    floor = meaning_floor(references, references, encode)
    assert floor.recall < 0.9 < meaning(references, references, encode).recall
    # With two images there is only one way to swap them.
    pair = references[:2]
    swapped = meaning(pair[::-1], pair, encode)
    assert meaning_floor(pair, pair, encode, seed=3).as_dict() == swapped.as_dict()
    with pytest.raises(QuickmergeError, match="at least 2 images, got 1"):
        meaning_floor(references[:1], references[:1], encode)


def test_the_threshold_curve_falls_to_what_is_exact() -> None:
    references, predictions = [WORDS[:4], WORDS[2:5]], [WORDS[2:6], WORDS[:2]]
    curve = threshold_curve(references, predictions, encode)
    assert list(curve) == [0.0, 0.3, 0.5, 1.0]
    recalls = [value.recall for value in curve.values()]
    assert recalls == sorted(recalls, reverse=True)
    assert curve[1.0].recall == pytest.approx(exact(references, predictions).recall, abs=1e-6)
    assert curve[1.0].precision == pytest.approx(exact(references, predictions).precision, abs=1e-6)


def test_exact_recall_by_hand() -> None:
    references, predictions = [["Red  Circle", "digit 7"]], [["red circle", "digit 1", "digit 7"]]
    assert list(exact(references, predictions).as_dict().values()) == pytest.approx([1, 2 / 3, 3])
    assert exact(references, predictions, at=0).as_dict() == {"recall": 0.5, "precision": 0.5, "predictions": 2}
    assert {k: v.recall for k, v in exact_curve(references, predictions).items()} == {1: 0.5, 3: 1, 5: 1, 10: 1}


@pytest.mark.parametrize(
    ("references", "predictions", "message"),
    [
        ([], [], "same images, at least one, got 0 and 0"),
        ([["word a"]], [], "got 1 and 0"),
        ([["word a"], []], [[], []], "image 2 has none"),
    ],
)
def test_what_cannot_be_scored(references, predictions, message) -> None:
    for score in (lambda: meaning(references, predictions, encode), lambda: exact(references, predictions, at=0)):
        with pytest.raises(QuickmergeError, match=message):
            score()
    with pytest.raises(ValueError, match="at must be a whole number"):
        meaning([["word a"]], [["word a"]], encode, at=0)
