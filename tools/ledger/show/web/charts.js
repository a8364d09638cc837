// Charts of both pages. Each chart is a function that draws into an element, kept so that a change of theme draws
// it again. Colors come from page.css.
"use strict";

const SERIES_COLORS = 10;
const HEIGHT = 300; // of a chart, in pixels, unless its rows decide
const MANY_POINTS = 12; // a longer curve is drawn without a dot for each of its points

// ---- elements ----------------------------------------------------------------------------------

/** Return an element with attributes and children; text children are escaped by the browser. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** Return a row of exclusive buttons; `onChange` gets the value of the chosen one. */
function choiceOf(legend, options, chosen, onChange) {
  const name = `choice-${choiceOf.count++}`;
  const labels = Object.entries(options).map(([value, text]) => {
    const input = element("input", { type: "radio", name, value, checked: value === chosen });
    input.addEventListener("change", () => onChange(value));
    return element("label", {}, input, element("span", {}, text));
  });
  return element("fieldset", { class: "switch" }, element("legend", {}, legend), ...labels);
}
choiceOf.count = 0;

// ---- theme -------------------------------------------------------------------------------------

/** Return a color of page.css as the browser computes it for the theme in use. */
function color(name) {
  const probe = element("span", { style: `color: var(--${name}); display: none` });
  document.body.append(probe);
  const computed = getComputedStyle(probe).color;
  probe.remove();
  return computed;
}

function seriesColor(index) {
  return color(`series-${(index % SERIES_COLORS) + 1}`);
}

const charts = new Map(); // element -> the function that draws it

/** Draw a chart now, and again whenever the theme changes. */
function keepDrawn(node, draw) {
  charts.set(node, draw);
  draw();
}

/** Draw the charts inside an element again, in the room and the theme that they have now. */
function redraw(within = document.body) {
  for (const [node, draw] of charts) {
    if (!node.isConnected) charts.delete(node);
    else if (within.contains(node) && node.clientWidth) draw();
  }
}

const redrawAll = () => redraw();

function startThemeSwitch() {
  const root = document.documentElement;
  const switches = document.querySelectorAll("#theme input");
  for (const input of switches) {
    input.checked = input.value === (root.dataset.theme ?? "auto");
    input.addEventListener("change", () => {
      if (input.value === "auto") delete root.dataset.theme;
      else root.dataset.theme = input.value;
      try {
        localStorage.setItem("bankshot-theme", input.value);
      } catch {
        // the choice then holds for this page alone
      }
      redrawAll();
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
  matchMedia("print").addEventListener("change", redrawAll);
  addEventListener("resize", redrawAll);
  addEventListener("toggle", (event) => redraw(event.target), true); // what was hidden had no room
}

// ---- the library -------------------------------------------------------------------------------

const isTouch = matchMedia("(pointer: coarse)").matches; // dragging scrolls the page there, and does not zoom

/** Draw traces with the layout that all charts share. `given` overrides parts of it. */
function plot(node, traces, given) {
  const ink = color("ink");
  const muted = color("muted");
  const axis = {
    gridcolor: color("rule"),
    zeroline: false,
    linecolor: muted,
    tickcolor: muted,
    ticks: "outside",
    ticklen: 4,
    automargin: true,
    title: { standoff: 8 },
  };
  const { xaxis, yaxis, ...rest } = given;
  node.style.height = `${given.height ?? HEIGHT}px`;
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.documentElement).getPropertyValue("--sans"), size: 12, color: muted },
    margin: { l: 8, r: 8, t: 8, b: 8 },
    height: HEIGHT,
    width: node.clientWidth, // a chart that sizes itself does so too late for a sheet of paper
    showlegend: false,
    dragmode: isTouch ? false : "zoom",
    hoverlabel: {
      bgcolor: color("paper"),
      bordercolor: color("rule"),
      font: { family: getComputedStyle(document.documentElement).getPropertyValue("--sans"), size: 12, color: ink },
    },
    ...rest,
    xaxis: { ...axis, ...xaxis },
    yaxis: { ...axis, ...yaxis },
  };
  const config = { displayModeBar: false, doubleClick: "reset+autosize", scrollZoom: false };
  Plotly.react(node, traces, layout, config);
}

// ---- curves ------------------------------------------------------------------------------------

const X_AXES = { step: "step", time: "training time (s)" };
const WINDOWS = { 0: "all", 0.1: "last 90 %", 0.5: "last half", 0.9: "last tenth" };
const PANELS = [
  { source: "train", y: "loss", title: "Training loss, nats per token" },
  { source: "val", y: "bpb", title: "Validation, bits per byte" },
];

/** Return a range around values with a share of it as room on both sides. */
function rangeAround(values, share) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  const room = share * (high - low) || 0.02 * Math.abs(high) || 1;
  return [low - room, high + room];
}

/** Return the range of x that begins at a share of the longest curve, and that of y inside of it. */
function rangesOf(curves, x, y, begin) {
  const end = Math.max(...curves.flatMap((curve) => curve[x]));
  const from = begin * end;
  const inside = curves.flatMap((curve) => curve[y].filter((_, i) => curve[x][i] >= from));
  const values = inside.length ? inside : curves.flatMap((curve) => curve[y]);
  const room = 0.03 * (end - from) || 1;
  return { x: [from - room, end + room], y: rangeAround(values, 0.06) };
}

/** Return the format of ticks that tell values of a range apart. */
function tickFormat([low, high]) {
  return high - low < 0.1 ? ".3f" : ".2f";
}

/**
 * Draw curves of runs into a block: a panel for each kind of curve that some run has, with a choice of the x axis
 * and of the part of the run. Returns a function that takes other runs.
 *
 * runs: [{name, group, color (index), muted, train: {step, time, loss}, val: {step, time, loss, bpb}}]
 */
function curvesBlock(block, runs, { x = "step", begin = 0 } = {}) {
  const state = { runs, x, begin };
  const key = element("ul", { class: "key" });
  const panels = element("div", { class: "plots" });
  const figures = PANELS.map((panel) => {
    const node = element("div", { class: "plot" });
    const caption = element("figcaption", {}, panel.title);
    return { ...panel, node, caption, figure: element("figure", {}, caption, node) };
  });

  function show() {
    key.replaceChildren(...keyOf(state.runs));
    const withRuns = figures
      .map((panel) => ({ ...panel, shown: state.runs.filter((run) => run[panel.source]?.[panel.y]?.length) }))
      .filter((panel) => panel.shown.length);
    const wanted = withRuns.map((panel) => panel.figure); // all in place first: a chart measures its room
    if (wanted.length !== panels.children.length || wanted.some((figure, i) => figure !== panels.children[i])) {
      panels.replaceChildren(...wanted);
    }
    for (const panel of withRuns) keepDrawn(panel.node, () => drawCurves(panel, panel.shown, state));
  }

  const controls = element(
    "div",
    { class: "controls" },
    choiceOf("against", { step: "step", time: "time" }, state.x, (value) => {
      state.x = value;
      show();
    }),
    choiceOf("of the run", WINDOWS, String(state.begin), (value) => {
      state.begin = Number(value);
      show();
    }),
  );
  block.replaceChildren(controls, key, panels);
  show();
  return (others) => {
    state.runs = others;
    show();
  };
}

/** Return the legend of runs: an entry for each group. */
function keyOf(runs) {
  const groups = new Map(runs.map((run) => [run.group ?? run.name, run]));
  return [...groups].map(([name, run]) => {
    const line = element("i", { style: `border-color: var(--${run.muted ? "rule" : seriesName(run.color)})` });
    return element("li", {}, line, name);
  });
}

function seriesName(index) {
  return `series-${(index % SERIES_COLORS) + 1}`;
}

function drawCurves(panel, runs, { x, begin }) {
  const traces = runs.map((run) => {
    const columns = run[panel.source];
    const count = columns[x].length;
    const drawn = run.muted ? color("muted") : seriesColor(run.color);
    return {
      type: "scatter",
      mode: count > MANY_POINTS ? "lines" : "lines+markers",
      x: columns[x],
      y: columns[panel.y],
      name: run.group && run.group !== run.name ? `${run.group} ${run.name}` : run.name,
      line: { color: drawn, width: 1.4, dash: run.muted ? "dot" : "solid" },
      marker: { color: drawn, size: count > 1 ? 4 : 8 },
      hovertemplate: "%{y:.4f}",
    };
  });
  const ranges = rangesOf(
    runs.map((run) => run[panel.source]),
    x,
    panel.y,
    begin,
  );
  plot(panel.node, traces, {
    hovermode: "x unified",
    xaxis: { title: { text: X_AXES[x], standoff: 8 }, range: ranges.x, hoverformat: x === "step" ? ",.0f" : ",.1f" },
    yaxis: { range: ranges.y, tickformat: tickFormat(ranges.y) },
  });
  panel.node.setAttribute("role", "img");
  panel.node.setAttribute("aria-label", `${panel.title}: ${runs.map((run) => described(run, panel)).join("; ")}`);
}

/** Return a curve in words, for those who do not see it. */
function described(run, panel) {
  const { step, [panel.y]: values } = run[panel.source];
  const last = values.length - 1;
  const name = run.group && run.group !== run.name ? `${run.group} ${run.name}` : run.name;
  return `${name} from ${values[0].toFixed(4)} at step ${step[0]} to ${values[last].toFixed(4)} at step ${step[last]}`;
}
