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

  function random(seed) {  // mulberry32
    return () => {
      seed = (seed + 0x6d2b79f5) | 0;
      let value = Math.imul(seed ^ (seed >>> 15), seed | 1);
      value ^= value + Math.imul(value ^ (value >>> 7), value | 61);
      return ((value ^ (value >>> 14)) >>> 0) / 4294967296;
    };
  }

  function right(number, n) {
    const bytes = Uint8Array.from(atob(data.answers[number][1]), (letter) => letter.charCodeAt(0));
    return Array.from({ length: n }, (_, at) => (bytes[at >> 3] >> (at & 7)) & 1);
  }

  function quantile(sorted, share) {
    const place = share * (sorted.length - 1), low = Math.floor(place);
    return sorted[low] + (place - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
  }

  // The exact McNemar test: twice the smaller tail of a fair coin.
  function mcnemar(gained, lost) {
    const n = gained + lost;
    let term = -n * Math.LN2, tail = 0;
    for (let k = 0; k <= Math.min(gained, lost); k++) {
      tail += Math.exp(term);
      term += Math.log(n - k) - Math.log(k + 1);
    }
    return Math.min(1, 2 * tail);
  }

  // As statistics.py does: a percentile bootstrap of whole groups, and the exact McNemar test, or random sign flips of
  // the groups where rows share one.
  function paired(differences, groups, alpha) {
    const n = differences.length, draw = random(42);
    const gained = differences.filter((own) => own > 0).length, lost = differences.filter((own) => own < 0).length;
    const clusters = [];
    groups.forEach((group, at) => {
      clusters[group] ??= [0, 0];
      clusters[group][0] += differences[at];
      clusters[group][1] += 1;
    });
    const work = clusters.length || gained + lost;
    const resamples = Math.max(1000, Math.min(10000, Math.floor(2e7 / Math.max(1, work))));
    const means = new Float64Array(resamples);
    let p = mcnemar(gained, lost);
    if (clusters.length) {
      for (let number = 0; number < resamples; number++) {
        let sum = 0, size = 0;
        for (let at = 0; at < clusters.length; at++) {
          const own = clusters[Math.floor(draw() * clusters.length)];
          sum += own[0];
          size += own[1];
        }
        means[number] = sum / size;
      }
      const changed = clusters.map((own) => own[0]).filter((own) => own !== 0);
      const seen = Math.abs(changed.reduce((sum, own) => sum + own, 0));
      let extreme = 0;
      for (let number = 0; number < resamples; number++) {
        let sum = 0;
        for (const own of changed) sum += draw() < 0.5 ? own : -own;
        extreme += Math.abs(sum) >= seen;
      }
      p = (extreme + 1) / (resamples + 1);
    } else if (gained + lost) {
      // Rows that did not change add nothing: the next changed one is a geometric number of draws away.
      const share = (gained + lost) / n, up = gained / (gained + lost), log = Math.log(1 - share);
      for (let number = 0; number < resamples; number++) {
        let sum = 0;
        for (let at = Math.floor(Math.log(1 - draw()) / log); at < n; at += 1 + Math.floor(Math.log(1 - draw()) / log)) sum += draw() < up ? 1 : -1;
        means[number] = sum / n;
      }
    }
    means.sort();
    return { gained, lost, p, interval: [quantile(means, alpha / 2), quantile(means, 1 - alpha / 2)], resamples, groups: clusters.length };
  }

  const points = (fraction) => {
    const digits = Math.abs(fraction) > 0 && Math.abs(fraction) < 0.0005 ? 2 : 1;
    const text = Math.abs(100 * fraction).toFixed(digits);
    return Number(text) === 0 ? "0.0" : (fraction < 0 ? "−" : "+") + text;
  };
  const probability = (p) => (p < 0.0001 ? "p < 0.0001" : "p = " + Number(p.toPrecision(2)));

  function command(a, b) {
    const files = [a, b].map((number) => data.outputs + "/" + data.places[number] + "/predictions/finetuned.jsonl");
    const task = data.judging[a]?.task ?? data.judging[b]?.task;
    const quoted = ("eval.predictions=[" + files.join(",") + "]").replaceAll("'", "'\\''");
    return make("pre", "box", "python -m sftlab mode=compare" + (task ? " eval.task=" + task : "") + " '" + quoted + "'");
  }

  function unpaired(a, b) {
    if ([a, b].every((number) => data.judging[number]?.task === "rouge")) return ["Scores are not in this page. This command compares the two:", command(a, b)];
    const lacking = [a, b].filter((number) => data.answers[number] === 0);
    if (lacking.length) return ["The answers cannot be compared: " + lacking.map(title).join(" and ") + (lacking.length > 1 ? " have" : " has") + " no stored answers that are right or wrong."];
    const tests = [data.tests[a], data.tests[b]];
    if (tests[0] !== tests[1] && !tests.includes(null)) return ["The answers cannot be compared: the runs have different test sets."];
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
    const level = Math.max(...judging.map((own) => own.level ?? 0.95)), alpha = 1 - level;
    const noise = Math.max(...judging.map((own) => own.noise ?? 0));
    const sides = [right(a, n), right(b, n)];
    const [base, tuned] = sides.map((side) => side.reduce((sum, own) => sum + own, 0));
    const found = paired(sides[1].map((own, at) => own - sides[0][at]), groups, alpha);
    const delta = (tuned - base) / n, [low, high] = found.interval;
    const numbers = tuned + " of " + n + " against " + base + " (" + points(delta) + " points, " + Number((100 * level).toFixed(6)) + " % interval " + points(low) + " to " + points(high) + ", " + probability(found.p) + "); " + found.gained + " answers gained, " + found.lost + " lost.";
    let kind = "inconclusive", headline = "No difference is shown.", why = "";
    if (judging.some((own) => own.mute)) { headline = "The models cannot be judged."; why = " No answer of one model could be read."; }
    else if (noise && Math.abs(delta) <= noise) why = " The difference is not larger than the run-to-run noise of " + (100 * noise).toFixed(1) + " points.";
    else if (found.p < alpha && (low > 0 || high < 0)) {
      kind = delta > 0 ? "better" : "worse";
      headline = "The second run’s model is " + kind + ".";
    }
    const test = groups.length ? "a sign-flip test of " + found.groups + " groups" : "the exact McNemar test";
    return [make("h3", kind, headline), make("p", "", numbers + why),
      make("p", "note", "Fine-tuned models on the same questions, from the stored answers of both runs: " + test + ", and a paired bootstrap with " + found.resamples.toLocaleString("en") + " resamples. p is not adjusted for the number of pairs that you look at. This command reads the answers again, by its own eval keys:"),
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
