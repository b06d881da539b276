"""What holds for every input, tried on inputs that hypothesis thinks up."""

from __future__ import annotations

from collections import Counter
from math import inf
from typing import Any

import pytest
from conftest import composed as compose
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_prompt import settings as dataset_settings

from sftlab.config import Config
from sftlab.dataset.splits import Labels, cap, draw
from sftlab.errors import ConfigError
from sftlab.eval.extract import compile_pattern, last, normalise_answer, read, strict
from sftlab.eval.lenient import lenient
from sftlab.eval.statistics import compare, compare_scores, wilson
from sftlab.report import preview
from sftlab.validation.keys import known_keys
from sftlab.validation.validate import validate

# The same examples each time: what fails here fails everywhere.
few = settings(max_examples=12, deadline=None, derandomize=True, database=None)
many = settings(few, max_examples=80)

# — reading answers —

WORDS = st.sampled_from(
    [
        "the answer is",
        "Answer:",
        "(A)",
        "B",
        "not",
        "or",
        "wait,",
        "\n",
        ". ",
        "?",
        "**",
        "\\boxed{",
        "}",
        "```",
        '"',
        "so",
    ]
)
ANSWERS = st.one_of(st.text(max_size=200), st.lists(st.one_of(WORDS, st.text(max_size=3)), max_size=20).map(" ".join))
OPTIONS = st.none() | st.dictionaries(st.sampled_from("ABCD"), st.text(max_size=10), max_size=4)
PATTERN = compile_pattern(r"(?i)the answer is\s*\(([A-Z])\)")


@many
@given(ANSWERS, st.sampled_from(["", "AB", "ABCD"]), OPTIONS)
def test_reading_never_raises_and_never_leaves_the_choices(text: str, choices: str, options: Any) -> None:
    found = read(text, PATTERN, choices, options)
    assert found == {
        "strict": strict(text, PATTERN),
        "last": last(text, PATTERN),
        "lenient": lenient(text, choices, options),
    }
    assert found["lenient"] is None or found["lenient"] in choices
    assert (found["strict"] is None) == (found["last"] is None)


@many
@given(st.text(max_size=200))
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert normalise_answer(normalise_answer(text)) == normalise_answer(text)


# — splitting —

SIZES = st.one_of(st.integers(0, 60), st.floats(0, 0.99)).map(float)


@st.composite
def labels(draw: Any) -> Labels:
    groups = draw(st.lists(st.none() | st.sampled_from("abcdefgh"), min_size=1, max_size=60))
    strata = draw(st.lists(st.none() | st.sampled_from("xyz"), min_size=len(groups), max_size=len(groups)))
    return Labels(groups, strata, strata)


@many
@given(labels(), st.tuples(SIZES, SIZES, SIZES), st.integers(0, 99), st.integers(3, 99))
def test_a_split_has_no_row_twice_and_no_group_apart(
    labels: Labels, sizes: tuple[float, float, float], seed: int, most: int
) -> None:
    rows, groups = len(labels.groups), labels.groups
    cfg = dataset_settings(split=dict(zip(("train", "validation", "test"), sizes, strict=True)), seed=seed)
    counts = [max(round(size * rows) if size < 1 else int(size), 1) for size in cfg.split.values() if size]
    try:
        made = draw({"all": labels}, cfg)
    except ConfigError:  # fewer rows than asked for, or than are left of whole groups
        assert sum(counts) + (not cfg.split["train"]) > rows or any(groups)
        return
    assert made == draw({"all": labels}, cfg)
    drawn = [row for split in made.values() for row in split.rows]
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(range(rows))
    homes = Counter(group for split in made.values() for group in {groups[row] for row in split.rows} if group)
    assert set(homes.values()) <= {1}
    capped = cap(made, most, seed, "dataset.max_rows")
    assert sum(len(split.rows) for split in capped.values()) == min(most, len(drawn))
    for name, split in capped.items():
        assert [row for row in made[name].rows if row in split.rows] == split.rows


# — statistics —


@few
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.none() | st.sampled_from("abcd")), min_size=1, max_size=40))
def test_a_comparison_turned_round_is_its_mirror_image(rows: list[tuple[bool, bool, str | None]]) -> None:
    a, b, groups = map(list, zip(*rows, strict=True))
    there = compare(a, b, groups=groups, alpha=0.05)
    back = compare(b, a, groups=groups, alpha=0.05)
    assert there.delta == pytest.approx((sum(b) - sum(a)) / len(rows))
    assert (there.gained, there.lost) == (back.lost, back.gained)
    assert there.p_value == pytest.approx(back.p_value)
    assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]))
    assert there.interval[0] - 1e-9 <= there.delta <= there.interval[1] + 1e-9
    assert (there.p_value < 0.05) == (not there.interval[0] <= 0 <= there.interval[1])
    assert there.interval[0] < there.interval[1]
    assert 0 <= there.p_value <= 1
    assert -1 <= there.interval[0] <= there.interval[1] <= 1


@few
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40))
def test_scores_stay_within_their_bounds(rows: list[tuple[float, float]]) -> None:
    a, b = map(list, zip(*rows, strict=True))
    found = compare_scores(a, b, groups=None, alpha=0.05)
    assert 0 <= found.p_value <= 1
    assert -1 <= found.interval[0] < found.interval[1] <= 1
    assert found.gained + found.lost <= len(rows)


@many
@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.001, 0.5))
def test_an_accuracy_lies_in_its_interval(counts: tuple[int, int], alpha: float) -> None:
    correct, n = counts
    low, high = wilson(correct, n, alpha)
    assert 0 <= low <= correct / n + 1e-12
    assert correct / n - 1e-12 <= high <= 1


@many
@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 500)), min_size=1, max_size=60), st.integers(1, 6000))
def test_token_counts_add_up_and_no_bar_hides_the_limit(lengths: list[tuple[int, int]], limit: int) -> None:
    found = preview.statistics(lengths, limit)
    assert found.rows == len(lengths) == sum(rows for _, _, rows in found.bins)
    assert found.supervised <= found.kept <= found.tokens
    assert found.left_out == sum(prompt >= limit for prompt, _ in lengths)
    assert found.cut == sum(prompt < limit < prompt + completion for prompt, completion in lengths)
    for low, high, rows in found.bins:
        assert (
            not rows
            or high <= limit
            or low > limit
            or not any(low <= p + c <= high and p + c > limit for p, c in lengths)
        )


# — the configuration —

KEYS = list(known_keys(Config))
NAMES = st.text(st.characters(categories=["L", "N"], include_characters="_"), min_size=1, max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(inf)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6
)


@pytest.fixture(scope="module")
def composed() -> Any:
    return compose("mode=report").model_dump()


@pytest.mark.slow
@settings(many, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(KEYS) | st.lists(NAMES, min_size=1, max_size=3).map(".".join), value=VALUES)
def test_any_value_under_any_key_is_taken_or_refused_by_name(composed: Any, key: str, value: Any) -> None:
    changed = OmegaConf.create(composed)
    OmegaConf.set_struct(changed, False)
    try:
        OmegaConf.update(changed, key, value, merge=False, force_add=True)
    except Exception:  # Hydra would not have composed it
        return
    if changed.get("mode") != "report":
        return  # data and models are read only then
    said = ""
    try:
        validate(changed)
    except ConfigError as error:
        said = str(error)
    assert not said or key.split(".")[0] in said
