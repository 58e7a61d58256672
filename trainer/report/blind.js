// Two versions of a clip in random order, answers, their score, and CSV.

const storage = `snac48-blind-${data.id}`;
const byId = (id) => document.getElementById(id);
const [one, two] = [byId("blind-one"), byId("blind-two")];
const hear = { a: byId("blind-a"), b: byId("blind-b"), reference: byId("blind-reference") };
const votes = [...document.querySelectorAll(".vote")];
const names = data.systems.map(({ name }) => name);
one.value = names.includes("stock") ? "stock" : names[0];
two.value = names.findLast((name) => !["target", "source", one.value].includes(name)) ?? names[0];

let answers = restored();
let pair = []; // what is compared since Start, whatever is chosen meanwhile
let queue = []; // clips still to come before they are shuffled again
let trial = null; // { deck, a, b, heard }

function restored() {
  try {
    return JSON.parse(localStorage.getItem(storage)) ?? [];
  } catch {
    return []; // storage is closed to this page: answers live as long as it does
  }
}

function store() {
  try {
    localStorage.setItem(storage, JSON.stringify(answers));
  } catch {
    // as above
  }
}

const random = (below) => Math.floor((crypto.getRandomValues(new Uint32Array(1))[0] / 2 ** 32) * below);

/** Clips that hold both versions: of some the source is gone. */
function shared() {
  const held = data.clips.map(({ versions }) => versions.map(({ system }) => system));
  return [...held.keys()].filter((clip) => pair.every((system) => held[clip].includes(system)));
}

function nextTrial() {
  const goesOn = trial?.deck.isPlaying;
  trial?.deck.pause();
  if (!queue.length) queue = shared();
  const [clip] = queue.splice(random(queue.length), 1);
  const [a, b] = random(2) ? pair : [...pair].reverse();
  trial = { deck: new Deck(clip), a, b, heard: new Set() };
  trial.deck.listeners.push(showTrial);
  showTrial();
  if (goesOn) listen("a");
}

function listen(side) {
  trial.heard.add(side);
  trial.side = side;
  trial.deck.select(side === "reference" ? "target" : trial[side]);
  return trial.deck.isPlaying ? null : trial.deck.play();
}

function showTrial() {
  for (const [side, button] of Object.entries(hear)) button.setAttribute("aria-pressed", String(trial.side === side));
  const ready = trial.heard.has("a") && trial.heard.has("b");
  for (const vote of votes) vote.disabled = !ready;
  byId("blind-stop").textContent = trial.deck.isPlaying ? "Pause" : "Play";
  byId("blind-state").textContent = `Trial ${answers.length + 1}. ${ready ? "Which is better?" : "Hear A and B."}`;
}

function vote(choice) {
  if (votes[0].disabled) return;
  const { deck, a, b, heard } = trial;
  answers.push({
    trial: answers.length + 1,
    clip: data.clips[deck.clip].key,
    a,
    b,
    choice,
    preferred: choice === "none" ? "" : trial[choice],
    target_heard: heard.has("reference"),
    time: new Date().toISOString(),
  });
  store();
  showScore();
  nextTrial();
}

/** Two-sided: how likely so uneven a split is when nobody hears a difference; ties are left out. */
function signTest(wins, losses) {
  const n = wins + losses;
  let term = 0.5 ** n;
  let tail = 0;
  for (let k = 0; k <= Math.min(wins, losses); k++) {
    tail += term;
    term *= (n - k) / (k + 1);
  }
  return Math.min(1, 2 * tail);
}

/** Answers to one clip are not independent: it counts once, for the version that it had more answers for. */
function showScore() {
  const pairs = new Map();
  for (const { clip, a, b, preferred } of answers) {
    const pair = [a, b].sort();
    const key = JSON.stringify(pair);
    const score = pairs.get(key) ?? { pair, wins: [0, 0], ties: 0, lead: new Map() };
    if (preferred === "") score.ties += 1;
    else score.wins[pair.indexOf(preferred)] += 1;
    score.lead.set(clip, (score.lead.get(clip) ?? 0) + (preferred === pair[0]) - (preferred === pair[1]));
    pairs.set(key, score);
  }
  const name = (system) => labels.get(system) ?? system;
  const lines = [...pairs.values()].map(({ pair, wins, ties, lead }) => {
    const clips = [1, -1].map((side) => [...lead.values()].filter((ahead) => side * ahead > 0).length);
    const p = signTest(...clips);
    const text = `Preferred: ${name(pair[0])} ${wins[0]}, ${name(pair[1])} ${wins[1]}; no difference ${ties}`;
    const test = `by clips ${clips[0]} to ${clips[1]}, sign test p = ${p < 0.001 ? p.toExponential(1) : p.toFixed(3)}`;
    return element("p", { className: "score" }, `${text} · ${test}`);
  });
  byId("blind-score").replaceChildren(...(lines.length ? lines : [element("p", { className: "note" }, "No answers yet.")]));
}

/** RFC 4180; what a spreadsheet would take for a formula gets an apostrophe. */
function csvCell(value) {
  const text = String(value);
  return `"${(/^[=+\-@\t\r]/.test(text) ? `'${text}` : text).replaceAll('"', '""')}"`;
}

function saveCsv() {
  const columns = ["trial", "clip", "a", "b", "choice", "preferred", "target_heard", "time"];
  const lines = [columns, ...answers.map((answer) => columns.map((column) => answer[column]))];
  const text = lines.map((line) => line.map(csvCell).join(",") + "\r\n").join("");
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: "blind_test.csv" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

const trialKeys = {
  a: () => listen("a"),
  b: () => listen("b"),
  t: () => listen("reference"),
  " ": () => trial.deck.toggle(),
  ArrowLeft: () => vote("a"),
  ArrowRight: () => vote("b"),
  ArrowDown: () => vote("none"),
};

function trialKey(key) {
  if (!(key in trialKeys)) return false;
  trialKeys[key]();
  return true;
}

function start() {
  pair = [one.value, two.value];
  const differ = pair[0] !== pair[1];
  byId("blind-result").open = false;
  queue = shared();
  const ready = differ && queue.length > 0;
  byId("blind-trial").hidden = !ready;
  if (ready) {
    nextTrial();
    hear.a.focus();
  } else {
    trial?.deck.pause();
    trial = null;
    byId("blind-state").textContent = differ ? "No clip holds both." : "Choose two different versions.";
  }
}

// The keys belong to the part of the page that was touched last.
byId("blind").addEventListener("focusin", () => (blindKeys = trial && trialKey));

byId("blind-start").addEventListener("click", start);
for (const [side, button] of Object.entries(hear)) button.addEventListener("click", () => listen(side));
byId("blind-stop").addEventListener("click", () => trial.deck.toggle());
for (const button of votes) button.addEventListener("click", () => vote(button.dataset.choice));
byId("blind-csv").addEventListener("click", saveCsv);
byId("blind-reset").addEventListener("click", () => {
  answers = [];
  store();
  showScore();
  if (trial) showTrial();
});
showScore();
