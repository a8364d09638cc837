// The page of the ledger. `payload` is what ledger/show/site.py wrote; source diffs and the library that draws are
// packed, and unpacked here.

const payload = JSON.parse(document.getElementById("payload").textContent);

/** Return the text that library.packed has packed into an element. */
async function unpacked(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).text();
}

// ---- best scores -------------------------------------------------------------------------------

const ROW_HEIGHT = 26;
const ROW_MARGIN = { l: 8, r: 16, t: 8 };
const SYMBOLS = { sliding: "circle", ttt: "square", chunked: "diamond", race: "circle" };

function historyFigure(history) {
  const node = element("div", { class: "plot" });
  const kinds = new Set(history.rows.map((row) => row.score));
  const caption = element("figcaption", {}, element("code", {}, history.track), `, ${history.unit}. `);
  if (history.rows.some((row) => !row.record)) caption.append("Hollow: non-records. ");
  if (kinds.has("chunked") && kinds.size > 1) {
    caption.append("Diamonds: scored in disjoint windows only, which is higher for the same artifact.");
  }
  return { figure: element("figure", {}, caption, node), node, history };
}

/** Return dots in rows, with bars where there is a spread: Plotly draws one of length zero, too. */
function dotsInRows(rows, { x, bars, symbol, colors, text, hovertemplate }) {
  const parts = [rows.filter((row) => bars(row) === null), rows.filter((row) => bars(row) !== null)];
  return parts.map((part) => ({
    type: "scatter",
    mode: "markers",
    x: part.map(x),
    y: part.map((row) => rows.indexOf(row)),
    customdata: part.map((row) => row.anchor ?? ""),
    error_x: {
      type: "data",
      symmetric: false,
      visible: part.length > 0 && bars(part[0]) !== null,
      array: part.map((row) => bars(row)?.[1]),
      arrayminus: part.map((row) => bars(row)?.[0]),
      color: color("muted"),
      thickness: 1.25,
      width: 3,
    },
    marker: { size: 9, symbol: part.map(symbol), color: part.map(colors), line: { width: 1.5, color: part.map(colors) } },
    text: part.map(text),
    hovertemplate,
  }));
}

function drawHistory({ node, history }) {
  const rows = history.rows;
  const line = bestLine(rows);
  const dots = dotsInRows(rows, {
    x: (row) => row.value,
    bars: (row) => (row.std === null ? null : [row.std, row.std]),
    symbol: (row) => (SYMBOLS[row.score] ?? "triangle-up") + (row.record ? "" : "-open"),
    colors: (row) => color(row.record ? "series-1" : "muted"),
    text: (row) => `${row.name}, ${row.date}<br>${row.record ? "record" : "non-record"}, ${row.score}`,
    hovertemplate: "%{text}<br><b>%{x}</b><extra></extra>",
  });
  const best = {
    type: "scatter",
    mode: "lines",
    x: line.map((point) => point.value),
    y: line.map((point) => point.row),
    line: { color: color("series-1"), width: 1.5 },
    hoverinfo: "skip",
  };
  plot(node, [best, ...dots], {
    height: ROW_HEIGHT * rows.length + 40,
    margin: { ...ROW_MARGIN, b: 32 },
    hovermode: "closest",
    dragmode: false,
    xaxis: {
      range: rangeAround(rows.flatMap(({ value, std }) => [value - std, value + std]), 0.05),
      tickformat: history.unit === "bits per byte" ? ".3f" : ",",
      nticks: node.clientWidth < 500 ? 4 : 8,
    },
    yaxis: {
      range: [rows.length - 0.4, -0.6],
      tickvals: rows.map((_, i) => i),
      ticktext: rows.map((row) => `${row.name}  ${row.date.slice(5)}`),
      ticks: "",
      showgrid: false,
      fixedrange: true,
    },
  });
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", rows.map((row) => `${row.name} ${row.date} ${row.value}`).join("; "));
}

/** Return the stairs of the best record: down the rows, to the left at each better one. */
function bestLine(rows) {
  const line = [];
  let best = null;
  rows.forEach((row, i) => {
    if (row.record && (best === null || row.value < best)) {
      if (best !== null) line.push({ value: best, row: i });
      best = row.value;
    }
    if (best !== null) line.push({ value: best, row: i });
  });
  return line;
}

function openOnClick({ node }) {
  node.on("plotly_click", (event) => {
    const anchor = event.points.map((point) => point.customdata).find(Boolean);
    if (anchor) location.hash = anchor;
  });
}

// ---- comparison --------------------------------------------------------------------------------

const chosen = []; // keys of entries, the first one is the one to compare with

function runsOf(keys) {
  return keys.flatMap((key, index) => {
    const entry = payload.entries[key];
    const alone = keys.length === 1;
    return entry.runs.map((run, seed) => ({
      ...run,
      group: alone ? run.name : entry.name,
      color: alone ? seed : index,
    }));
  });
}

function startChoices() {
  const tracks = [...new Set(Object.values(payload.entries).map((entry) => entry.track))];
  const groups = tracks.map((track) => {
    const labels = Object.entries(payload.entries)
      .filter(([, entry]) => entry.track === track)
      .map(([key, entry]) => {
        const input = element("input", { type: "checkbox", value: key });
        input.addEventListener("change", () => choose(key, input.checked));
        return element("label", {}, input, element("span", {}, entry.name));
      });
    return element("fieldset", {}, element("legend", {}, track), ...labels);
  });
  document.getElementById("choices").append(...groups);
}

function choose(key, on) {
  if (on) chosen.push(key);
  else chosen.splice(chosen.indexOf(key), 1);
  showComparison();
}

/** Choose the records of the track that has most of them, the two best at least. */
function chooseAtFirst() {
  const byTrack = new Map();
  for (const [key, entry] of Object.entries(payload.entries)) {
    if (entry.record) byTrack.set(entry.track, [...(byTrack.get(entry.track) ?? []), key]);
  }
  const lists = [...byTrack.values()].sort((a, b) => b.length - a.length);
  chosen.push(...(lists[0] ?? Object.keys(payload.entries)).slice(0, 3).reverse());
  for (const input of document.querySelectorAll("#choices input")) input.checked = chosen.includes(input.value);
}

function showComparison() {
  const place = document.getElementById("comparison");
  if (chosen.length < 2) {
    place.replaceChildren(element("p", { class: "note" }, "Choose at least two."));
    return;
  }
  const block = element("div", { class: "curves" });
  place.replaceChildren(...comparisonNotes(), block, figuresTable(), settingsTable());
  curvesBlock(block, runsOf(chosen), { begin: 0.1 });
}

function comparisonNotes() {
  const entries = chosen.map((key) => payload.entries[key]);
  const differ = (field) => new Set(entries.map((entry) => entry[field])).size > 1;
  const notes = [];
  if (differ("vocabulary")) notes.push("These tokenizers differ: losses per token do not compare, bits per byte do.");
  if (differ("text")) notes.push("These were scored on different text: their scores do not compare.");
  if (differ("score")) notes.push("These were scored in different ways: the same artifact has other bits per byte.");
  return notes.map((text) => element("p", { class: "note" }, text));
}

const fixed = (value, digits) =>
  value === null
    ? "-"
    : value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const pText = (p) => (p < 0.001 ? p.toExponential(1) : p.toPrecision(2));
const signed = (value, digits) => (value < 0 ? "" : "+") + value.toFixed(digits);

function tableOf(label, head, rows) {
  const cells = head.map(([name, side]) => element("th", { scope: "col", class: side }, name));
  const body = rows.map(([first, ...rest]) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, first),
      ...rest.map((cell, i) => element("td", { class: head[i + 1][1] }, cell)),
    ),
  );
  const table = element(
    "table",
    {},
    element("caption", {}, label),
    element("thead", {}, element("tr", {}, ...cells)),
    element("tbody", {}, ...body),
  );
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, table);
}

function figuresTable() {
  const [first, ...others] = chosen;
  const rows = [first, ...others].map((key) => {
    const { name, figures, anchor } = payload.entries[key];
    const pair = payload.pairs[`${first} ${key}`];
    return [
      element("a", { href: `#${anchor}` }, name),
      fixed(figures.val_bpb, 4),
      fixed(figures.std, 5),
      key === first || !pair ? "-" : signed(pair.diff, 4),
      key === first || !pair ? "-" : `${signed(pair.low, 4)} to ${signed(pair.high, 4)}`,
      key === first || !pair ? "-" : pText(pair.p),
      fixed(figures.val_loss, 4),
      String(figures.seeds),
      fixed(figures.steps, 0),
      fixed(figures.step_ms, 2),
      fixed(figures.bytes, 0),
    ];
  });
  const against = `to ${payload.entries[first].name}`;
  const head = ["", "val_bpb", "std", against, "95 % interval", "p Welch", "val_loss", "seeds", "steps", "ms/step", "bytes"];
  return tableOf("Figures; differences need two seeds on each side, the same text and the same score", head.map((name, i) => [name, i ? "r" : "l"]), rows);
}

function settingsTable() {
  const configs = chosen.map((key) => payload.entries[key].config);
  const shared = Object.keys(configs[0]).filter((key) => configs.every((config) => key in config));
  const free = /^(seed|run_id|data|out|([a-z0-9_]+_)?(dir|path|root|file))$/; // as the ledger has it: names and paths
  const differing = shared.filter(
    (key) => !free.test(key) && new Set(configs.map((config) => String(config[key]))).size > 1,
  );
  if (!differing.length) return element("p", { class: "note" }, "No setting that all of them have differs.");
  const head = [["setting", "l"], ...chosen.map((key) => [payload.entries[key].name, "l"])];
  const rows = differing
    .sort()
    .map((key) => [element("code", {}, key), ...configs.map((config) => element("code", {}, String(config[key])))]);
  return tableOf("Settings that differ, of those that all of them have", head, rows);
}

// ---- sweeps ------------------------------------------------------------------------------------

/** Return the color of an effect: good or bad where its interval leaves out zero. */
function verdictColor({ low, high }) {
  if (low === null || (low <= 0 && high >= 0)) return "muted";
  return high < 0 ? "good" : "bad";
}

function drawEffects(node, { effects, baseline }) {
  const rows = effects;
  const dots = dotsInRows(rows, {
    x: (row) => row.diff,
    bars: (row) => (row.low === null ? null : [row.diff - row.low, row.high - row.diff]),
    symbol: (row) => (row.low === null ? "circle-open" : "circle"),
    colors: (row) => color(verdictColor(row)),
    text: (row) =>
      row.low === null ? "one seed" : `[${signed(row.low, 4)}, ${signed(row.high, 4)}], p ${pText(row.paired_p)}`,
    hovertemplate: "%{x:+.4f}<br>%{text}<extra></extra>",
  });
  plot(node, dots, {
    height: ROW_HEIGHT * rows.length + 60,
    margin: { ...ROW_MARGIN, b: 52 },
    hovermode: "closest",
    dragmode: false,
    xaxis: {
      title: { text: `val bpb, difference to ${baseline}`, standoff: 8 },
      range: rangeAround([0, ...rows.flatMap(({ diff, low, high }) => [diff, low ?? diff, high ?? diff])], 0.05),
      tickformat: "+.3f",
      nticks: node.clientWidth < 500 ? 4 : 8,
    },
    yaxis: {
      range: [rows.length - 0.4, -0.6],
      tickvals: rows.map((_, i) => i),
      ticktext: rows.map((row) => row.name),
      ticks: "",
      showgrid: false,
      fixedrange: true,
    },
    shapes: [{ type: "line", x0: 0, x1: 0, y0: 0, y1: 1, yref: "paper", line: { color: color("ink"), width: 1 } }],
  });
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", rows.map((row) => `${row.name} ${signed(row.diff, 4)}`).join("; "));
}

// ---- the ladder --------------------------------------------------------------------------------

function drawLadder(node) {
  const traces = payload.ideas.map((idea, index) => ({
    type: "scatter",
    mode: "lines+markers",
    name: idea.name,
    x: idea.budget,
    y: idea.mean,
    error_y: { type: "data", array: idea.reach, color: seriesColor(index), thickness: 1, width: 3 },
    line: { color: seriesColor(index), width: 1.4 },
    marker: { color: seriesColor(index), size: 6 },
    customdata: idea.seeds,
    hovertemplate: "%{y:+.4f} (%{customdata} seeds)",
  }));
  const budgets = [...new Set(payload.ideas.flatMap((idea) => idea.budget))].sort((a, b) => a - b);
  plot(node, traces, {
    height: 360,
    hovermode: "x unified",
    xaxis: {
      type: "log",
      title: { text: "device-seconds of training", standoff: 8 },
      tickvals: budgets,
      ticktext: budgets.map((budget) => budget.toLocaleString("en-US")),
    },
    yaxis: { tickformat: "+.3f", title: { text: "bits per byte", standoff: 8 } },
    shapes: [{ type: "line", x0: 0, x1: 1, xref: "paper", y0: 0, y1: 0, line: { color: color("ink"), width: 1 } }],
  });
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", "effects of ideas against their budget; the table below has them");
}

function startLadder() {
  const block = document.getElementById("ladder-curves");
  if (!block) return;
  const node = element("div", { class: "plot" });
  block.append(element("ul", { class: "key" }, ...keyOf(payload.ideas.map((idea, color) => ({ ...idea, color })))), node);
  keepDrawn(node, () => drawLadder(node));
}

// ---- source diffs ------------------------------------------------------------------------------

let diffs = null;
const LINE_CLASSES = { "+": "add", "-": "remove", "@": "place" };

async function fillSection(section) {
  if (section.querySelector("pre")) return;
  diffs ??= unpacked("packed-diffs").then(JSON.parse);
  const lines = (await diffs)[section.parentElement.dataset.diff][section.dataset.section];
  const spans = lines.map((line) => element("span", { class: LINE_CLASSES[line[0]] ?? "same" }, line || " "));
  if (!section.querySelector("pre")) section.append(element("pre", { class: "lines", tabindex: "0" }, ...spans));
}

// ---- the page ----------------------------------------------------------------------------------

/** Draw the charts of a block that has just come into view. */
function drawBlock(block) {
  if (block.dataset.drawn) return;
  block.dataset.drawn = "yes";
  if (block.dataset.entries) curvesBlock(block, runsOf([block.dataset.entries]), { begin: 0.1 });
  else if (block.classList.contains("effects")) {
    const node = element("div", { class: "plot" });
    block.append(node);
    keepDrawn(node, () => drawEffects(node, payload.sweeps[block.dataset.sweep]));
  } else {
    const { runs } = payload.sweeps[block.dataset.sweep];
    curvesBlock(
      block,
      runs.map((run, index) => ({ ...run, color: index })),
      { begin: 0.5 },
    );
  }
}

const isShown = (node) => !node.closest("details:not([open])");

/** Draw blocks when they are near the window, and when the details around them are opened. */
function drawWhenSeen() {
  const seen = new IntersectionObserver(
    (changes) => {
      for (const { isIntersecting, target } of changes) {
        if (isIntersecting && isShown(target)) {
          seen.unobserve(target);
          drawBlock(target);
        }
      }
    },
    { rootMargin: "600px" },
  );
  document.querySelectorAll(".curves[data-entries], [data-sweep]").forEach((block) => seen.observe(block));
}

/** Open the result that the address names. */
function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target?.tagName !== "DETAILS") return;
  target.open = true;
  target.scrollIntoView();
}

/** Before printing, open every result and draw all of it as wide as paper; source diffs stay closed. */
function openForPrint() {
  document.documentElement.dataset.paper = "yes";
  document.querySelectorAll("details.entry").forEach((details) => (details.open = true));
  document.querySelectorAll(".curves[data-entries], [data-sweep]").forEach(drawBlock);
  redrawAll();
}

function leavePrint() {
  delete document.documentElement.dataset.paper;
  redrawAll();
}

async function start() {
  startThemeSwitch();
  startChoices();
  chooseAtFirst();
  document.querySelectorAll("details.section[data-section]").forEach((section) => {
    section.addEventListener("toggle", () => section.open && fillSection(section));
  });
  addEventListener("hashchange", openTarget);
  openTarget();

  const program = element("script");
  program.textContent = await unpacked("packed-plotly");
  document.head.append(program);
  const figures = payload.histories.map(historyFigure);
  document.getElementById("histories").append(...figures.map((each) => each.figure));
  for (const each of figures) {
    keepDrawn(each.node, () => drawHistory(each));
    openOnClick(each);
  }
  showComparison();
  startLadder();
  drawWhenSeen();
  addEventListener("beforeprint", openForPrint);
  addEventListener("afterprint", leavePrint);
  document.documentElement.dataset.ready = "yes";
}

start();
