// How turns look. A step is one reply of the model: thinking, answer, looks at pictures, and its cost.

import { findBoxes } from "./boxes.js";
import { draw, make } from "../shared/dom.js";
import { seconds } from "../shared/words.js";
import { rendered } from "./markdown.js";
import { shown } from "./media.js";

const BOX_COLOURS = 6;

/** The turn of the user. */
export function userTurn(text, files) {
  const turn = make("li", { class: "mine" });
  if (files.length) turn.append(make("div", { class: "media" }, ...files.map(shown)));
  if (text) turn.append(make("div", { class: "said" }, text));
  return turn;
}

/** One reply of the model, which grows. */
export class Step {
  constructor() {
    this.element = make("div", { class: "step" });
    this.waiting = make("div", { class: "waiting" }, "Reading");
    this.element.append(this.waiting);
    this.began = performance.now();
  }

  /** Shows what has come so far, at most once a frame. */
  show(reply) {
    this.reply = reply;
    this.frame ??= requestAnimationFrame(() => this.#draw());
  }

  /** Shows the whole reply: thinking folded, boxes drawn on `picture`, its cost below. */
  end(reply, picture) {
    cancelAnimationFrame(this.frame);
    this.reply = reply;
    this.#draw();
    this.waiting.remove();
    if (this.thinking) this.thinking.open = false;
    const boxes = picture ? findBoxes(reply.text) : [];
    if (boxes.length) this.element.append(pictured(picture, boxes));
    if (reply.usage) this.element.append(cost(reply));
  }

  #draw() {
    this.frame = null;
    const { reasoning, text } = this.reply;
    if (reasoning) this.#think(reasoning, Boolean(text));
    if (text) {
      this.answer ??= this.element.appendChild(make("div", { class: "answer" }));
      this.answer.replaceChildren(...rendered(text));
    }
    this.waiting.textContent = this.reply.calls.length ? "Looking closer" : reasoning && !text ? "Thinking" : "Writing";
    this.element.append(this.waiting);
  }

  #think(reasoning, answering) {
    if (!this.thinking) {
      this.summary = make("summary", {}, "Thinking");
      this.thought = make("div");
      this.thinking = this.element.appendChild(make("details", { class: "thinking", open: true }, this.summary, this.thought));
    }
    this.thought.textContent = reasoning.trim();
    if (answering && !this.thoughtFor) {
      this.thoughtFor = performance.now() - this.began;
      this.summary.textContent = `Thought for ${(this.thoughtFor / 1000).toFixed(1)} s`;
      this.thinking.open = false;
    }
  }
}

/** A look at a part of a picture: the picture with the part marked, and the part. */
export function lookCard(call, look, pictures) {
  const card = make("div", { class: "look" });
  const asked = make("code", {}, `${call.function.name}(${call.function.arguments})`);
  if (look.error) {
    card.append(make("p", { class: "failed" }, make("b", {}, "Could not look closer: "), look.error), asked);
    return card;
  }
  const box = { corners: look.corners, label: look.label };
  card.append(
    make("p", {}, make("b", {}, "Looked closer"), ` at picture ${look.picture + 1} `, asked),
    make(
      "div",
      { class: "views" },
      make("figure", {}, pictured(pictures[look.picture].url, [box]), make("figcaption", {}, `Picture ${look.picture + 1}`)),
      make("figure", {}, pictured(look.url, []), make("figcaption", {}, "What the model was shown")),
    ),
  );
  return card;
}

/** A call of a tool that nobody here carries out. */
export function callCard(call) {
  return make("div", { class: "look" }, make("code", {}, `${call.function.name}(${call.function.arguments})`));
}

/** What went wrong, with a way to try again. */
export function failure(error, retry) {
  const card = make("div", { class: "failure" }, make("div", {}, error.message));
  const again = make("button", { type: "button" }, error.retryAfterS ? `Try again in ${error.retryAfterS} s` : "Try again");
  if (error.retryAfterS) {
    again.disabled = true;
    setTimeout(() => {
      again.disabled = false;
      again.textContent = "Try again";
    }, error.retryAfterS * 1000);
  }
  again.addEventListener("click", retry);
  card.append(again);
  return card;
}

export const aside = (text) => make("p", { class: "aside" }, text);

/** A picture with boxes drawn on it; those of one label have one colour. */
function pictured(url, boxes) {
  const holder = make("div", { class: "pictured" }, make("img", { src: url, alt: boxes.length ? described(boxes) : "A part of a picture" }));
  const drawing = draw("svg", { viewBox: "0 0 1000 1000", preserveAspectRatio: "none", "aria-hidden": "true" });
  holder.append(drawing);
  const labels = [...new Set(boxes.map((box) => box.label))];
  for (const { corners, label } of boxes) {
    const [x1, y1, x2, y2] = corners;
    const colour = `box-${labels.indexOf(label) % BOX_COLOURS}`;
    // A white line below the coloured one: a box is seen on any ground.
    for (const look of ["halo", colour]) {
      drawing.append(draw("rect", { x: x1, y: y1, width: x2 - x1, height: y2 - y1, class: look }));
    }
    if (label) {
      const tag = make("span", { class: colour }, label);
      tag.style.left = `${x1 / 10}%`;
      tag.style.top = `${y1 / 10}%`;
      holder.append(tag);
    }
  }
  return holder;
}

function described(boxes) {
  const names = boxes.map(({ corners, label }) => `${label || "a box"} at ${corners.map(Math.round).join(", ")}`);
  return `The picture, marked: ${names.join("; ")}`;
}

/** Where the time of one request went, stage by stage, and its tokens. */
function cost({ usage, timings, finishReason }) {
  const box = make("div", { class: "cost" });
  if (timings) {
    const stages = Object.entries(timings.exposed);
    const total = stages.reduce((sum, [, time]) => sum + time, 0);
    const bar = make("div", { class: "bar", ariaHidden: "true" });
    const list = make("ul", { ariaLabel: "Where the time went" });
    for (const [stage, time] of stages) {
      const piece = make("i", { class: stage });
      piece.style.flexGrow = total > 0 ? time / total : 0;
      bar.append(piece);
      list.append(make("li", { class: stage }, `${stage} ${seconds(time)}`));
    }
    box.append(bar, list, make("p", {}, make("b", {}, seconds(total)), ` \u00b7 ${told(usage, timings, finishReason)}`));
  } else {
    box.append(make("p", {}, told(usage, timings, finishReason)));
  }
  return box;
}

function told(usage, timings, finishReason) {
  const { media_tokens: media, cached_tokens: cached } = usage.prompt_tokens_details ?? {};
  const of = [media && `${media} media`, cached && `${cached} cached`].filter(Boolean).join(", ");
  const thinking = usage.completion_tokens_details?.reasoning_tokens;
  const parts = [
    `${usage.prompt_tokens} prompt tokens${of ? ` (${of})` : ""}`,
    `${usage.completion_tokens} generated${thinking ? ` (${thinking} thinking)` : ""}`,
  ];
  if (timings?.time_to_first_token) parts.push(`first token after ${seconds(timings.time_to_first_token)}`);
  if (finishReason === "length") parts.push("cut off at the bound on tokens");
  return parts.join(" \u00b7 ");
}
