"""ROUGE-L as a metric of the ``evaluate`` library: how much of a text is in another, in the same order."""

import datasets
import evaluate


class Rouge(evaluate.Metric):  # type: ignore[misc]
    """ROUGE-L, the F-measure of the longest common subsequence of words, by the ``rouge-score`` library.

    A word is a run of ASCII letters and digits, in lower case and unstemmed, as in the original ROUGE.
    A text without any (an empty one, or one in another script) has the score 0, also against itself.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F-measure of the longest common subsequence of words, the mean and of each row, in [0, 1].",
            citation="",
            inputs_description="predictions and references: lists of strings of the same length.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float | list[float]]:
        from rouge_score import rouge_scorer

        scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
        scores = [
            float(scorer.score(reference, prediction)["rougeL"].fmeasure)
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        return {"rougeL": sum(scores) / len(scores), "scores": scores}
