"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const table = document.querySelector(".runs");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const headers = [...table.tHead.rows[0].cells];
  const names = headers.map((cell) => cell.textContent);
  const controls = document.querySelector(".controls");
  const buttons = [...controls.querySelectorAll("button")];
  const order = controls.querySelector("select");
  const input = controls.querySelector("input");
  const status = document.querySelector("#runs .status");
  const comparison = document.querySelector(".comparison");
  const pickers = [...comparison.querySelectorAll("select")];
  const outcome = comparison.querySelector(".outcome");
  const numeric = { 1: 0, 6: 1, 7: 2 };  // columns that are ordered by a number: its place in data.sort
  const orders = { time: [1, -1], gain: [6, -1], cost: [7, -1], name: [0, 1] };
  let state = "", column = 1, direction = -1, timer = 0;

  // append() makes text nodes of strings, and nothing here parses markup.
  const make = (tag, name, ...inside) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    node.append(...inside);
    return node;
  };
  const cell = (number, at) => {
    const [own, small] = [...rows[number].cells[at].childNodes];
    return (own?.textContent ?? "") + (small?.nodeName === "SMALL" ? " (" + small.textContent + ")" : "");
  };
  const name = (number) => rows[number].cells[0].querySelector("a").textContent;
  const title = (number) => (data.places[number].startsWith(name(number)) ? "" : name(number) + ", ") + data.places[number];

  // ----------------------------------------------------------------- order and search

  const words = rows.map((row) => row.textContent.toLowerCase());
  rows.forEach((row, number) => { row.number = number; });

  function sort() {
    const key = numeric[column];
    const text = (row) => row.cells[column].textContent;
    const compare = key === undefined
      ? (a, b) => direction * text(a).localeCompare(text(b), "en", { numeric: true })
      : (a, b) => direction * (data.sort[a.number][key] - data.sort[b.number][key]);
    const empty = (row) => (key === undefined ? text(row) === "" : data.sort[row.number][key] === null);
    body.append(...[...rows].sort((a, b) => empty(a) - empty(b) || (empty(a) ? 0 : compare(a, b)) || a.number - b.number));
    headers.forEach((header, at) => {
      if (at === column) header.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      else header.removeAttribute("aria-sort");
    });
  }

  function filter() {
    const query = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, number) => {
      const fits = (!state || row.cells[8].className === state) && query.every((word) => words[number].includes(word));
      row.hidden = !fits;
      shown += fits;
    });
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.state === state));
    status.textContent = shown.toLocaleString("en") + " of " + rows.length.toLocaleString("en") + " runs";
  }

  headers.forEach((header, at) => {
    const button = make("button", "", header.textContent);
    button.type = "button";
    header.replaceChildren(button);
    button.addEventListener("click", () => {
      direction = at === column ? -direction : at in numeric ? -1 : 1;
      column = at;
      sort();
      remember();
    });
  });
  for (const button of buttons) {
    button.addEventListener("click", () => { state = button.dataset.state; filter(); });
  }
  order.addEventListener("change", () => { [column, direction] = orders[order.value]; sort(); remember(); });
  input.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(filter, 150); });

  // ----------------------------------------------------------------- two runs

  let chosen = [-1, -1];
  for (const [number, row] of rows.entries()) {
    const button = make("button", "choose", "compare");
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      const at = chosen.indexOf(number);
      if (at >= 0) chosen[at] = -1;
      else chosen[chosen[0] < 0 ? 0 : 1] = number;
      show();
      remember();
      if (at < 0 && chosen.every((own) => own >= 0)) document.getElementById("compare").scrollIntoView();
    });
    row.cells[0].prepend(button);
  }
  pickers.forEach((picker, at) => {
    picker.append(new Option("Choose a run", "-1"), ...rows.map((_, number) => new Option(rows[number].cells[1].textContent + "  " + title(number), number)));
    picker.addEventListener("change", () => { chosen[at] = Number(picker.value); show(); remember(); });
  });

  function show() {
    rows.forEach((row, number) => {
      const is = chosen.includes(number);
      row.classList.toggle("chosen", is);
      row.cells[0].firstChild.setAttribute("aria-pressed", String(is));
    });
    pickers.forEach((picker, at) => { picker.value = String(chosen[at]); });
    outcome.replaceChildren();
    if (chosen.some((number) => number < 0)) {
      outcome.append(make("p", "note", "Choose two runs here, or by “compare” in the table."));
      return;
    }
    const [a, b] = chosen;
    if (a === b) {
      outcome.append(make("p", "note", "Both are the same run. Choose another one."));
      return;
    }
    outcome.append(...verdict(a, b), make("h3", "", "Results"), results(a, b), ...configurations(a, b));
  }

  function grid(a, b, lines) {
    const head = make("tr", "", ...["", "First run", "Second run"].map((text) => make("th", "", text)));
    const part = make("tbody", "", ...lines.map(([key, ...values]) => {
      const header = make("th", "", key);
      header.scope = "row";
      return make("tr", "", header, ...values.map((value) => make("td", "", value)));
    }));
    return make("table", "", make("thead", "", head), part);
  }

  function results(a, b) {
    const lines = names.slice(1).map((label, at) => [label, cell(a, at + 1) || "–", cell(b, at + 1) || "–"]);
    return grid(a, b, [["Run", title(a), title(b)], ...lines]);
  }

  function configuration(number) {
    const row = data.configs[number];
    if (row === null) return null;
    const values = new Array(data.keys.length).fill(0);
    for (let at = 0; at < row.length; at += 2) values[row[at]] = row[at + 1];
    return values;
  }

  function configurations(a, b) {
    const both = [a, b].map(configuration);
    const missing = [a, b].filter((_, at) => both[at] === null);
    const heading = make("h3", "", "Configuration");
    if (missing.length) return [heading, make("p", "note", missing.map(title).join(" and ") + ": no configuration is recorded.")];
    const different = data.keys.map((_, at) => at).filter((at) => both[0][at] !== both[1][at]);
    const read = (at, side) => data.values[at][both[side][at]] ?? "–";
    const equal = data.keys.length - different.length;
    return [heading, make("p", "note", (different.length === 1 ? "1 key differs" : different.length + " keys differ") + ", " + equal + " are equal. Of a sweep, this is the configuration of the selected job."),
      ...(different.length ? [grid(a, b, different.map((at) => [data.keys[at], read(at, 0), read(at, 1)]))] : [])];
  }

  // ----------------------------------------------------------------- the paired verdict

  function right(number, n) {
    const bytes = Uint8Array.from(atob(data.answers[number][1]), (letter) => letter.charCodeAt(0));
    return Array.from({ length: n }, (_, at) => (bytes[at >> 3] >> (at & 7)) & 1);
  }

  // This is compare() of sftlab/eval/statistics/paired.py for independent questions with one answer each: mid-p of
  // McNemar's test, or the exact p if more than half of the answers changed.
  function chance(gained, lost, n) {
    const changed = gained + lost, less = Math.min(gained, lost);
    let term = -changed * Math.LN2, tail = 0;
    for (let k = 0; k < less; k++) {
      tail += Math.exp(term);
      term += Math.log(changed - k) - Math.log(k + 1);
    }
    return Math.min(1, 2 * tail + (changed > n / 2 ? 2 : 1) * Math.exp(term));
  }

  // Tango's score interval, which contains 0 if and only if p ≥ alpha.
  function tango(gained, lost, n, critical, significant) {
    const observed = gained - lost;
    const contains = (delta) => {
      const linear = -gained - lost + (2 * n - observed) * delta;
      const root = Math.sqrt(Math.max(linear ** 2 + 8 * n * lost * delta * (1 - delta), 0));
      const variance = n * ((root - linear) / (2 * n) + delta * (1 - delta));
      return Math.abs(observed - n * delta) - Math.min(0.5, n * Math.abs(delta) / 2) <= critical * Math.sqrt(Math.max(variance, 0));
    };
    const [low, high] = [-1, 1].map((limit) => {
      if (contains(limit)) return limit;
      let inside = observed / n, outside = limit;
      for (let step = 0; step < 44; step++) {
        const middle = (inside + outside) / 2;
        if (contains(middle)) inside = middle;
        else outside = middle;
      }
      return inside;
    });
    if (!significant) return [Math.min(low, 0), Math.max(high, 0)];
    return observed > 0 ? [Math.max(low, Number.MIN_VALUE), high] : [low, Math.min(high, -Number.MIN_VALUE)];
  }

  const points = (fraction) => {
    const digits = Math.abs(fraction) > 0 && Math.abs(fraction) < 0.0005 ? 2 : 1;
    const text = Math.abs(100 * fraction).toFixed(digits);
    return Number(text) === 0 ? "0.0" : (fraction < 0 ? "−" : "+") + text;
  };
  const probability = (p, alpha) => {
    if (p < 0.0001) return "p < 0.0001";
    const short = Number(p.toPrecision(2));
    return "p = " + (p < alpha && alpha <= short ? Number(p.toPrecision(4)) : short);  // 0.0496 must not read as 0.05
  };

  function command(a, b) {
    const files = [a, b].map((number) => data.outputs + "/" + data.places[number] + "/predictions/finetuned.jsonl");
    const task = data.judging[a]?.task ?? data.judging[b]?.task;
    const quoted = ("eval.predictions=[" + files.join(",") + "]").replaceAll("'", "'\\''");
    return make("pre", "box", "python -m sftlab mode=compare" + (task ? " eval.task=" + task : "") + " '" + quoted + "'");
  }

  function unpaired(a, b) {
    if ([a, b].every((number) => data.judging[number]?.scored)) return ["Scores are not in this page. This command compares the two:", command(a, b)];
    const lacking = [a, b].filter((number) => data.answers[number] === 0);
    if (lacking.length) return ["The answers cannot be compared: " + lacking.map(title).join(" and ") + (lacking.length > 1 ? " have" : " has") + " no stored answers that are right or wrong."];
    const tests = [data.tests[a], data.tests[b]];
    if (tests[0] !== tests[1] && !tests.includes(null)) return ["The answers cannot be compared: the runs have different test sets."];
    if ([a, b].some((number) => data.judging[number]?.repeats)) return ["An evaluation has several answers per question, of which the first is stored. This command compares the first answers:", command(a, b)];
    const left = [a, b].filter((number) => data.answers[number] === 1);
    if (left.length) return ["The page has the answers of the newest runs only, for its size. This command compares the two:", command(a, b)];
    if (data.answers[a][0] === data.answers[b][0]) return null;
    return [tests[0] !== null && tests[0] === tests[1]
      ? "The answers cannot be paired: the test sets have the same questions under other ids or in other groups."
      : "The answers cannot be compared: the runs have different test sets."];
  }

  function verdict(a, b) {
    const reason = unpaired(a, b);
    if (reason) return [make("h3", "", "No paired verdict"), make("p", "", reason[0]), ...reason.slice(1)];
    const [n, groups] = data.questions[data.answers[a][0]];
    const judging = [a, b].map((number) => data.judging[number] ?? {});
    const sides = [right(a, n), right(b, n)];
    const [base, tuned] = sides.map((side) => side.reduce((sum, own) => sum + own, 0));
    const gained = sides[1].filter((own, at) => own > sides[0][at]).length, lost = gained - tuned + base;
    const delta = (tuned - base) / n, score = tuned + " of " + n + " against " + base + " (" + points(delta) + " points";
    const changes = "; " + gained + " answers gained, " + lost + " lost.";
    const mute = judging.some((own) => own.mute);
    const unjudged = "The models cannot be judged.", unread = mute ? " No answer was extracted for one model." : "";
    if (groups < n) {
      return [make("h3", "inconclusive", mute ? unjudged : "Test by the command below."), make("p", "", score + ")" + changes + unread),
        make("p", "note", "Fine-tuned models on the same questions, from the stored answers of both runs. The questions are of " + groups + " groups, so they are not independent. This command computes p and the interval for them; it reads the answers again, by its own eval keys:"),
        command(a, b)];
    }
    const [level, critical] = judging.map((own) => own.level ?? data.level).reduce((one, other) => (other[0] > one[0] ? other : one));
    const alpha = Number((1 - level).toFixed(12)), p = chance(gained, lost, n);
    const [low, high] = tango(gained, lost, n, critical, p < alpha);
    const kind = mute || p >= alpha ? "inconclusive" : delta > 0 ? "better" : "worse";
    const headline = mute ? unjudged : p >= alpha ? "No difference is shown." : "The second run’s model is " + kind + ".";
    const numbers = score + ", " + Number((100 * level).toFixed(6)) + " % interval " + points(low) + " to " + points(high) + ", " + probability(p, alpha) + ")";
    const test = gained + lost > n / 2 ? "the exact McNemar test" : "the mid-p McNemar test";
    return [make("h3", kind, headline), make("p", "", numbers + changes + unread),
      make("p", "note", "Fine-tuned models on the same questions, from the stored answers of both runs: " + test + " and Tango’s interval. p is not adjusted for the number of pairs that you look at. This command reads the answers again, by its own eval keys:"),
      command(a, b)];
  }

  // The address has the choice, so that it can be shared as a link: #first=demo/1&second=demo/2&sort=gain
  function remember() {
    const choice = new URLSearchParams();
    chosen.forEach((number, at) => { if (number >= 0) choice.set(["first", "second"][at], data.places[number]); });
    const named = Object.keys(orders).find((key) => orders[key][0] === column && orders[key][1] === direction);
    if (named && named !== "time") choice.set("sort", named);
    order.value = named ?? "";
    try {
      history.replaceState(null, "", "#" + choice);
    } catch {
      // Some viewers of mail attachments forbid a change of address; the page works without it.
    }
  }

  function follow() {
    const choice = new URLSearchParams(location.hash.slice(1));
    if (!["first", "second", "sort"].some((key) => choice.has(key))) return;
    chosen = ["first", "second"].map((key) => data.places.indexOf(choice.get(key) ?? ""));
    if (choice.get("sort") in orders) {
      [column, direction] = orders[choice.get("sort")];
      order.value = choice.get("sort");
    }
    sort();
    show();
    if (chosen.every((number) => number >= 0)) document.getElementById("compare").scrollIntoView();
  }

  addEventListener("hashchange", follow);
  controls.hidden = comparison.hidden = false;
  filter();
  sort();
  show();
  follow();
})();
