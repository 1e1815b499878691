"""GLUE's metrics against scikit-learn and SciPy, degenerate inputs included."""

import warnings

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from convattn_jax.config import UserError
from convattn_jax.glue.metrics import by_label, evaluate

EXACT = {"rel": 1e-9, "abs": 1e-9}


@st.composite
def classes(draw, most=2):
    """Predicted and true classes, often constant."""
    size = draw(st.integers(1, 60))
    count = draw(st.integers(1, most))
    column = st.lists(st.integers(0, count - 1), min_size=size, max_size=size).map(np.array)
    return draw(column), draw(column)


def logits_of(predicted, classes):
    rng = np.random.default_rng(0)
    return rng.random((len(predicted), classes)) + 2 * np.eye(classes)[predicted]


@given(classes())
@settings(max_examples=60, deadline=None)
def test_two_classes_as_in_scikit_learn(case):
    predicted, labels = case
    got = evaluate(("accuracy", "f1", "matthews"), logits_of(predicted, 2), labels.astype(np.int32))
    assert got == {
        "accuracy": pytest.approx(sklearn.metrics.accuracy_score(labels, predicted), **EXACT),
        "f1": pytest.approx(sklearn.metrics.f1_score(labels, predicted, zero_division=0), **EXACT),
        "matthews": pytest.approx(matthews_of_scikit_learn(labels, predicted), **EXACT),
    }


@given(classes(most=5))
@settings(max_examples=40, deadline=None)
def test_many_classes_as_in_scikit_learn(case):
    predicted, labels = case
    got = evaluate(("accuracy", "matthews"), logits_of(predicted, 5), labels)
    assert got["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted), **EXACT)
    assert got["matthews"] == pytest.approx(matthews_of_scikit_learn(labels, predicted), **EXACT)


def matthews_of_scikit_learn(labels, predicted):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a single class
        return sklearn.metrics.matthews_corrcoef(labels, predicted)


@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.booleans(), st.sampled_from([np.float32, np.float64]))
@settings(max_examples=60, deadline=None)
def test_correlations_as_in_scipy(seed, size, ties, dtype):
    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(2, 3, size).astype(dtype), rng.uniform(0, 5, size).astype(np.float32)
    if ties:
        scores, labels = np.round(scores), np.round(labels)
        scores[0], scores[1], labels[0], labels[1] = 0, 1, 0, 1
    expected = {
        "pearson": pytest.approx(stats.pearsonr(scores.astype(float), labels.astype(float)).statistic, **EXACT),
        "spearman": pytest.approx(stats.spearmanr(scores.astype(float), labels.astype(float)).statistic, **EXACT),
    }
    assert evaluate(("pearson", "spearman"), scores, labels) == expected
    assert evaluate(("pearson", "spearman"), scores[:, None], labels) == expected


def test_what_tells_nothing_correlates_with_nothing():
    names = ("pearson", "spearman")
    nothing = {"pearson": 0.0, "spearman": 0.0}
    assert evaluate(names, np.ones(5), np.arange(5)) == nothing
    assert evaluate(names, np.arange(5), np.ones(5)) == nothing
    assert evaluate(names, np.array([1.0, np.nan, 2.0]), np.arange(3)) == nothing
    assert evaluate(names, np.array([1.0, np.inf, 2.0]), np.arange(3)) == nothing
    assert evaluate(names, np.array([1.0]), np.array([2.0])) == nothing
    one_class = np.tile([1.0, 0.0], (4, 1))
    assert evaluate(("f1", "matthews"), one_class, np.zeros(4, int)) == {"f1": 0.0, "matthews": 0.0}
    assert evaluate(("matthews",), one_class, np.array([0, 1, 0, 1])) == {"matthews": 0.0}


def test_large_counts_do_not_overflow():
    labels = np.arange(400_000) % 2
    assert evaluate(("matthews",), np.eye(2)[labels], labels) == {"matthews": pytest.approx(1.0, **EXACT)}


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="3 predictions for 2 labels"):
        evaluate(("accuracy",), np.zeros((3, 2)), np.zeros(2))
    with pytest.raises(ValueError, match="0 predictions for 0 labels"):
        evaluate(("pearson",), np.zeros(0), np.zeros(0))
    with pytest.raises(UserError, match="metric='recall' is unknown"):
        evaluate(("recall",), np.zeros((1, 2)), np.zeros(1))


def test_rows_and_hits_are_counted_by_label():
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [5.0, 1.0]])
    assert by_label(logits, np.array([0, 0, 1, 0])) == {"0": [3, 2], "1": [1, 1]}


def test_scores_count_as_the_nearest_whole_number():
    scores = np.array([[1.4], [1.6], [6.9], [np.nan]])
    assert by_label(scores, np.array([1.0, 1.0, 7.0, 7.0])) == {"1": [2, 1], "7": [2, 1]}
