// One exchange: asks, and lets the model look closer until it has answered.

import { streamChat } from "../shared/api.js";
import { lookCloser, MAX_ROUNDS, picturesOf, toolMessage, ZOOM, zoomTool } from "./looking.js";
import { aside, callCard, lookCard, Step } from "./view.js";

/**
 * Goes on with `messages`, which grow by what is said, and shows it in `turn`.
 *
 * What the user stopped stays as far as it came. Of a reply that broke off nothing does: it can be asked for again. Raises
 * ApiError.
 */
export async function exchange(messages, { system, fields, zoom, signal, turn }) {
  for (let round = 1; ; round++) {
    const pictures = picturesOf(messages);
    const body = { messages: opened(system, messages), return_timings: true, stream_options: { include_usage: true }, ...fields };
    if (zoom && pictures.length) {
      body.tools = [zoomTool(pictures.length > 1)];
      // The last round must end in an answer.
      if (round === MAX_ROUNDS) body.tool_choice = "none";
    }
    const step = new Step();
    turn.append(step.element);
    const reply = { text: "", reasoning: "", calls: [], finishReason: null, usage: null, timings: null };
    const drawn = pictures.findLast((picture) => picture.given)?.url;
    try {
      for await (const chunk of streamChat(body, signal)) {
        take(reply, chunk);
        step.show(reply);
      }
    } catch (error) {
      step.end(reply, drawn);
      if (error.name !== "AbortError") throw error;
      if (reply.text) messages.push({ role: "assistant", content: reply.text });
      turn.append(aside("Stopped."));
      return;
    }
    step.end(reply, drawn);
    const said = { role: "assistant", content: reply.text };
    if (reply.finishReason !== "tool_calls") {
      messages.push(said);
      return;
    }
    if (!zoom || reply.calls.some((call) => call.function.name !== ZOOM)) {
      step.element.append(...reply.calls.map(callCard), aside("Nobody here carries out this tool."));
      if (reply.text) messages.push(said);
      return;
    }
    const answers = [];
    for (const call of reply.calls) {
      const seen = picturesOf([...messages, ...answers]);
      const look = await lookCloser(call, seen);
      step.element.insertBefore(lookCard(call, look, seen), step.element.querySelector(".cost"));
      answers.push(toolMessage(call, look));
    }
    messages.push({ ...said, reasoning: reply.reasoning || undefined, tool_calls: reply.calls }, ...answers);
  }
}

const opened = (system, messages) => (system ? [{ role: "system", content: system }, ...messages] : messages);

/** Adds a chunk to the reply it belongs to. */
function take(reply, chunk) {
  reply.usage = chunk.usage ?? reply.usage;
  reply.timings = chunk.timings ?? reply.timings;
  for (const choice of chunk.choices) {
    reply.text += choice.delta.content ?? "";
    reply.reasoning += choice.delta.reasoning ?? "";
    reply.finishReason = choice.finish_reason ?? reply.finishReason;
    for (const { index, id, function: piece } of choice.delta.tool_calls ?? []) {
      reply.calls[index] ??= { id, type: "function", function: { name: piece.name, arguments: "" } };
      reply.calls[index].function.arguments += piece.arguments ?? "";
    }
  }
}
