"""GLUE's metrics of one split, in float64, equal to scikit-learn's and SciPy's."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from convattn_jax.config import check_choice


def confusion(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """int64 (C, C): how many rows of class i (labels) were predicted as class j."""
    classes = int(max(predicted.max(), labels.max())) + 1
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose class is predicted."""
    return float(np.mean(predicted == labels))


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of class 1; 0 where that class neither occurs nor is predicted."""
    hits = int(np.sum((predicted == 1) & (labels == 1)))
    marked = int(np.sum(predicted == 1)) + int(np.sum(labels == 1))
    return 2 * hits / marked if marked else 0.0


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation of any number of classes (Gorodkin 2004); 0 where either side is constant."""
    counts = confusion(predicted, labels).astype(np.float64)
    total, of_label, of_prediction = counts.sum(), counts.sum(1), counts.sum(0)
    covariance = counts.trace() * total - of_label @ of_prediction
    variances = (total**2 - of_label @ of_label) * (total**2 - of_prediction @ of_prediction)
    return float(covariance / np.sqrt(variances)) if variances > 0 else 0.0


def pearson(scores: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's r; 0 where either side is constant or a score is not finite, for that tells nothing."""
    from scipy import stats

    if not _varied(scores, labels):
        return 0.0
    found: Any = stats.pearsonr(scores, labels)
    return float(found.statistic)


def spearman(scores: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 where `pearson` is for want of variation."""
    from scipy import stats

    if not _varied(scores, labels):
        return 0.0
    found: Any = stats.spearmanr(scores, labels)
    return float(found.statistic)


def _varied(scores: np.ndarray, labels: np.ndarray) -> bool:
    return bool(np.isfinite(scores).all()) and all(x.min() < x.max() for x in (scores, labels))


Metric = Callable[[np.ndarray, np.ndarray], float]
CLASS_METRICS: dict[str, Metric] = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
SCORE_METRICS: dict[str, Metric] = {"pearson": pearson, "spearman": spearman}
METRICS: dict[str, Metric] = CLASS_METRICS | SCORE_METRICS


def evaluate(names: Iterable[str], predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """{metric: value} over all rows.

    Args:
      names: of `METRICS`.
      predictions: logits (N, C) for the metrics of classes, scores (N,) or (N, 1) for those of a regression.
      labels: classes or scores (N,), all of them known.

    Raises:
      ValueError: no rows, or not one prediction a label.
    """
    names = tuple(names)
    for name in names:
        check_choice("metric", name, METRICS)
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if len(labels) == 0 or len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    values = {}
    for name in names:
        if name in CLASS_METRICS:
            values[name] = CLASS_METRICS[name](predictions.argmax(-1), labels.astype(np.int64))
        else:
            values[name] = SCORE_METRICS[name](predictions.reshape(-1).astype(np.float64), labels.astype(np.float64))
    return values


def by_label(predictions: np.ndarray, labels: np.ndarray) -> dict[str, list[int]]:
    """{label: [rows, rows predicted right]}, in rising order; a score is taken to the nearest whole number.

    Args:
      predictions: logits (N, C) of classes, or scores (N,) or (N, 1) of a regression.
      labels: classes or scores (N,).
    """
    if predictions.ndim == 2 and predictions.shape[1] > 1:
        found = predictions.argmax(-1)
    else:
        found = np.rint(predictions.reshape(-1).astype(np.float64))  # a score that is not finite equals no label
    labels = np.rint(labels).astype(np.int64)
    return {
        str(label): [int(np.sum(labels == label)), int(np.sum(found[labels == label] == label))]
        for label in np.unique(labels).tolist()
    }
