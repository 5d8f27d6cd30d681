"""Classification and regression metrics of the configuration, compared with scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sklearn

from tests.support.metrics import (
    NUM_CLASSES,
    Array,
    Reference,
    assert_metric_equals,
    make_classification,
    make_metric,
    make_regression,
)


def from_labels(reference: Reference, **options: Any) -> Reference:
    """Convert a function of true and predicted labels to one of logits and labels."""
    return lambda logits, labels: reference(labels, logits.argmax(1), **options)


def probabilities(logits: Array) -> Array:
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def specificity(logits: Array, labels: Array) -> Any:
    confusion = sklearn.confusion_matrix(labels, logits.argmax(1))
    true_positives = np.diag(confusion)
    negatives = confusion.sum() - confusion.sum(axis=1)
    return ((negatives - (confusion.sum(axis=0) - true_positives)) / negatives).mean()


def calibration_error(logits: Array, labels: Array) -> Any:
    confidence = probabilities(logits).max(axis=1)
    is_correct = logits.argmax(1) == labels
    bins = np.ceil(confidence * 15)
    gaps = confidence - is_correct
    return sum(abs(gaps[bins == index].sum()) / len(labels) for index in range(1, 16))


CLASSIFICATION: dict[str, Reference] = {
    "accuracy": from_labels(sklearn.accuracy_score),
    "accuracy_per_class": from_labels(sklearn.recall_score, average=None),
    "accuracy_top5": lambda x, y: sklearn.top_k_accuracy_score(y, x, k=5),
    "auroc": lambda x, y: sklearn.roc_auc_score(y, probabilities(x), multi_class="ovr"),
    "average_precision": lambda x, y: sklearn.average_precision_score(
        np.eye(NUM_CLASSES)[y], probabilities(x)
    ),
    "calibration_error": calibration_error,
    "cohen_kappa": from_labels(sklearn.cohen_kappa_score),
    "confusion_matrix": from_labels(sklearn.confusion_matrix),
    "f1": from_labels(sklearn.f1_score, average="macro"),
    "matthews": from_labels(sklearn.matthews_corrcoef),
    "precision": from_labels(sklearn.precision_score, average="macro"),
    "recall": from_labels(sklearn.recall_score, average="macro"),
    "specificity": specificity,
    "total_correct": from_labels(sklearn.accuracy_score, normalize=False),
}


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_classification_metric_matches_reference(name: str) -> None:
    outputs, targets = make_classification()
    expected = CLASSIFICATION[name](outputs.double().numpy(), targets.numpy())
    assert_metric_equals(make_metric(name), outputs, targets, expected)


def cosine_similarity(outputs: Array, targets: Array) -> Any:
    norms = np.linalg.norm(outputs, axis=1) * np.linalg.norm(targets, axis=1)
    return ((outputs * targets).sum(axis=1) / norms).mean()


REGRESSION: dict[str, Reference] = {
    "cosine_similarity": cosine_similarity,
    "mae": lambda x, y: sklearn.mean_absolute_error(y, x),
    "mse": lambda x, y: sklearn.mean_squared_error(y, x),
    "r2": lambda x, y: sklearn.r2_score(y, x),
    "rmse": lambda x, y: np.sqrt(sklearn.mean_squared_error(y, x)),
}


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("name", REGRESSION)
def test_regression_metric_matches_reference(name: str, width: int) -> None:
    outputs, targets = make_regression(width)
    expected = REGRESSION[name](outputs.double().numpy(), targets.double().numpy())
    assert_metric_equals(make_metric(name), outputs, targets, expected)
