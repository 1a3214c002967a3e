// The page: who serves, what is said, and the form below.

import { isReady, servedModel } from "../shared/api.js";
import { byId, make } from "../shared/dom.js";
import { exchange } from "./exchange.js";
import { listExamples } from "./examples.js";
import { Attachments, part } from "./media.js";
import { choose, requestFields, startSettings, system, zoomOffered } from "./settings.js";
import { failure, userTurn } from "./view.js";

const NOTICE_MS = 6000;
const POLL_MS = 15000;

const log = byId("log");
const text = byId("text");
const attachments = new Attachments(notice);
let messages = [];
let running = null;

startSettings();
listExamples(async ({ file, question, ...choices }) => {
  choose(choices);
  attachments.take();
  await attachments.add([file]);
  text.value = question;
  send();
});

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
byId("stop").addEventListener("click", () => running?.abort());
byId("new-chat").addEventListener("click", () => {
  running?.abort();
  messages = [];
  log.replaceChildren();
  byId("welcome").hidden = false;
  text.focus();
});

showModel();
setInterval(showModel, POLL_MS);
text.focus();

/** Sends what the form holds. */
function send() {
  const said = text.value.trim();
  if (running || (!said && !attachments.any)) return;
  const files = attachments.take();
  text.value = "";
  byId("welcome").hidden = true;
  log.append(userTurn(said, files));
  const content = [...files.map(part), ...(said ? [{ type: "text", text: said }] : [])];
  messages.push({ role: "user", content });
  answer();
}

/** Has the model answer the last message. */
async function answer() {
  const turn = log.appendChild(make("li", { class: "theirs" }));
  const held = messages;
  running = new AbortController();
  busy(true);
  const unfollow = follow();
  try {
    await exchange(held, { system: system(), fields: requestFields(), zoom: zoomOffered(), signal: running.signal, turn });
  } catch (error) {
    if (error.name === undefined || !("status" in error)) console.error(error);
    const card = failure(error, () => {
      if (running) return;
      turn.remove();
      answer();
    });
    turn.append(card);
  } finally {
    running = null;
    busy(false);
    unfollow();
  }
}

function busy(on) {
  byId("send").hidden = on;
  byId("stop").hidden = !on;
  log.ariaBusy = String(on);
}

/** Keeps the end in sight while it grows, unless the reader scrolls away. Returns how to stop. */
function follow() {
  const scroll = byId("scroll");
  const toEnd = () => scroll.scrollTo({ top: scroll.scrollHeight });
  let near = true;
  const seen = () => (near = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80);
  scroll.addEventListener("scroll", seen);
  const watch = new ResizeObserver(() => near && toEnd());
  watch.observe(log);
  toEnd();
  return () => {
    // Pictures of the last step may still be loading.
    setTimeout(() => {
      watch.disconnect();
      scroll.removeEventListener("scroll", seen);
    }, 500);
  };
}

async function showModel() {
  const line = byId("model");
  try {
    const model = await servedModel();
    const ready = await isReady();
    line.className = ready ? "ready" : "away";
    line.replaceChildren(make("span", {}, ready ? model.id : `${model.id}, not ready yet`));
  } catch {
    line.className = "away";
    line.replaceChildren(make("span", {}, "not reachable"));
  }
}

function notice(words) {
  const line = byId("notice");
  line.textContent = words;
  line.hidden = false;
  setTimeout(() => (line.hidden = true), NOTICE_MS);
}
