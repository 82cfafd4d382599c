"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page");
const dark = matchMedia("(prefers-color-scheme: dark)").matches;

function make(tag, className, text, parent) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined && text !== null) node.textContent = text;
  (parent || page).appendChild(node);
  return node;
}

function minutes(seconds) {
  return seconds < 90 ? Math.round(seconds) + " s" : (seconds / 60).toFixed(1) + " min";
}

function header() {
  const run = data.run, recipe = run.recipe || {}, machine = run.machine || {}, versions = run.versions || {};
  make("h1", "", recipe.name || "run");
  const facts = [data.model, machine.processor, machine.dtype && "products in " + machine.dtype,
    versions.upslope && "upslope " + versions.upslope, versions.torch && "torch " + versions.torch, data.made];
  make("p", "soft", facts.filter(Boolean).join("  ·  "));
  const spent = Object.entries(data.stages).filter(([, s]) => s.seconds)
    .map(([name, s]) => name + " " + minutes(s.seconds) + (s.metrics && s.metrics["memory/peak_gb"] ? " (" + s.metrics["memory/peak_gb"].toFixed(1) + " GB)" : ""));
  if (spent.length) make("p", "soft", "time and peak memory: " + spent.join(", "));
  verdict();
}

function verdict() {
  const table = data.tables.find(t => t.columns.includes("change"));
  if (!table) { make("p", "verdict", "The run has not come to its closing evaluation yet."); return; }
  const moved = table.rows.filter(r => /^(task|reward|judge)/.test(r[0])).map(r => {
    const m = r[r.length - 1].match(/^(\S+) \[(\S+), (\S+)\]$/);
    if (!m) return null;
    const low = +m[2], high = +m[3];
    return r[0].replace(": ", " ") + (low > 0 ? " rose by " + m[1] : high < 0 ? " fell by " + m[1].replace("-", "") : " did not change clearly (" + m[1] + ")");
  }).filter(Boolean);
  make("p", "verdict", "On prompts that no stage has seen: " + moved.join("; ") + ".");
}

function tables() {
  for (const table of data.tables.slice().reverse()) {
    make("h2", "", table.title);
    const node = make("table", "", null, make("div", "scroll"));
    const head = make("tr", "", null, make("thead", "", null, node));
    for (const name of table.columns) make("th", "", name, head);
    const body = make("tbody", "", null, node);
    for (const row of table.rows) {
      const line = make("tr", "", null, body);
      for (const cell of row) {
        const m = String(cell).match(/^(\S+) (\[.*\])$/);
        const td = make("td", "", m ? m[1] : cell, line);
        if (m) make("span", "range", m[2], td);
      }
    }
    make("p", "soft", table.note);
  }
}

function alarms() {
  for (const alarm of data.alarms) {
    const step = alarm.step == null ? "" : ", step " + alarm.step;
    make("p", "alarm", "Alarm in " + alarm.stage + step + ": " + alarm.message);
  }
}

function pairs() {
  if (!data.prompts.length) return;
  make("h2", "", "The same held-out prompts, before and after");
  for (const p of data.prompts) {
    const box = make("div", "pair");
    make("div", "prompt", p.prompt + " …", box);
    ["before", "after"].forEach((side, place) => {
      const cell = make("div", "side", null, box);
      make("div", "label", side, cell);
      make("div", "", p[side], cell);
      make("div", "scores", Object.entries(p.scores || {}).map(([n, v]) => n + " " + v[place]).join("  ·  "), cell);
    });
  }
}

function credit() {
  if (!data.samples.length) return;
  make("h2", "", "Which token earned the credit");
  const legend = make("div", "legend");
  make("span", "", "worse than the critic expected", legend);
  make("i", "", null, legend);
  make("span", "", "better: each token's background is its advantage", legend);
  const shown = data.samples.length > 3 ? [data.samples[0], data.samples[data.samples.length >> 1], data.samples[data.samples.length - 1]] : data.samples;
  for (const group of shown) {
    make("h3", "", "rollout " + group.step);
    for (const s of group.samples) {
      const box = make("div", "sample");
      make("strong", "", s.prompt, box);
      s.tokens.forEach((token, i) => {
        const c = s.credit[i], strength = Math.min(Math.abs(c) / 2.5, 1) * 0.75;
        const span = make("span", "token", token, box);
        span.style.background = c >= 0 ? `rgba(24,150,96,${strength})` : `rgba(214,69,65,${strength})`;
        span.title = "advantage " + c;
      });
      const scores = Object.entries(s.rewards).map(([n, v]) => n + " " + v);
      make("div", "scores", [...scores, "KL " + s.kl, "ended by " + s.finish].join("  ·  "), box);
    }
  }
}

function ticks(u, places) {  // as many digits as tell one from the next
  const step = places.length > 1 ? Math.abs(places[1] - places[0]) : 1, most = Math.max(...places.map(Math.abs));
  const power = x => Math.floor(Math.log10(x) + 1e-9);
  return most >= 1e5 || step < 1e-4 ? places.map(x => x ? x.toExponential(Math.max(0, power(most) - power(step))) : "0")
    : places.map(x => (x || 0).toFixed([0, 1, 2, 3, 4, 5].find(n => Math.abs(step * 10 ** n - Math.round(step * 10 ** n)) < 1e-6)));
}

function width(u, labels) {  // of an axis
  return 20 + 7 * Math.max(3, ...(labels || []).map(text => text.length));
}

function range(u, low, high) {
  return low === high ? [Math.min(low, 0), Math.max(high, 0) || 1] : uPlot.rangeNum(low, high, 0.1, true);
}

function curves() {
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--accent").trim();
  const axis = dark ? "#9aa3af" : "#667", grid = dark ? "#2a2f36" : "#e6e9ee";
  for (const [stage, content] of Object.entries(data.stages).reverse()) {
    const curves = content.curves || {};
    const bound = name => /_(low|high)$/.test(name) && curves[name.replace(/_(low|high)$/, "")];
    const first = name => /^task\//.test(name) ? 0 : name === "reward/mean" ? 1 : 2;  // the reward beside the task
    const all = Object.entries(curves).filter(([name, points]) => points.length > 1 && !bound(name))
      .sort((a, b) => first(a[0]) - first(b[0]));
    if (!all.length) continue;
    make("h2", "", "Curves: " + stage);
    const box = make("div", "grid");
    for (const [name, points] of all) {
      const card = make("div", "card", null, box);
      const title = make("div", "name", name, card);
      const last = points[points.length - 1][1];
      const band = ["_low", "_high"].map(end => curves[name + end]).filter(Boolean);  // the 95 % interval, dashed
      const paid = /^task\//.test(name) && name !== "task/reward" && curves["task/reward"] || [];  // in the same picture
      const reward = paid.length === points.length ? [paid] : [];
      if (reward.length) make("em", "", "task/reward: grey", title);
      make("span", "", last === null ? "not finite" : Number(last.toPrecision(4)), title);
      new uPlot({
        width: Math.max(260, card.clientWidth - 30), height: 150, legend: { show: false },
        cursor: { sync: { key: stage }, points: { size: 6 } }, scales: { x: { time: false }, y: { range }, reward: { range } },
        axes: [{ stroke: axis, grid: { stroke: grid, width: 1 }, size: 28, incrs: [1, 2, 5].flatMap(n => [0, 1, 2, 3, 4, 5, 6].map(e => n * 10 ** e)).sort((a, b) => a - b) },
               { stroke: axis, grid: { stroke: grid, width: 1 }, values: ticks, size: width },
               ...reward.map(() => ({ scale: "reward", side: 1, stroke: axis, grid: { show: false }, values: ticks, size: width }))],
        series: [{}, { stroke: colour, width: 2, points: { show: points.length < 3 } },
          ...band.map(() => ({ stroke: colour, width: 1, dash: [3, 3], points: { show: false } })),
          ...reward.map(() => ({ scale: "reward", stroke: axis, width: 1.5, points: { show: points.length < 3 } }))],
        hooks: { setLegend: [u => { const i = u.cursor.idx; title.lastChild.textContent = i === null || points[i] === undefined ? Number(last?.toPrecision(4)) : "step " + points[i][0] + ": " + Number(points[i][1]?.toPrecision(4)); }] },
      }, [points.map(p => p[0]), points.map(p => p[1]), ...band.map(b => b.map(p => p[1])), ...reward.map(r => r.map(p => p[1]))], card);
    }
  }
}

function rest() {
  make("h2", "", "How it was made");
  const data_ = make("details");
  make("summary", "", "Data: read, kept, dropped", data_);
  for (const a of data.accounts) make("p", "soft", (a.stage === "run" ? "" : a.stage + ": ") + a.text, data_);
  const recipe = make("details");
  make("summary", "", "Recipe, every key", recipe);
  make("pre", "", JSON.stringify(data.run.recipe, null, 2), recipe);
  const machine = make("details");
  make("summary", "", "Machine and versions", machine);
  make("pre", "", JSON.stringify({ machine: data.run.machine, versions: data.run.versions }, null, 2), machine);
}

header(); alarms(); tables(); pairs(); credit(); curves(); rest();
