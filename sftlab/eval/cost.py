"""What answers cost: tokens of prompts and answers, seconds per answer, and a price."""

from __future__ import annotations

from collections.abc import Sequence

from sftlab.config import PriceConfig
from sftlab.eval.stage import Generated
from sftlab.results import Cost


def cost(generated: Generated, repeats: int, prompts: Sequence[int] | None, price: PriceConfig | None) -> Cost:
    """Count the tokens of all repeats, and estimate time and price.

    Args:
        generated: The answers.
        repeats: How often the test set was generated.
        prompts: Tokens of each prompt; None if an endpoint counts them.
        price: The price of a million tokens.
    """
    rows = [row for repeat in range(repeats) for row in generated.rows(repeat)]
    counted = [row.prompt_tokens for row in rows] if prompts is None else [*prompts] * repeats
    known = [tokens for tokens in counted if tokens is not None]
    asked = sum(known) if len(known) == len(rows) else None
    answered = sum(row.tokens for row in rows)
    pace = generated.seconds_per_token
    total = None
    if price is not None and asked is not None:
        total = (asked * price.input + answered * price.output) / 1e6
    return Cost(
        answers=len(rows),
        prompt_tokens=asked,
        completion_tokens=answered,
        seconds_per_answer=None if pace is None else pace * answered / len(rows),
        price=None if total is None else 1000 * total / len(rows),
    )
