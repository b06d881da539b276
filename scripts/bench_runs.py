#!/usr/bin/env python
"""Measure size and time of the page of all runs (mode=runs) for fabricated runs.

    scripts/bench_runs.py                       1,000 runs with 200 test questions each
    scripts/bench_runs.py --questions 1273      as many as in the test set of MedQA
    scripts/bench_runs.py --keep FOLDER         write the runs into a folder and retain it

Exit code 1 if the page has 2 MB or more, or takes 5 s or more. The first page reads the predictions of all runs; the
next ones read only those of new runs, from a cache beside the page.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZE, SECONDS = 2_000_000, 5.0


def main() -> int:
    """Print size and seconds of the first and the second page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        outputs = arguments.keep or Path(scratch)
        sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "report"), str(ROOT / "tests")]
        importlib.import_module("fabricated_runs").fabricate(outputs, arguments.runs, arguments.questions)
        return max(measure(outputs, name) for name in ("first page", "next page"))


def measure(outputs: Path, name: str) -> int:
    """Write the page once; return 1 if it is too large or too slow."""
    start, cpu = time.monotonic(), time.process_time()
    from sftlab.report import index, runs
    from sftlab.runtime import ledger, listing

    store = outputs / "store"
    page = index.write(runs.rows(listing.runs(outputs, store), outputs), ledger.entries(store), outputs)
    seconds, size = time.monotonic() - start, page.stat().st_size
    print(f"{name}: {seconds:.2f} s ({time.process_time() - cpu:.2f} s of CPU time), {size / 1e6:.2f} MB")
    return int(seconds >= SECONDS or size >= SIZE)


if __name__ == "__main__":
    sys.exit(main())
