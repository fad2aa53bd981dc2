import pytest

from quickmerge.errors import QuickmergeError
from quickmerge.transplant.choose_by_tokens import METHODS, NEEDS_VECTORS, check_method, rules_of
from quickmerge.transplant.matching import Subword
from quickmerge.transplant.rules import Mean, Nearest, Omp, Zero


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_rules(method: str) -> None:
    check_method(method, None, vectors=True)
    rules = rules_of(method, k=None, anchors=1000, vectors=True)
    names = [rule.name for rule in rules]
    assert rules and len(set(names)) == len(names)
    assert (len(rules) > 1) is (method in ("auto", "omp", "nearest"))


def test_k_replaces_the_usual_ones() -> None:
    for method in ("auto", "omp", "omp-raw", "nearest"):
        rules = rules_of(method, k=7, anchors=1000, vectors=True)
        assert {rule.k for rule in rules if isinstance(rule, (Omp, Nearest))} == {7}
        assert len({rule.name for rule in rules}) == len(rules)
    raw = rules_of("omp-raw", k=None, anchors=1000, vectors=True)
    assert raw == [Omp(64, centre=False, selection="inner", correct_mean=False)]
    assert rules_of("omp-raw", k=None, anchors=10, vectors=True)[0].k == 10  # type: ignore[union-attr]


def test_without_vectors_only_rules_that_need_none_compete() -> None:
    rules = rules_of("auto", k=None, anchors=1000, vectors=False)
    assert {type(rule) for rule in rules} == {Zero, Mean, Subword} and len(rules) == 6
    for method in METHODS:
        if method in NEEDS_VECTORS:
            with pytest.raises(QuickmergeError, match=f"method {method} needs vectors"):
                check_method(method, None, vectors=False)
        else:
            check_method(method, None, vectors=False)


def test_fewer_anchors_than_k() -> None:
    with pytest.raises(QuickmergeError, match=r"k must be at most 5, .* got 6"):
        rules_of("omp", k=6, anchors=5, vectors=True)
    with pytest.raises(QuickmergeError, match=r"method omp needs more shared tokens .* than 3"):
        rules_of("omp", k=None, anchors=3, vectors=True)
    assert all(getattr(rule, "k", 0) <= 10 for rule in rules_of("auto", k=None, anchors=10, vectors=True))
    for k in (0, -1, 1.5, True):
        with pytest.raises(QuickmergeError, match="k must be a whole number of at least 1"):
            check_method("omp", k, vectors=True)  # type: ignore[arg-type]
