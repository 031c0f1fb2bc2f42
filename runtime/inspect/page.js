const data = JSON.parse(document.getElementById("data").textContent);
const tabs = [...document.querySelectorAll("[role=tab]")];
const panels = [...document.querySelectorAll("[role=tabpanel]")];
const aside = document.querySelector("aside");

function open(i) {
  tabs.forEach((tab, k) => tab.setAttribute("aria-selected", k === i));
  panels.forEach((panel, k) => { panel.hidden = k !== i; });
}

function show(node) {
  document.querySelectorAll(".chosen").forEach(other => other.classList.remove("chosen"));
  const panel = node.closest("[role=tabpanel]");
  panel.querySelectorAll(`.node[data-i="${node.dataset.i}"]`).forEach(same => same.classList.add("chosen"));
  const list = document.createElement("dl");
  for (const [label, value] of Object.entries(data[panels.indexOf(panel)][node.dataset.i])) {
    const lines = [].concat(value).filter(line => line !== "");
    if (!lines.length) continue;
    list.appendChild(document.createElement("dt")).textContent = label;
    for (const line of lines) list.appendChild(document.createElement("dd")).textContent = line;
  }
  aside.replaceChildren(list);
}

// The address names a step and a node: #g2/5
function follow() {
  const [, step, node] = location.hash.match(/^#g(\d+)(?:\/(\d+))?$/) || [];
  if (step === undefined || !panels[step]) return;
  open(Number(step));
  const found = node === undefined ? null : panels[step].querySelector(`.node[data-i="${node}"]`);
  if (found) show(found);
}

tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => open(i));
  tab.addEventListener("keydown", event => {
    const next = { ArrowDown: i + 1, ArrowUp: i - 1 }[event.key];
    if (tabs[next]) { tabs[next].focus(); open(next); event.preventDefault(); }
  });
});
document.querySelectorAll(".node").forEach(node => {
  node.addEventListener("click", () => show(node));
  node.addEventListener("keydown", event => { if (event.key === "Enter") show(node); });
});
addEventListener("hashchange", follow);
follow();
