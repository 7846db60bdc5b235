
"use strict";
// Asks for status.json once a second while the page is in view, and draws it. The server keeps no history: rates and
// quantiles are differences of its counters, taken here.

const POLL_MS = 1000;
// An answer that takes longer counts as none; the server ends every connection after three seconds.
const PATIENCE_MS = 3500;
// Two answers that are further apart have a pause between them: nothing is said of what was in it.
const PAUSE_S = 4 * POLL_MS / 1000;
// One answer may be lost; with this many the server is said to be gone.
const GONE_AFTER = 2;
// What the plots show, and what "now" is for rates and quantiles.
const SPAN_S = 300;
const RECENT_S = 5;
// From these times at one job on a worker's cell is filled further; the last is long enough to stand out.
const LEVELS_S = [0, 0.01, 0.1, 1, 10];
// A wait that is long whatever the jobs are.
const LONG_WAIT_S = 1;
const LONGEST_ROWS = 5;

// Numbers as a person reads them.

const grouped = new Intl.NumberFormat("en");

function count(n) {
  return grouped.format(Math.round(n));
}

function digits(x) {
  return x >= 100 ? x.toFixed(0) : x >= 10 ? x.toFixed(1) : x.toFixed(2);
}

function time(s) {
  if (s === null) return "–";
  if (s === Infinity) return "over 60 s";
  if (s === 0) return "0 s";
  // By what it is rounded to: there is no "1000 us".
  if (s < 0.0009995) return `${digits(s * 1e6)} us`;
  if (s < 0.9995) return `${digits(s * 1e3)} ms`;
  if (s < 59.95) return `${digits(s)} s`;
  const parts = [["d", 86400], ["h", 3600], ["m", 60], ["s", 1]];
  let rest = Math.floor(s + 0.05);
  const from = parts.findIndex(([, size]) => rest >= size);
  return parts.slice(from, from + 2).map(([unit, size]) => {
    const n = Math.floor(rest / size);
    rest -= n * size;
    return `${n} ${unit}`;
  }).join(" ");
}

// The same where it is a round number: "5 s", not "5.00 s".
function round(text) {
  return text.replace(/\.0+(?= )/, "");
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (bytes >= 1024 && at < units.length - 1) {
    bytes /= 1024;
    at += 1;
  }
  return `${at === 0 ? bytes.toFixed(0) : digits(bytes)} ${units[at]}`;
}

function clockTime() {
  return new Date().toTimeString().slice(0, 8);
}

function rate(perSecond) {
  if (perSecond === null) return "–";
  return perSecond > 0 && perSecond < 10 ? perSecond.toFixed(1) : count(perSecond);
}

function speed(perSecond) {
  return perSecond === null ? "–" : `${size(perSecond)}/s`;
}

function each(perSecond) {
  return `${rate(perSecond)}/s`;
}

function percent(share) {
  return share === null ? "–" : `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %`;
}

// From two answers to what happened between them.

function total(byName) {
  return Object.values(byName).reduce((sum, n) => sum + n, 0);
}

// The value that a share `q` of the counted durations does not exceed, by straight lines between the buckets' bounds as
// Prometheus' histogram_quantile() does; null without any, Infinity beyond the last bound.
function quantile(q, counts, bounds) {
  const rank = q * counts.reduce((sum, n) => sum + n, 0);
  if (rank === 0) return null;
  let below = 0;
  for (const [at, n] of counts.entries()) {
    if (n > 0 && below + n >= rank) {
      if (at === bounds.length) return Infinity;
      const lower = at === 0 ? 0 : bounds[at - 1];
      return lower + (bounds[at] - lower) * (rank - below) / n;
    }
    below += n;
  }
  return Infinity;
}

function between(before, after) {
  const seconds = after.uptime_seconds - before.uptime_seconds;
  const bounds = after.latency_bounds_seconds;
  const counts = (pick) => pick(after).counts.map((n, at) => n - pick(before).counts[at]);
  const rise = (pick) => pick(after) - pick(before);
  const echoes = counts((status) => status.echo_latency);
  const waits = counts((status) => status.pool.queue_wait);
  return {
    utilization: rise((status) => status.pool.busy_seconds_total) / seconds / after.limits.workers,
    echoes: echoes.reduce((sum, n) => sum + n, 0) / seconds,
    p50: quantile(0.5, echoes, bounds),
    p99: quantile(0.99, echoes, bounds),
    wait: quantile(0.99, waits, bounds),
    received: rise((status) => status.received_bytes_total) / seconds,
    sent: rise((status) => status.sent_bytes_total) / seconds,
    refused: rise((status) => total(status.connections.rejected_total)),
    panicked: rise((status) => status.pool.jobs_total.panicked),
    failed: rise((status) => total(status.accept_errors_total)),
    seconds,
  };
}

function open(status) {
  const { idle, queued, active, closing } = status.connections;
  return idle + queued + active + closing;
}

// Whether the workers are the bottleneck, in a sentence.
function verdict(status, recent) {
  const { busy, queue_depth: depth, queue_oldest_age_seconds: oldest, longest_running_seconds: longest } = status.pool;
  const workers = status.limits.workers;
  const stuck = longest >= LEVELS_S.at(-1) ? ` The longest job has run for ${time(longest)}.` : "";
  const waiting = depth === 0 ? "nothing waits" : `${count(depth)} ${depth === 1 ? "waits" : "wait"}, the oldest for ${time(oldest)}`;
  const used = recent ? recent.utilization : busy / workers;
  if (recent && recent.refused > 0) {
    return ["bad", `Clients are turned away: ${count(recent.refused)} in the last ${time(recent.seconds)}. ${count(busy)} of ${count(workers)} workers are busy, and ${waiting}.${stuck}`];
  }
  if (depth > 0 && busy >= Math.ceil(workers * 0.9) && (used >= 0.95 || oldest >= LONG_WAIT_S)) {
    return ["bad", `The workers are the bottleneck: ${count(busy)} of ${count(workers)} are busy, and ${waiting}.${stuck}`];
  }
  if (oldest >= LONG_WAIT_S || (oldest >= LEVELS_S[1] && depth > workers / 10)) {
    return ["warn", `${count(workers - busy)} of ${count(workers)} workers are idle, and yet ${waiting}: as a rule, the machine has no processor time to spare.${stuck}`];
  }
  if (used >= 0.7) {
    return ["warn", `The workers have little room: ${percent(used)} of their time is used, and ${waiting}.${stuck}`];
  }
  return [stuck ? "warn" : "calm", `The workers are not the bottleneck: ${percent(used)} of their time is used, and ${waiting}.${stuck}`];
}

// The page.

const at = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "g"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Changes an element only where it must: most of a page stays as it is from second to second.
function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function mark(element, level) {
  if (element.dataset.level !== level) element.dataset.level = level;
}

const TILES = [
  ["utilization", "Utilization", (now, recent) => [percent(recent ? recent.utilization : null), "of the workers' time, running jobs included", recent && recent.utilization >= 0.95 ? "warn" : "calm"]],
  ["busy", "Busy workers", (now) => [`${count(now.pool.busy)} of ${count(now.limits.workers)}`, `longest job ${time(now.pool.longest_running_seconds)}`, now.pool.longest_running_seconds >= LEVELS_S.at(-1) ? "bad" : "calm"]],
  ["depth", "Waiting for a worker", (now) => [count(now.pool.queue_depth), `oldest ${time(now.pool.queue_oldest_age_seconds)}`, now.pool.queue_depth > now.limits.workers || now.pool.queue_oldest_age_seconds >= LONG_WAIT_S ? "warn" : "calm"]],
  ["connections", "Connections", (now) => {
    const { idle, queued, active, closing } = now.connections;
    const more = `${count(idle)} idle, ${count(queued)} queued, ${count(active)} active, ${count(closing)} closing; limit ${count(now.limits.connections)}`;
    return [count(open(now)), more, open(now) >= now.limits.connections ? "bad" : "calm"];
  }],
  ["echoes", "Echoes a second", (now, recent) => [rate(recent ? recent.echoes : null), recent ? `${speed(recent.received)} in, ${speed(recent.sent)} out` : ""]],
  ["latency", "Echo latency, p99", (now, recent) => [time(recent ? recent.p99 : null), `p50 ${time(recent ? recent.p50 : null)}`]],
  ["wait", "Queue wait, p99", (now, recent) => [time(recent ? recent.wait : null), "ready until a worker took it"]],
  ["errors", "Errors since the start", (now, recent) => {
    const refused = total(now.connections.rejected_total);
    const panicked = now.pool.jobs_total.panicked;
    const failed = total(now.accept_errors_total);
    const lately = recent ? recent.refused + recent.panicked + recent.failed : 0;
    const more = `${count(refused)} refused, ${count(panicked)} panicked, ${count(failed)} accepts failed`;
    return [count(refused + panicked + failed), lately > 0 ? `${more}; ${count(lately)} just now` : more, lately > 0 ? "bad" : "calm"];
  }],
];

const PLOTS = [
  { title: "Utilization", top: 1, series: [["used", (point) => point.recent.utilization, percent]] },
  { title: "Queue", series: [["waiting", (point) => point.depth, count], ["oldest", (point) => point.oldest, time]] },
  { title: "Echo latency", series: [["p50", (point) => point.recent.p50, time], ["p99", (point) => point.recent.p99, time]] },
  { title: "Traffic", series: [["echoes", (point) => point.recent.echoes, each], ["refused", (point) => point.recent.refused / point.recent.seconds, each]] },
  { title: "Connections", series: [["open", (point) => point.open, count], ["queued or active", (point) => point.occupied, count]] },
  { title: "Bytes", series: [["in", (point) => point.recent.received, speed], ["out", (point) => point.recent.sent, speed]] },
];

function addTiles() {
  for (const [id, title] of TILES) {
    const tile = make("div", { class: "tile", id: `tile-${id}` }, make("dt"), make("dd", { class: "value" }), make("dd", { class: "more" }));
    tile.firstChild.textContent = title;
    at("tiles").append(tile);
  }
}

function drawTiles(now, recent) {
  for (const [id, , tell] of TILES) {
    const [value, more, level] = tell(now, recent);
    const tile = at(`tile-${id}`);
    write(tile.children[1], value);
    write(tile.children[2], more);
    mark(tile, level || "calm");
  }
}

// A plot's place in its own units: the drawing is scaled to the width there is.
const WIDE = 420, HIGH = 130, LEFT = 62, RIGHT = 372, TOP = 10, BOTTOM = 112;

function addPlots() {
  for (const plot of PLOTS) {
    plot.values = plot.series.map(() => make("span"));
    const caption = make("figcaption", {}, make("b", {}, plot.title));
    plot.series.forEach(([name], n) => {
      caption.append(make("span", {}, make("i", { class: n ? "key two" : "key" }), `${name} `, plot.values[n]));
    });
    plot.paths = plot.series.map((_, n) => make("path", { class: n ? "two" : "one" }));
    plot.left = [make("text", { x: LEFT - 5, y: TOP + 4, "text-anchor": "end" }), make("text", { x: LEFT - 5, y: BOTTOM, "text-anchor": "end" })];
    plot.right = [make("text", { x: RIGHT + 5, y: TOP + 4 }), make("text", { x: RIGHT + 5, y: BOTTOM })];
    plot.cursor = make("line", { class: "cursor", y1: TOP, y2: BOTTOM, visibility: "hidden" });
    const grid = [TOP, (TOP + BOTTOM) / 2, BOTTOM].map((y) => make("line", { class: "grid", x1: LEFT, x2: RIGHT, y1: y, y2: y }));
    plot.from = make("text", { x: LEFT, y: HIGH - 4 });
    const now = make("text", { x: RIGHT, y: HIGH - 4, "text-anchor": "end" }, "now");
    plot.svg = make("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", "aria-label": `${plot.title}: nothing to show yet` }, ...grid, ...plot.left, ...plot.right, plot.from, now, ...plot.paths, plot.cursor);
    plot.svg.addEventListener("pointermove", (event) => {
      const box = plot.svg.getBoundingClientRect();
      const share = ((event.clientX - box.left) / box.width * WIDE - LEFT) / (RIGHT - LEFT);
      pointedAt = share >= 0 && share <= 1 ? 1 - share : null;
      drawPlots();
    });
    plot.svg.addEventListener("pointerleave", () => {
      pointedAt = null;
      drawPlots();
    });
    at("plots").append(make("figure", { class: "plot" }, caption, plot.svg));
  }
}

// The smallest of 1, 2, 5, 10, 20 ... that holds `x`; of bytes, in the unit they are written in.
function roundUp(x, tell) {
  const unit = tell === speed ? 1024 ** Math.floor(Math.log2(Math.max(x, 1)) / 10) : 1;
  const step = unit * 10 ** Math.floor(Math.log10(x / unit));
  return [1, 2, 5, 10].map((n) => n * step).find((n) => n >= x * 0.999) || x;
}

// How much time the plots show: less than all at first, so that there is something to see.
function span() {
  const seen = points.at(-1).at - points[0].at;
  return [60, 120, SPAN_S].find((s) => s >= seen) || SPAN_S;
}

// A path through the points, with a gap where nothing is known.
function line(pick, top, shown) {
  const latest = points.at(-1).at;
  let path = "";
  let last = null;
  for (const point of points) {
    const value = pick(point);
    if (value === null) {
      last = null;
      continue;
    }
    const x = RIGHT - (latest - point.at) / shown * (RIGHT - LEFT);
    const y = BOTTOM - Math.min(value / top, 1) * (BOTTOM - TOP);
    const joined = last !== null && point.at - last <= PAUSE_S;
    path += `${joined ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}${joined ? "" : "h0.1"}`;
    last = point.at;
  }
  return path;
}

function drawPlots() {
  if (points.length === 0) return;
  const latest = points.at(-1).at;
  const shown = span();
  let pointed = points.at(-1);
  if (pointedAt !== null) {
    const distance = (point) => Math.abs(latest - point.at - pointedAt * shown);
    pointed = points.reduce((best, point) => distance(point) < distance(best) ? point : best);
  }
  for (const plot of PLOTS) {
    const tops = plot.series.map(([, pick, tell]) => plot.top || roundUp(points.reduce((most, point) => {
      const value = pick(point);
      return Number.isFinite(value) ? Math.max(most, value) : most;
    }, 0) || 1, tell));
    // Two series share their scale where they share their unit.
    const apart = plot.series.length === 2 && plot.series[0][2] !== plot.series[1][2];
    if (!apart) tops.fill(Math.max(...tops));
    plot.series.forEach(([, pick, tell], n) => {
      plot.paths[n].setAttribute("d", line(pick, tops[n], shown));
      write(plot.values[n], tell(pick(pointed)));
    });
    write(plot.left[0], round(plot.series[0][2](tops[0])));
    write(plot.left[1], "0");
    write(plot.right[0], apart ? round(plot.series[1][2](tops[1])) : "");
    write(plot.right[1], apart ? "0" : "");
    plot.svg.setAttribute("aria-label", `${plot.title} over the last ${shown / 60} min; now ${plot.series.map(([name, pick, tell]) => `${name} ${tell(pick(points.at(-1)))}`).join(", ")}`);
    write(plot.from, `${shown / 60} min ago`);
    plot.cursor.setAttribute("visibility", pointedAt === null ? "hidden" : "visible");
    const x = RIGHT - (latest - pointed.at) / shown * (RIGHT - LEFT);
    plot.cursor.setAttribute("x1", x);
    plot.cursor.setAttribute("x2", x);
  }
}

// The scoreboard.

function level(worker, now) {
  if (worker.state === "idle") return 0;
  return LEVELS_S.filter((s) => now.uptime_seconds - worker.since_seconds >= s).length || 1;
}

const LEVELS = ["idle", "busy for under 10 ms", "under 100 ms", "under 1 s", "under 10 s", "longer"];

function addLegend() {
  LEVELS.forEach((name, n) => at("legend").append(make("li", {}, make("span", { class: "cell", "data-level": n }), name)));
}

function describe(number) {
  const worker = latestStatus.workers[number];
  const lasted = time(Math.max(0, latestStatus.uptime_seconds - worker.since_seconds));
  const jobs = `${count(worker.jobs)} ${worker.jobs === 1 ? "job" : "jobs"} so far`;
  if (worker.state === "idle") return `Worker ${number}: idle for ${lasted}, ${jobs}`;
  const whom = worker.peer ? `, connection ${count(worker.connection)} from ${worker.peer}, ${size(worker.turn_bytes)} read in this turn` : "";
  return `Worker ${number}: busy for ${lasted}${whom}, ${jobs}`;
}

function drawBoard(now) {
  const board = at("board");
  const workers = now.workers;
  if (board.children.length !== workers.length) {
    const cell = workers.length <= 64 ? 30 : workers.length <= 256 ? 24 : workers.length <= 1024 ? 15 : 11;
    board.style.setProperty("--cell", `${cell}px`);
    board.dataset.size = cell >= 24 ? "large" : "small";
    board.replaceChildren(...workers.map((_, n) => make("div", { class: "cell", role: "option", id: `worker-${n}`, "aria-selected": "false" })));
    activate(null);
  }
  let number = 0;
  for (const cell of board.children) {
    const found = String(level(workers[number], now));
    if (cell.dataset.level !== found) {
      cell.dataset.level = found;
      label(cell, number);
    }
    number += 1;
  }
  const busy = workers.filter((worker) => worker.state === "busy").length;
  write(at("board-summary"), `${count(busy)} busy, ${count(workers.length - busy)} idle`);
  tellActive();
  drawLongest(now);
}

function drawLongest(now) {
  const rows = now.workers
    .map((worker, number) => ({ ...worker, number, lasted: now.uptime_seconds - worker.since_seconds }))
    .filter((worker) => worker.state === "busy" && worker.lasted >= LEVELS_S[3])
    .sort((one, other) => other.lasted - one.lasted)
    .slice(0, LONGEST_ROWS);
  at("longest").hidden = rows.length === 0;
  at("longest").tBodies[0].replaceChildren(...rows.map((row) => make("tr", {}, ...[
    String(row.number), time(row.lasted), row.peer ? count(row.connection) : "–", row.peer || "–", row.peer ? size(row.turn_bytes) : "–",
  ].map((text) => make("td", {}, text)))));
}

// What a cell is called while nobody looks at it closely.
function label(cell, number) {
  const found = Number(cell.dataset.level);
  cell.setAttribute("aria-label", `Worker ${number}: ${found > 1 ? "busy for " : ""}${LEVELS[found]}`);
}

function activate(number) {
  if (number !== null && number === active) return;
  const board = at("board");
  const before = active === null ? null : at(`worker-${active}`);
  if (before) {
    delete before.dataset.active;
    before.setAttribute("aria-selected", "false");
    label(before, active);
  }
  active = number;
  if (number === null) {
    board.removeAttribute("aria-activedescendant");
    return;
  }
  const cell = at(`worker-${number}`);
  cell.dataset.active = "";
  cell.setAttribute("aria-selected", "true");
  board.setAttribute("aria-activedescendant", cell.id);
  tellActive();
}

function tellActive() {
  if (active === null) return;
  const text = describe(active);
  write(at("detail"), text);
  at(`worker-${active}`).setAttribute("aria-label", text);
}

function listenToBoard() {
  const board = at("board");
  const point = (event) => {
    if (event.target.id.startsWith("worker-")) activate(Number(event.target.id.slice(7)));
  };
  // Not `pointerover`, which also comes when the page moves under a pointer at rest.
  board.addEventListener("pointermove", point);
  board.addEventListener("pointerdown", point);
  board.addEventListener("focus", () => {
    if (active === null && board.children.length > 0) activate(0);
  });
  board.addEventListener("keydown", (event) => {
    const cells = board.children;
    if (cells.length === 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    const across = getComputedStyle(board).gridTemplateColumns.split(" ").length;
    const here = active === null ? 0 : active;
    const to = { ArrowLeft: here - 1, ArrowRight: here + 1, ArrowUp: here - across, ArrowDown: here + across, Home: 0, End: cells.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    if (to < 0 || to >= cells.length) return;
    activate(to);
    cells[to].scrollIntoView({ block: "nearest" });
  });
}

// What has come so far. `answers` are those of the last seconds, `points` what the plots show.
let latestStatus = null;
let answers = [];
let points = [];
let missed = 0;
let answeredAt = null;
let active = null;
// Where the pointer is over a plot: 0 is now, 1 the beginning.
let pointedAt = null;

const PHASES = { serving: ["serving", "calm"], lame_duck: ["lame duck", "warn"], draining: ["draining", "bad"], stopped: ["stopped", "bad"] };

function draw(now) {
  if (latestStatus !== null && now.started_timestamp_seconds !== latestStatus.started_timestamp_seconds) {
    // Another server.
    answers = [];
    points = [];
  }
  if (answers.length > 0 && now.uptime_seconds - answers.at(-1).uptime_seconds > PAUSE_S) {
    // What happened while nobody looked is not what happens now.
    answers = [];
  }
  const before = answers.at(-1);
  latestStatus = now;
  answers.push(now);
  // One from before the window stays, for its start.
  while (answers.length > 2 && now.uptime_seconds - answers[1].uptime_seconds >= RECENT_S) answers.shift();
  const recent = before ? between(answers[0], now) : null;
  if (before) {
    const { queued, active: served } = now.connections;
    points.push({ at: now.uptime_seconds, recent: between(before, now), depth: now.pool.queue_depth, oldest: now.pool.queue_oldest_age_seconds, open: open(now), occupied: queued + served });
    while (now.uptime_seconds - points[0].at > SPAN_S) points.shift();
  }
  const [phase, grade] = PHASES[now.phase] || [now.phase, "warn"];
  write(at("server"), now.server);
  write(at("version"), `${now.version} (${now.revision})`);
  write(at("uptime"), time(now.uptime_seconds));
  write(at("as-of"), clockTime());
  write(at("phase"), phase);
  mark(at("phase"), grade);
  const [weight, sentence] = verdict(now, recent);
  write(at("verdict"), `${{ calm: "✓", warn: "▲", bad: "■" }[weight]} ${sentence}`);
  mark(at("verdict"), weight);
  drawTiles(now, recent);
  drawBoard(now);
  drawPlots();
}

// What stands over everything else, if anything does.
function drawBanner() {
  const now = latestStatus;
  let [kind, text, grade] = ["", "", "bad"];
  if (missed >= GONE_AFTER) {
    kind = "Gone";
    text = now === null ? "No answer yet from the server; trying on."
      : `Gone: no answer since ${answeredAt}. What stands below is the last picture; trying on.`;
  } else if (now !== null && now.unhealthy !== null) {
    kind = "Unhealthy";
    text = `Unhealthy: ${now.unhealthy}.`;
  } else if (now !== null && now.phase === "lame_duck") {
    kind = "Lame duck";
    text = `Lame duck: not ready for new work, and still taking it. The drain begins in ${left(now)}.`;
    grade = "warn";
  } else if (now !== null && now.phase === "draining") {
    const still = open(now);
    kind = "Draining";
    text = `Draining: ${left(now)} left, then what is open is cut. ${count(still)} ${still === 1 ? "connection is" : "connections are"} open.`;
  } else if (now !== null && now.not_ready !== null) {
    kind = "Not ready for new work";
    text = `${kind}: ${now.not_ready}.`;
    grade = "warn";
  }
  const banner = at("banner");
  banner.hidden = text === "";
  write(banner, text);
  mark(banner, grade);
  // Read aloud once, and not every second with the time that is left.
  write(at("announcement"), kind);
  document.body.classList.toggle("gone", missed >= GONE_AFTER);
  const sign = missed >= GONE_AFTER ? "✕ " : now !== null && now.phase !== "serving" ? "▼ " : "";
  document.title = `${sign}millpond${now === null ? "" : ` ${now.server}`}`;
}

function left(now) {
  return round(time(Math.max(0, Math.ceil(now.phase_until_seconds - now.uptime_seconds))));
}

// Asking.

let timer = null;
let asking = false;

async function ask() {
  const begun = performance.now();
  asking = true;
  timer = null;
  const now = await answer();
  asking = false;
  askAgain(Math.max(0, POLL_MS - (performance.now() - begun)));
  if (now !== null && drawn(now)) {
    missed = 0;
    answeredAt = clockTime();
  } else {
    missed += 1;
  }
  drawBanner();
}

// Whether it could be drawn: an answer of another shape is as good as none.
function drawn(now) {
  try {
    draw(now);
    return true;
  } catch (error) {
    console.error(error);
    return false;
  }
}

// The status, or null where none is to be had.
async function answer() {
  try {
    const response = await fetch("status.json", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    return response.ok ? await response.json() : null;
  } catch {
    return null;
  }
}

// Nobody looks at a hidden page, so it asks nothing.
function askAgain(inMs) {
  if (!document.hidden && !asking && timer === null) timer = setTimeout(ask, inMs);
}

document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  timer = null;
  askAgain(0);
});

addTiles();
addLegend();
addPlots();
listenToBoard();
askAgain(0);
