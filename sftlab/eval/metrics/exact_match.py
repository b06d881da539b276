"""Exact match as a metric of the ``evaluate`` library: the share of predictions equal to their reference."""

import datasets
import evaluate


class ExactMatch(evaluate.Metric):  # type: ignore[misc]
    """``exact_match`` over strings, case and white space included."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The share of predictions that equal their reference, character by character.",
            citation="",
            inputs_description="predictions and references: lists of strings of the same length.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        equal = [prediction == reference for prediction, reference in zip(predictions, references, strict=True)]
        return {"exact_match": sum(equal) / len(equal)}
