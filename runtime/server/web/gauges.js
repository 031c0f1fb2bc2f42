// Gauges of the engine, from /metrics: phases, KV blocks and requests, once a second while the page is visible.

const SECONDS = 1;
const NUM_SAMPLES = 60;
const element = (id) => document.getElementById(id);
const numbers = new Intl.NumberFormat("en");
const rates = { prefill: [], decode: [] };
let previous = null;

// The samples of a page in Prometheus' text format: name without its prefix, labels, value.
function* samples(page) {
  for (const line of page.split("\n")) {
    const match = /^(?:\w+:)?(\w+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[name] = value;
    yield [match[1], labels, Number(match[3])];
  }
}

function read(page) {
  const found = { blocks: {}, phases: {}, refused: 0, workers: [], mode: "" };
  for (const [name, labels, value] of samples(page)) {
    if (name === "kv_blocks") found.blocks[labels.state] = value;
    else if (name === "phase_tokens_total") found.phases[labels.phase] = value;
    else if (name === "admission_rejections_total") found.refused += value;
    else if (name === "pd_worker_requests") found.workers.push({ ...labels, requests: value });
    else if (name === "pd_mode" && value) found.mode = labels.mode;
    else if (!labels.le) found[name] = value;
  }
  return found;
}

function drawSpark(id, values) {
  const svg = element(id);
  const top = Math.max(1, ...values);
  const step = 120 / (NUM_SAMPLES - 1);
  const x = (i) => (120 - (values.length - 1 - i) * step).toFixed(1);
  const y = (value) => (31 - 29 * (value / top)).toFixed(1);
  const line = values.map((value, i) => `${i ? "L" : "M"}${x(i)} ${y(value)}`).join("");
  svg.innerHTML = `<path class="area" d="${line}L120 32L${x(0)} 32Z"/><path d="${line}"/>`;
}

function showPhases(now, seconds) {
  for (const phase of ["prefill", "decode"]) {
    const tokens = Math.max(0, (now.phases[phase] ?? 0) - (previous?.phases[phase] ?? now.phases[phase] ?? 0));
    const rate = Math.round(tokens / seconds);
    rates[phase] = [...rates[phase], rate].slice(-NUM_SAMPLES);
    element(`${phase}-rate`).textContent = numbers.format(rate);
    drawSpark(`${phase}-spark`, rates[phase]);
  }
  element("mode").hidden = !now.mode;
  element("mode").textContent = now.mode.replace("_", " ");
}

function showBlocks({ used = 0, cached = 0, free = 0 }) {
  const total = used + cached + free || 1;
  const bar = element("kv");
  bar.querySelector(".used").style.width = `${(100 * used) / total}%`;
  bar.querySelector(".cached").style.width = `${(100 * cached) / total}%`;
  bar.setAttribute("aria-valuemax", used + cached + free);
  bar.setAttribute("aria-valuenow", used);
  bar.setAttribute("aria-valuetext", `${used} used and ${cached} cached of ${used + cached + free} blocks`);
  for (const [name, value] of Object.entries({ used, cached, free })) element(`kv-${name}`).textContent = numbers.format(value);
}

const milliseconds = (sum, count) => (count ? `${((1e3 * sum) / count).toPrecision(3)} ms` : "–");

function showRequests(now) {
  element("running").textContent = now.num_requests_running ?? 0;
  element("waiting").textContent = now.num_requests_waiting ?? 0;
  element("queued").textContent = now.num_requests_queued ?? 0;
  element("refused").textContent = numbers.format(now.refused);
  element("ttft").textContent = milliseconds(now.time_to_first_token_seconds_sum, now.time_to_first_token_seconds_count);
  element("itl").textContent = milliseconds(now.inter_token_latency_seconds_sum, now.inter_token_latency_seconds_count);
  const queries = now.prefix_cache_queries_total;
  element("hits").textContent = queries ? `${Math.round((100 * now.prefix_cache_hits_total) / queries)} %` : "–";
}

function showWorkers(workers) {
  element("workers").hidden = !workers.length;
  element("workers").replaceChildren(
    ...workers.map(({ role, worker, state, requests }) => {
      const row = document.createElement("div");
      const name = document.createElement("span");
      name.textContent = `${role} worker ${worker}${state === "running" ? "" : `, ${state}`}`;
      const count = document.createElement("b");
      count.textContent = requests;
      row.append(name, count);
      return row;
    }),
  );
}

async function update() {
  const aside = element("engine");
  try {
    const response = await fetch("metrics");
    if (!response.ok) throw new Error(`HTTP ${response.status}`);
    const time = performance.now();
    const now = { ...read(await response.text()), time };
    showPhases(now, previous ? (time - previous.time) / 1e3 : SECONDS);
    showBlocks(now.blocks);
    showRequests(now);
    showWorkers(now.workers);
    previous = now;
    aside.classList.remove("offline");
  } catch {
    previous = null;
    aside.classList.add("offline");
  }
}

export function startGauges() {
  const loop = async () => {
    if (!document.hidden) await update();
    setTimeout(loop, 1e3 * SECONDS);
  };
  loop();
}
