"""The locks: every package that pyproject.toml asks for is pinned to a version that it accepts."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
ON_TOP_OF = {"cpu": ("torch-cpu",), "cuda": (), "docs": (), "sql": ()}  # other locks that a lock is installed with


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "locks" / f"{name}.lock").read_text("utf-8")
    return dict(re.findall(r"^([a-z0-9-]+)==([^ ]+) \\$", text, re.MULTILINE))


@pytest.mark.parametrize("extra", sorted(EXTRAS.keys() - {"dev", "endpoint"}))  # dev is in two locks, openai in both
def test_a_lock_fits_its_extra(extra: str) -> None:
    locked = {
        name: version for lock in (*ON_TOP_OF.get(extra, ("cpu",)), extra) for name, version in pins(lock).items()
    }
    asked = EXTRAS[extra]
    if extra in ("cpu", "cuda"):
        asked = [*asked, *PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["endpoint"]]
    for requirement in map(Requirement, asked):
        name = requirement.name.lower().replace("_", "-")
        assert locked[name] in requirement.specifier, requirement
