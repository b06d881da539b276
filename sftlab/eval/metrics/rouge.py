"""ROUGE as a metric of the ``evaluate`` library: how much of a text is in another."""

import datasets
import evaluate


class Rouge(evaluate.Metric):  # type: ignore[misc]
    """F-measures of shared words (``rouge1``), pairs of words (``rouge2``) and longest common subsequences.

    ``rougeL`` takes the subsequence of the whole texts, ``rougeLsum`` joins those of their lines. By the
    ``rouge-score`` library, with the arguments and results of the hub's metric of this name.

    A word is a run of ASCII letters and digits, in lower case and unstemmed, as in the original ROUGE: "für" is
    the two words f and r. A text without any (an empty one, or one in another script) has the score 0, also
    against itself.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F-measures of ROUGE in [0, 1]: means, or with use_aggregator=False the scores of each row.",
            citation="",
            inputs_description="predictions and references: lists of strings of the same length.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        rouge_types: list[str] | None = None,
        use_aggregator: bool = True,
    ) -> dict[str, float] | dict[str, list[float]]:
        from rouge_score import rouge_scorer, tokenizers

        kinds = rouge_types or ["rouge1", "rouge2", "rougeL", "rougeLsum"]
        # The tokenizer that it has anyway: named, it is not announced in the log.
        scorer = rouge_scorer.RougeScorer(kinds, tokenizer=tokenizers.DefaultTokenizer(use_stemmer=False))
        found = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
        scores = {kind: [float(row[kind].fmeasure) for row in found] for kind in kinds}
        return {kind: sum(rows) / len(rows) for kind, rows in scores.items()} if use_aggregator else scores
