"""The generated list of names in TRL and transformers is that of the installed versions."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "library_names.py"


@pytest.mark.smoke  # imports trl
def test_the_list_of_names_is_that_of_the_installed_libraries() -> None:
    script = runpy.run_path(str(SCRIPT))
    assert script["FILE"].read_text("utf-8") == script["text"](), "run python scripts/library_names.py"
