#!/usr/bin/env python
"""A long sweep of tiny jobs, watched from outside: does the parent grow, does anything stay behind, does it slow down?

    scripts/soak.py              200 jobs (about half an hour on two cores)
    scripts/soak.py --jobs 20

Prints the first and the last tenth of the jobs side by side, and what is left when the sweep has ended; exit code 1
if memory or open files of the parent grew by more than a tenth, or anything was left.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

SETTINGS = [
    *("model=tiny_random", "mode=train", "dataset.max_rows=24", "tracking=none", "train.max_length=768"),
    *("train.num_train_epochs=1", "hydra.sweep.dir=swept"),
]


@dataclass(frozen=True)
class Look:
    """The parent at one moment: memory in MiB, open files, and how many jobs it has finished."""

    memory: float
    files: int
    jobs: int


def look(process: int, folder: Path) -> Look:
    """Read it off /proc."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return Look(memory, len(os.listdir(f"/proc/{process}/fd")), len(finished(folder)))


def finished(folder: Path) -> list[Path]:
    """The records of the jobs that have ended."""
    files = folder.glob("swept/*/job.json")
    return [file for file in files if json.loads(file.read_text("utf-8"))["status"] != "running"]


def of_group(group: int) -> list[int]:
    """The processes of a process group that are still there."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            values = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(values[2]) == group and values[0] != "Z":
            found.append(int(entry.name))
    return found


def main() -> None:
    """Run the sweep and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200, help="how many")
    count = parser.parse_args().jobs
    with tempfile.TemporaryDirectory(prefix="soak_") as place:
        folder = Path(place)
        values = ",".join(f"{1e-4 + number * 1e-6:.6f}" for number in range(count))
        command = [sys.executable, "-m", "sftlab", "-m", *SETTINGS, f"train.learning_rate={values}"]
        temporary = folder / "tmp"
        temporary.mkdir()
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "TMPDIR": str(temporary)},
        )  # fmt: skip
        looks: list[Look] = []
        while process.poll() is None:
            try:
                looks.append(look(process.pid, folder))
            except (OSError, ValueError):
                continue  # between two states
            time.sleep(0.5)
        left = of_group(process.pid)
        ends = sorted(file.stat().st_mtime for file in finished(folder))
        run = json.loads((folder / "swept" / "run.json").read_text("utf-8"))
        partial = list(folder.glob("outputs/store/*/*.partial"))
        # torch makes an empty folder of this name, the same in all processes of a user.
        scratch = [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]
    tenth = max(1, count // 10)
    seconds = [end - begin for begin, end in pairwise(ends)]
    early = [one for one in looks if 1 <= one.jobs <= tenth]
    late = [one for one in looks if count - tenth <= one.jobs < count]
    print(f"{count} jobs, status {run['status']}, exit code {process.returncode}")
    print(f"{'':28} {'first tenth':>12} {'last tenth':>12}")
    rows = [
        ("memory of the parent, MiB", [one.memory for one in early], [one.memory for one in late]),
        ("open files of the parent", [float(one.files) for one in early], [float(one.files) for one in late]),
        ("seconds a job", seconds[:tenth], seconds[-tenth:]),
    ]
    grown = False
    for name, first, last in rows:
        print(f"{name:28} {median(first):12.1f} {median(last):12.1f}")
        grown |= name != "seconds a job" and median(last) > 1.1 * median(first)
    print(f"left behind: {len(left)} processes, {len(partial)} unfinished stages, temporary files: {scratch or 'none'}")
    sys.exit(bool(grown or left or partial or scratch or process.returncode))


if __name__ == "__main__":
    main()
