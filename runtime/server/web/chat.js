// The chat of the page: one conversation, streamed from /v1/chat/completions.

import { ApiError, events, key, post, request, setKey } from "./api.js";
import { startGauges } from "./gauges.js";
import { make, render } from "./text.js";
import { startTheme } from "./theme.js";

const element = (id) => document.getElementById(id);
const log = element("log");
const prompt = element("prompt");
const send = element("send");
const welcome = element("welcome");
let messages = [];
let running = null;

// --- the model and the API key ---

async function connect() {
  const select = element("model");
  try {
    const { data } = await (await request("v1/models")).json();
    select.replaceChildren(...data.map(({ id }) => new Option(id.split("/").pop(), id)));
    select.disabled = data.length < 2;
    prompt.placeholder = `Message ${select.selectedOptions[0].text}`;
    say("");
  } catch (error) {
    if (error.status === 401) askForKey();
    else {
      say("The server is starting; trying again.");
      setTimeout(connect, 2000);
    }
  }
}

function askForKey() {
  element("key-note").textContent = key()
    ? "The server does not accept this key."
    : "This server asks for a key. It is kept in this tab until it is closed.";
  openKey();
}

function openKey() {
  element("key").hidden = false;
  element("key-value").value = key();
  if (!element("key-dialog").open) element("key-dialog").showModal();
  element("key-value").select();
}

element("key").addEventListener("click", () => {
  element("key-note").textContent = "The key is kept in this tab until it is closed.";
  openKey();
});
element("key-value").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault(); // the first button of the form would cancel
  element("key-dialog").close("save");
});
element("key-dialog").addEventListener("close", () => {
  if (element("key-dialog").returnValue === "save") {
    setKey(element("key-value").value.trim());
    connect();
  }
  element("key-dialog").returnValue = "";
  prompt.focus();
});

// --- the conversation ---

const say = (text) => (element("status").textContent = text);

function isAtEnd() {
  return log.scrollHeight - log.scrollTop - log.clientHeight < 60;
}

function addUser(text) {
  welcome.hidden = true;
  element("clear").hidden = false;
  const message = make("article", "message user");
  message.setAttribute("aria-label", "You");
  message.append(make("div", "body", text));
  log.append(message);
  log.scrollTop = log.scrollHeight;
}

class Answer {
  constructor() {
    this.text = "";
    this.reasoning = "";
    this.calls = [];
    this.reason = null;
    this.usage = null;
    this.start = performance.now();
    this.first = null;
    this.notes = [];
    this.message = make("article", "message assistant");
    this.message.setAttribute("aria-label", "Answer");
    this.message.setAttribute("aria-busy", "true");
    const icon = make("img");
    Object.assign(icon, { src: "web/icon.svg", alt: "", width: 28, height: 28 });
    this.content = make("div");
    this.content.append(make("div", "body"));
    this.message.append(icon, this.content);
    log.append(this.message);
    this.isDrawn = true;
  }

  add(event) {
    if (event.usage) this.usage = event.usage;
    const [choice] = event.choices;
    if (!choice) return;
    const { content, reasoning, tool_calls: calls = [] } = choice.delta;
    if (this.first === null && (content || reasoning || calls.length)) this.first = performance.now();
    this.text += content ?? "";
    this.reasoning += reasoning ?? "";
    for (const call of calls) {
      this.calls[call.index] ??= { id: call.id, name: "", arguments: "" };
      this.calls[call.index].name += call.function?.name ?? "";
      this.calls[call.index].arguments += call.function?.arguments ?? "";
    }
    if (choice.finish_reason) this.reason = choice.finish_reason;
    this.drawSoon();
  }

  // At most once per frame, however fast the tokens arrive.
  drawSoon() {
    if (!this.isDrawn) return;
    this.isDrawn = false;
    requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.isDrawn = true;
    const follows = isAtEnd();
    const wasOpen = this.content.querySelector("details")?.open ?? true;
    const parts = this.text ? render(this.text) : this.reason === null && !this.notes.length ? [make("div", "body")] : [];
    const calls = this.calls.map((call) => {
      const block = make("pre");
      block.append(make("code", "", `${call.name}(${call.arguments})`));
      return block;
    });
    if (this.reasoning) {
      const details = make("details");
      details.open = wasOpen;
      details.append(make("summary", "", "Reasoning"), make("div", "body", this.reasoning.trim()));
      parts.unshift(details);
    }
    this.content.replaceChildren(...parts, ...calls, ...this.notes);
    if (follows) log.scrollTop = log.scrollHeight;
  }

  end(error) {
    this.message.setAttribute("aria-busy", "false");
    if (error) this.notes.push(make("div", "error", error));
    const facts = this.facts(error);
    if (facts) this.notes.push(make("div", "facts", facts));
    this.draw();
  }

  facts(error) {
    if (this.first === null) return error ? "" : "stopped";
    const seconds = (performance.now() - this.first) / 1e3;
    const count = this.usage?.completion_tokens;
    const parts = [`first token after ${Math.round(this.first - this.start)} ms`];
    if (count > 1) parts.unshift(`${count} tokens`, `${Math.round((count - 1) / seconds)} tokens/s`);
    if (this.reason === "length") parts.push("cut at the most tokens");
    if (this.reason === null) parts.push("stopped");
    return parts.join(" · ");
  }
}

function body() {
  const system = element("system").value.trim();
  const temperature = Number(element("temperature").value);
  return {
    model: element("model").value,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    max_tokens: Number(element("max-tokens").value) || null,
    ...(temperature >= 0 ? { temperature } : {}),
    stream: true,
    stream_options: { include_usage: true },
  };
}

function explain(error) {
  if (error.name === "AbortError") return null;
  if (error instanceof ApiError && error.status === 429) return `${error.message} (Retry-After: ${error.retryAfter} s)`;
  return error.message;
}

async function ask(text) {
  messages.push({ role: "user", content: text });
  addUser(text);
  const answer = new Answer();
  running = new AbortController();
  setSending(true);
  let problem = null;
  try {
    const response = await post("v1/chat/completions", body(), running.signal);
    for await (const event of events(response)) answer.add(event);
  } catch (error) {
    problem = explain(error);
    if (error.status === 401) askForKey();
  }
  running = null;
  answer.end(problem);
  if (answer.text) messages.push({ role: "assistant", content: answer.text });
  else messages.pop();
  setSending(false);
  say(problem ? "The answer has failed." : "");
}

function setSending(isSending) {
  send.classList.toggle("stops", isSending);
  send.setAttribute("aria-label", isSending ? "Stop" : "Send");
  if (isSending) say("Answering…");
}

const stop = () => running?.abort();

// --- input ---

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

element("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return stop();
  const text = prompt.value.trim();
  if (!text) return;
  prompt.value = "";
  grow();
  ask(text);
});
prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) element("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
document.querySelectorAll(".ideas button").forEach((button) =>
  button.addEventListener("click", () => {
    ask(button.textContent);
    prompt.focus();
  }),
);
element("clear").addEventListener("click", () => {
  stop();
  messages = [];
  log.querySelectorAll(".message").forEach((message) => message.remove());
  welcome.hidden = false;
  element("clear").hidden = true;
  say("New chat.");
  prompt.focus();
});
element("temperature").addEventListener("input", ({ target }) => {
  element("temperature-value").textContent = Number(target.value) < 0 ? "default" : Number(target.value).toFixed(1);
});
element("show-engine").addEventListener("click", ({ currentTarget }) => {
  const isOpen = element("engine").classList.toggle("open");
  currentTarget.setAttribute("aria-expanded", isOpen);
});

element("key").hidden = !key();
connect();
startGauges();
startTheme();
