"""``index.html`` and the table of mode=runs, from fabricated runs."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from fabricated_runs import fabricate
from filelock import FileLock
from test_page import CHROMIUM, HOSTILE, Reader, browse, save

from sftlab.config import RunsConfig
from sftlab.eval.statistics import compare
from sftlab.records import Prediction
from sftlab.report import index
from sftlab.report.runs import Row, rows, selected, show
from sftlab.report.text import points, span
from sftlab.runtime import ledger, listing
from sftlab.runtime.run import Run
from sftlab.runtime.store import Store

GOLDEN = Path(__file__).parents[1] / "golden"
EVERY = {"outputs": "outputs", "sort": "started", "limit": None}
EVERY |= dict.fromkeys(("name", "data", "model", "status", "verdict", "since"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty runs; tests that change a run copy the folder."""
    outputs = tmp_path_factory.mktemp("many") / "outputs"
    fabricate(outputs, 60, questions=20)
    return outputs


def listed(outputs: Path) -> list[Row]:
    return rows(listing.runs(outputs, outputs / "store"), outputs)


def page(outputs: Path) -> str:
    return index.render(listed(outputs), ledger.entries(outputs / "store"), outputs)


def embedded(text: str) -> Any:
    return json.loads(text[text.index('id="data">') + 10 : text.index("</script>", text.index('id="data">'))])


def by_place(outputs: Path) -> dict[str, Row]:
    return {row.place: row for row in listed(outputs)}


# ------------------------------------------------------------------- which runs, and their states


def test_runs_in_every_state_are_listed(tmp_path: Path) -> None:
    running = Run.start(tmp_path / "running", name="x", mode="train", seed=1, command="")
    Run.start(tmp_path / "killed", name="x", mode="train", seed=1, command="")
    Run.start(tmp_path / "failed", name="x", mode="train", seed=1, command="").finish("failed", "the disk is full")
    Run.start(tmp_path / "in/success", name="x", mode="train", seed=1, command="").finish("success")
    damaged = {"truncated": b'{"id": "1", "sta', "empty": b"", "list": b"[]", "newer": b'{"schema_version": 99}',
               "bytes": b"\xff\xfe", "deep": b"[" * 100_000, "time": None}  # fmt: skip
    for name, content in damaged.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_bytes(content or b"")
    record = json.loads((tmp_path / "killed/run.json").read_text("utf-8"))
    save(tmp_path / "time", {**record, "started": "soon"})
    (tmp_path / "folder/run.json").mkdir(parents=True)  # a folder of this name is not a run
    with FileLock(running.folder / ".lock"):
        states = {place: row.run.state for place, row in by_place(tmp_path).items()}
    assert states == {"running": "running", "killed": "killed", "failed": "failed", "in/success": "success",
                      **dict.fromkeys(damaged, "damaged")}  # fmt: skip
    assert {place: row.run.error for place, row in by_place(tmp_path).items() if place in ("failed", "newer")} == {
        "failed": "the disk is full",
        "newer": "run.json: schema_version=99 is not supported (supported: 1 and 2)",
    }
    text = Reader(page(tmp_path)).text
    assert "the disk is full" in text
    assert text.count("damaged run.json:") == len(damaged)


@pytest.mark.parametrize("name", ["demo", "sweep", "rouge", "plan", "compare", "compare_rouge"])
def test_runs_of_schema_version_1_are_listed(tmp_path: Path, name: str) -> None:
    old = json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))
    assert old["schema_version"] == 1
    (tmp_path / "old").mkdir()
    save(tmp_path / "old", {"started": "2026-01-02T03:04:05+00:00", **old})
    (row,) = listed(tmp_path)
    assert row.run.state == old["status"]
    compared = (old.get("evaluation") or {}).get("comparison")
    assert row.gain == (points(compared["delta"]) if compared else "")
    assert f">{old['experiment']}</a>" in page(tmp_path)


def test_registered_runs_elsewhere_are_listed_and_those_of_other_machines_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outputs, store = tmp_path / "outputs", Store(tmp_path / "outputs" / "store")
    for folder in (outputs / "a", tmp_path / "else where" / "b", tmp_path / "gone", tmp_path / "far"):
        Run.start(folder, name="x", mode="train", seed=1, command="").finish("success")
        store.register(folder)
    (tmp_path / "else where" / "b" / "report.html").touch()
    shutil.rmtree(tmp_path / "gone")
    shutil.rmtree(tmp_path / "far")
    entry = next(file for file in (store.root / ".runs").iterdir() if "far" in file.read_text("utf-8"))
    entry.write_text(json.dumps({**json.loads(entry.read_text("utf-8")), "host": "another"}), "utf-8")
    assert set(by_place(outputs)) == {"a", "../else where/b"}
    assert "1 runs of other machines are not listed" in caplog.text
    assert 'href="../else%20where/b/report.html"' in page(outputs)
    shutil.copytree(outputs, tmp_path / "copy")
    assert set(by_place(tmp_path / "copy")) == {"a", "../else where/b"}  # and not the run that a is a copy of


def test_links_hold_after_a_move(tmp_path: Path, made: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(made, moved)
    index.write(listed(moved), ledger.entries(moved / "store"), moved)
    moved = moved.rename(tmp_path / "again")
    text = (moved / "index.html").read_text("utf-8")
    links = [attributes["href"] for tag, attributes in Reader(text).elements if tag == "a"]
    files = [link for link in links if link and not link.startswith("#")]
    assert len(files) > 100
    assert all((moved / unquote(link)).exists() for link in files)
    assert "http" not in text.replace("http-equiv", "")


def test_the_results_and_the_configuration_are_those_of_the_selected_job(tmp_path: Path, made: Path) -> None:
    folder = next(row for row in listed(made) if row.run.state == "success").run.folder
    shutil.copytree(folder, tmp_path / "sweep")
    record = json.loads((tmp_path / "sweep/run.json").read_text("utf-8"))
    job = json.loads((tmp_path / "sweep/job.json").read_text("utf-8"))
    (tmp_path / "sweep/job.json").unlink()
    for number in range(3):
        (tmp_path / f"sweep/{number}").mkdir()
        own = {**job, "number": number, "times": {"train": 100.0, "tokens": 5.0}}
        own |= {"config": {**job["config"], "seed": 100 + number}, "receipt": {**job["receipt"], "num_processes": 2}}
        (tmp_path / f"sweep/{number}/job.json").write_text(json.dumps(own), "utf-8")
    summary = record["jobs"][0]
    record["jobs"] = [{**summary, "job": number} for number in range(3)]
    record["selection"]["job"] = 2
    record["times"] = {"baseline": 7.0, "train": 100.0}
    save(tmp_path / "sweep", record)
    (row,) = listed(tmp_path)
    assert (row.run.jobs, row.run.config["seed"]) == (3, "102")
    assert row.run.cost == 3 * (2 * 100 + 5) + 7
    assert row.checkpoint.startswith("job 2, epoch 2, loss 1.25")


def test_checkpoints_within_an_epoch_and_the_untrained_model(tmp_path: Path, made: Path) -> None:
    template = next(row for row in listed(made) if row.run.state == "success").run.folder
    for name, place in {"within": (40, 0.4), "untrained": (0, 0.0)}.items():
        shutil.copytree(template, tmp_path / name)
        record = json.loads((tmp_path / name / "run.json").read_text("utf-8"))
        record["selection"] |= dict(zip(("step", "epoch"), place, strict=True))
        if name == "untrained":
            record |= {"evaluation": None, "merge": None, "skipped": "step 0, the untrained model, is selected"}
        save(tmp_path / name, record)
    found = by_place(tmp_path)
    assert found["within"].checkpoint.startswith("epoch 0.4, loss ")
    assert found["untrained"].checkpoint.startswith("untrained model, loss ")
    assert found["untrained"].outcome == ""


# ------------------------------------------------------------------- filters


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"name": "MEDQA"}, lambda row: row.name == "medqa"),
        ({"name": "own*"}, lambda row: row.name == "own-questions"),
        ({"name": "demo/2026-11-28_0"}, lambda row: row.place.startswith("demo/2026-11-28_0")),
        ({"model": "gemma"}, lambda row: "gemma" in row.model),
        ({"model": "google/*-4b-*"}, lambda row: row.model == "gemma-3-4b-it"),
        ({"data": "questions.jsonl"}, lambda row: row.data == "questions"),
        ({"status": "failed"}, lambda row: row.run.state == "failed"),
        ({"status": "damaged"}, lambda row: row.run.record is None),
        ({"verdict": "better", "name": "demo"}, lambda row: (row.outcome, row.name) == ("better", "demo")),
        ({"since": "2026-11-28T06:00"}, lambda row: row.run.started >= datetime(2026, 11, 28, 6, tzinfo=UTC)),
        ({"since": "999999h"}, lambda row: True),
        ({"since": "0h"}, lambda row: row.run.started > datetime.now(UTC)),
    ],
)
def test_filters(made: Path, filters: dict[str, str], expected: Any) -> None:
    every = listed(made)
    chosen = selected(every, RunsConfig.model_validate(EVERY | filters))
    assert chosen == [row for row in every if expected(row)]
    assert chosen or filters == {"since": "0h"}


def test_order(made: Path) -> None:
    every = listed(made)
    assert every == sorted(every, key=lambda row: row.run.started, reverse=True)
    gains = [row.comparison.delta for row in selected(every, RunsConfig.model_validate(EVERY | {"sort": "gain"}))
             if row.comparison is not None]  # fmt: skip
    costs = [row.run.cost or 0 for row in selected(every, RunsConfig.model_validate(EVERY | {"sort": "cost"}))]
    assert gains == sorted(gains, reverse=True)
    assert costs == sorted(costs, reverse=True)


def test_the_table_in_the_terminal(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = listed(made)
    show(every, 2, 70)
    printed = capsys.readouterr().out
    assert printed.count("success") == 2, printed
    assert "60 of 70 runs match the filters; the first 2 are shown (runs.limit)" in printed
    assert every[0].gain in printed
    show([], None, 0)
    assert capsys.readouterr().out == "0 runs\n"


# ------------------------------------------------------------------- the page


def test_the_size_of_the_page(made: Path) -> None:
    """Of 60 runs in proportion: 1,000 runs must stay below 2 MB with the answers of large test sets."""
    text = page(made)
    whole, once = len(text.encode()), len(page(made.parent / "none").encode())
    answers = sum(len(own[1]) for own in embedded(text)["answers"] if isinstance(own, list))
    assert once + (whole - once - answers) * 1000 / 60 + index.ANSWERS < 2_000_000


def test_the_configurations_can_be_restored(made: Path) -> None:
    every, data = listed(made), embedded(page(made))
    for number, row in enumerate(every):
        differing = data["configs"][number]
        if not row.run.config:
            assert differing is None
            continue
        chosen = dict(zip(differing[::2], differing[1::2], strict=True))
        values = {key: data["values"][at][chosen.get(at, 0)] for at, key in enumerate(data["keys"])}
        assert {key: value for key, value in values.items() if value is not None and len(value) < index.VALUE} == {
            key: value for key, value in row.run.config.items() if len(value) < index.VALUE
        }


def test_the_answers_of_many_questions_are_left_out(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "ANSWERS", 20)
    kinds = [type(own) for own in embedded(page(made))["answers"]]
    assert kinds.count(list) == 5
    assert 1 in embedded(page(made))["answers"]


def test_answers_are_read_again_only_if_they_changed(made: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    shutil.copytree(made, outputs)
    before = page(outputs)
    row = next(row for row in listed(outputs) if row.run.state == "success")
    file = row.run.folder / "predictions" / "finetuned.jsonl"
    content, stamp = file.read_text("utf-8"), file.stat()
    file.write_text(content.replace('"correct": true', '"correct": null'), "utf-8")
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert embedded(page(outputs)) == embedded(before)
    os.utime(file)
    assert embedded(page(outputs)) != embedded(before)
    (outputs / ".answers.json").write_text('{"version": 1, "answers": 3}', "utf-8")
    file.write_text(content, "utf-8")
    assert embedded(page(outputs)) == embedded(before)
    file.write_text("{", "utf-8")
    assert embedded(page(outputs))["answers"][embedded(before)["places"].index(row.place)] == 0


def test_the_ledger_leads_to_the_run_that_judged_a_model_first(made: Path) -> None:
    folder = made / "store/.ledger" / f"{0:016x}"
    text = page(made)
    assert Reader(text).text.count("Models judged on") == 3
    first = next(row for row in listed(made) if row.run.record is not None and row.run.record.id == "0")
    assert f'<li value="1"><a href="{quote(first.place)}/report.html">demo</a> 2026-11-28</li>' in text
    entry = (folder / "2.json").read_text("utf-8")
    try:
        (folder / "2.json").write_text("{", "utf-8")
        assert '<li value="2"><a' in page(made)
        assert len(ledger.entries(made / "store")[folder.name]) == 20
    finally:
        (folder / "2.json").write_text(entry, "utf-8")


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    fabricate(tmp_path, 3, questions=4)
    hostile = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(next((tmp_path / "demo").iterdir()), hostile)
    record = json.loads((hostile / "run.json").read_text("utf-8"))
    save(hostile, record | {"experiment": HOSTILE, "error": f"{HOSTILE} \udc80", "status": "failed"})
    job = json.loads((hostile / "job.json").read_text("utf-8"))
    job["config"]["dataset"]["user"] = HOSTILE
    (hostile / "job.json").write_text(json.dumps(job), "utf-8")
    text = page(tmp_path)
    text.encode("utf-8")
    reader = Reader(text)
    assert "<img" not in text
    assert len(reader.scripts) == 2
    assert (
        HOSTILE in json.loads(reader.scripts[0])["values"][json.loads(reader.scripts[0])["keys"].index("dataset.user")]
    )


CHANGES = [(0, 1), (5, 0), (0, 6), (14, 3), (30, 28), (55, 5), (80, 40), (12, 4)]
"""Answers gained and lost of 120: one-sided ones, by which (5, 0) is significant only by mid-p, and more than half."""


@pytest.mark.smoke  # a browser
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH")
@pytest.mark.timeout(120)
def test_two_runs_in_a_browser(tmp_path: Path) -> None:
    fabricate(tmp_path, 42, questions=120)
    every = [row for row in listed(tmp_path) if row.run.state == "success"]
    other = next(row for row in every if row.name == "medqa")
    repeated, grouped, another, base, *changed = (row for row in every if row.name == "demo")
    right = {base.place: [number < 40 for number in range(120)]}
    for row, (gained, lost) in zip(changed, CHANGES, strict=False):
        right[row.place] = [lost <= number < 40 + gained for number in range(120)]
    for row in (repeated, base, *changed[: len(CHANGES)]):
        file = row.run.folder / "predictions" / "finetuned.jsonl"
        sides = zip(Prediction.read(file), right.get(row.place, right[base.place]), strict=True)
        Prediction.write(file, [replace(own, correct=correct, group=None) for own, correct in sides])
    strict, repeats = changed[len(CHANGES) - 1], {"values": [0.5, 0.7], "changed": 9, "noise": 0.2, "forced_noise": 0.1}
    for row, values in ((strict, {"level": 0.99}), (repeated, {"repeats": repeats})):
        record = json.loads((row.run.folder / "run.json").read_text("utf-8"))
        record["evaluation"]["finetuned"] |= values
        save(row.run.folder, record)
    path = index.write(listed(tmp_path), ledger.entries(tmp_path / "store"), tmp_path)

    pairs = [(base, row) for row in changed[: len(CHANGES)]]
    *judged, of_groups, of_repeats, of_others = outcomes(
        path, [*pairs, (grouped, another), (base, repeated), (base, other)]
    )
    for text, (_, row), changes in zip(judged, pairs, CHANGES, strict=True):
        level = 0.99 if row is strict else 0.95
        expected = compare(right[base.place], right[row.place], groups=None, alpha=1 - level)
        assert (expected.gained, expected.lost) == changes
        score = (
            f"{sum(right[row.place])} of 120 against 40 ({points(expected.delta)} points, {100 * level:g} % interval "
        )
        probability = re.search(r"p [=<] [\d.e-]*\d", expected.verdict.reason)
        assert probability is not None
        assert (
            f"{score}{span(expected.interval)}, {probability[0]}); {changes[0]} answers gained, {changes[1]} lost"
            in text
        )
        headline = {"inconclusive": "No difference is shown"}
        headline |= {outcome: f"model is {outcome}" for outcome in ("better", "worse")}
        assert headline[expected.verdict.outcome] in text
    before, after = (Prediction.read(row.run.folder / "predictions/finetuned.jsonl") for row in (grouped, another))
    sides = [[row.correct for row in side] for side in (before, after)]
    expected = compare(sides[0], sides[1], groups=[row.group for row in before], alpha=0.05)
    assert f"({points(expected.delta)} points); {expected.gained} answers gained, {expected.lost} lost." in of_groups
    assert "of 3 groups" in of_groups
    for text in (of_groups, of_repeats):
        assert "p =" not in text
        assert "mode=compare" in text
    assert "several answers per question" in of_repeats
    assert "answers gained" not in of_repeats
    assert "different test sets" in of_others

    address = f"{path.as_uri()}#first={quote(base.place, safe='')}&second={quote(strict.place, safe='')}&sort=gain"
    shown = browse(tmp_path, address)
    shown = re.sub(r"<[^>]+>", " ", shown[shown.index('class="outcome"') : shown.index('id="test-sets"')])
    assert "12 answers gained, 4 lost" in shown
    assert "train.learning_rate" in shown or "seed" in shown


def outcomes(path: Path, pairs: list[tuple[Row, Row]]) -> list[str]:
    """What the page shows of each pair of runs, by one start of a browser."""
    chosen = [[list(by_place(path.parent)).index(row.place) for row in pair] for pair in pairs]
    choose = f"""<script>addEventListener("load", () => {{
      const page = document.querySelector("iframe").contentDocument;
      const texts = {json.dumps(chosen)}.map((pair) => {{
        page.querySelectorAll(".comparison select").forEach((picker, at) => {{
          picker.value = pair[at];
          picker.dispatchEvent(new Event("change"));
        }});
        return page.querySelector(".outcome").textContent;
      }});
      document.body.append(Object.assign(document.createElement("pre"), {{ textContent: JSON.stringify(texts) }}));
    }})</script>"""
    frame = f'<iframe srcdoc="{html.escape(path.read_text("utf-8"))}"></iframe>'
    (path.parent / "frame.html").write_text(f"<!doctype html><body>{frame}{choose}", "utf-8")
    shown = browse(path.parent, (path.parent / "frame.html").as_uri())
    texts = json.loads(html.unescape(shown[shown.rindex("<pre>") + 5 : shown.rindex("</pre>")]))
    assert isinstance(texts, list)
    return texts


@pytest.mark.smoke  # a browser
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH")
@pytest.mark.timeout(120)
def test_order_and_width_in_a_browser(tmp_path: Path, made: Path) -> None:
    outputs = tmp_path / "outputs"
    shutil.copytree(made, outputs)
    path = index.write(listed(outputs), ledger.entries(outputs / "store"), outputs)
    ordered = browse(tmp_path, f"{path.as_uri()}#sort=gain")
    gains = [float(text.replace("−", "-")) for text in re.findall(r"<td>([+−]?\d+\.\d+)<small>", ordered)]
    assert len(gains) > 40
    assert gains == sorted(gains, reverse=True)
    measure = """<script>addEventListener("load", () => {
      const page = document.querySelector("iframe").contentDocument;
      for (const fold of page.querySelectorAll("details")) fold.open = true;
      for (const button of [...page.querySelectorAll(".choose")].slice(0, 2)) button.click();
      const parts = [...page.querySelectorAll("table, pre")].map((part) => part.getBoundingClientRect().right);
      document.body.innerHTML += "<pre>" + [page.documentElement.scrollWidth, Math.max(...parts), parts.length];
    })</script>"""
    frame = f'<iframe width="390" height="800" srcdoc="{html.escape(path.read_text("utf-8"))}"></iframe>'
    (tmp_path / "frame.html").write_text(
        f"<!doctype html><style>iframe {{ border: 0 }}</style><body>{frame}{measure}", "utf-8"
    )
    shown = browse(tmp_path, (tmp_path / "frame.html").as_uri())
    width, right, parts = map(float, shown[shown.rindex("<pre>") + 5 : shown.rindex("</pre>")].split(","))
    assert width <= 390
    assert right <= 390 - 16
    assert parts == 4  # runs, test sets, results and configuration
