from __future__ import annotations

import re

from sftlab.report.schema import PAGE, page


def test_the_schema_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == page(), "run scripts/schema"


def test_every_record_that_the_page_mentions_has_a_section() -> None:
    text = page()
    sections = {name.lower() for name in re.findall(r"^## (\w+)$", text, re.MULTILINE)}
    assert {"runrecord", "jobrecord", "candidate", "verdict"} <= sections
    assert set(re.findall(r"\(#(\w+)\)", text)) <= sections
