// The page of runs in progress: it asks the server for their state every second, until all have ended.

const ASK_MS = 1000;
const LONGEST_SILENCE = 5; // questions without an answer, until the server is taken for gone

const sections = new Map(); // path of a log -> its parts of the page
let setCurves = null;

/** Return the parts of the page that show one run. */
function makeSection(run) {
  const parts = {
    name: element("h2", {}, run.name),
    phase: element("p", { class: "byline" }),
    bar: element("progress", { max: "1", "aria-label": `training of ${run.name}` }),
    facts: element("dl", { class: "facts" }),
    standing: element("p", { class: "note", hidden: true }),
  };
  document.getElementById("runs").append(element("section", { class: "run" }, ...Object.values(parts)));
  return parts;
}

function showRun(run) {
  if (!sections.has(run.path)) sections.set(run.path, makeSection(run));
  const parts = sections.get(run.path);
  parts.phase.textContent = [run.phase, run.about, run.path].filter(Boolean).join("; ");
  parts.bar.value = run.fraction;
  parts.facts.replaceChildren(
    ...run.facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
  );
  parts.standing.textContent = run.standing;
  parts.standing.hidden = !run.standing;
}

function showCurves({ runs, references }) {
  const drawn = [...references, ...runs.map((run, index) => ({ ...run, color: index }))];
  if (setCurves) setCurves(drawn);
  else if (runs.some((run) => run.train?.step.length || run.val?.step.length)) {
    setCurves = curvesBlock(document.getElementById("curves"), drawn, { x: "time" });
  }
}

/** Say in words what the page shows; read aloud by a screen reader, so only when it changes. */
function say(text) {
  const state = document.getElementById("state");
  if (state.textContent !== text) state.textContent = text;
}

function describe({ runs, over }) {
  if (over) return "All runs have ended. This page stays as it is; the server has stopped.";
  const open = runs.filter((run) => !run.ended).length;
  return open === 1 ? "One run is in progress." : `${open} runs are in progress.`;
}

/** Ask for the state and show it. Returns the version that is shown, and whether it is the last one. */
async function ask(version) {
  const answer = await fetch(`/runs.json?version=${version}`);
  if (answer.status === 204) return { version, over: false };
  const state = await answer.json();
  state.runs.forEach(showRun);
  showCurves(state);
  say(describe(state));
  return state;
}

async function start() {
  startThemeSwitch();
  let version = 0;
  let silent = 0;
  while (silent < LONGEST_SILENCE) {
    try {
      const state = await ask(version);
      version = state.version;
      silent = 0;
      if (state.over) return;
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // of fetch: the server does not answer
      silent += 1;
    }
    await new Promise((resolve) => setTimeout(resolve, ASK_MS));
  }
  say("The server has stopped; the runs may go on. ./run.sh watch starts it again.");
}

start();
