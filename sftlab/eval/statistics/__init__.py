"""Is the fine-tuned model better than its base, or is the difference chance?

Both models answer the same questions, so every test is paired. Accuracies, differences and intervals are fractions
(0.045, not 4.5), except in the words of a verdict, which are in points. docs/statistics.md has the formulas, their
sources, and how often they are wrong in simulations.
"""

from sftlab.eval.statistics.agreement import at_equal_length, kappa
from sftlab.eval.statistics.groups import FEW
from sftlab.eval.statistics.limits import Limits, deciding_p, margin_to_rule_out
from sftlab.eval.statistics.macro import Labelled, macro_f1, macro_f1_difference
from sftlab.eval.statistics.means import compare_scores, differences, mean_interval
from sftlab.eval.statistics.multiple import fewest, holm
from sftlab.eval.statistics.paired import compare
from sftlab.eval.statistics.power import detectable_mean_difference, minimal_detectable_difference
from sftlab.eval.statistics.proportions import accuracy, subgroup, wilson
from sftlab.eval.statistics.repeats import answers_per_question, averages, changed, majority, noise, pass_at
from sftlab.eval.statistics.ties import ties
from sftlab.eval.statistics.trainings import MeanGain, over_trainings

__all__ = [
    "FEW",
    "Labelled",
    "Limits",
    "MeanGain",
    "accuracy",
    "answers_per_question",
    "at_equal_length",
    "averages",
    "changed",
    "compare",
    "compare_scores",
    "deciding_p",
    "detectable_mean_difference",
    "differences",
    "fewest",
    "holm",
    "kappa",
    "macro_f1",
    "macro_f1_difference",
    "majority",
    "margin_to_rule_out",
    "mean_interval",
    "minimal_detectable_difference",
    "noise",
    "over_trainings",
    "pass_at",
    "subgroup",
    "ties",
    "wilson",
]
