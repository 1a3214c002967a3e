// Thinking with images: carries out the tool with which the model looks closer, as cluster/client/looking.py does.

import { clamp, fourNumbers, SCALE } from "./boxes.js";

export const ZOOM = "image_zoom_in_tool";
export const MAX_ROUNDS = 8;
const MIN_CROP_PIXELS = 448 * 448;
const MAX_ENLARGED = 8;

/** The tool as a request declares it; img_idx only where there are several pictures. */
export function zoomTool(several) {
  const properties = { bbox_2d: { type: "array", items: { type: "number" } }, label: { type: "string" } };
  if (several) properties.img_idx = { type: "integer", description: "Which picture of the conversation, from 0." };
  return {
    type: "function",
    function: {
      name: ZOOM,
      description: "Zooms into a part of a picture.",
      parameters: { type: "object", properties, required: ["bbox_2d"] },
    },
  };
}

/** All pictures of a conversation, in their order: {url, given}, given being those of the user. */
export function picturesOf(messages) {
  return messages.flatMap((message) =>
    (Array.isArray(message.content) ? message.content : [])
      .filter((part) => part.type === "image_url")
      .map((part) => ({ url: part.image_url.url, given: message.role === "user" })),
  );
}

/**
 * What a call asks to see: {picture, corners, label, url}, picture being an index among `pictures`. What makes no sense
 * is {error}, which the model is told.
 */
export async function lookCloser(call, pictures) {
  try {
    const asked = JSON.parse(call.function.arguments);
    const last = pictures.findLastIndex((picture) => picture.given);
    const picture = asked?.img_idx ?? last;
    if (!Number.isInteger(picture) || picture < 0 || picture >= pictures.length) {
      throw new Error(`img_idx must be a whole number from 0 to ${pictures.length - 1}`);
    }
    const corners = fourNumbers(asked?.bbox_2d)?.map(clamp);
    if (!corners) throw new Error(`bbox_2d must be four numbers from 0 to ${SCALE}: x1, y1, x2, y2`);
    const url = await cut(pictures[picture].url, corners);
    return { picture, corners, label: typeof asked.label === "string" ? asked.label : "", url };
  } catch (error) {
    return { error: error.message };
  }
}

/** A `tool` message with what was seen. */
export function toolMessage(call, look) {
  const content = look.error ? `Error: ${look.error}` : [{ type: "image_url", image_url: { url: look.url } }];
  return { role: "tool", tool_call_id: call.id, content };
}

/** A part of a picture, enlarged where it has few pixels, as a data URL. */
async function cut(url, corners) {
  const whole = new Image();
  whole.src = url;
  await whole.decode();
  const size = [whole.naturalWidth, whole.naturalHeight];
  const sides = [...size, ...size];
  const [x1, y1, x2, y2] = corners.map((corner, index) => Math.round((corner * sides[index]) / SCALE));
  const [width, height] = [x2 - x1, y2 - y1];
  if (width <= 0 || height <= 0) {
    throw new Error(`[${corners}] holds no pixel of a ${size.join(" x ")} picture`);
  }
  const factor = Math.max(1, Math.min(MAX_ENLARGED, Math.sqrt(MIN_CROP_PIXELS / (width * height))));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [Math.round(width * factor), Math.round(height * factor)];
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(whole, x1, y1, width, height, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/png");
}
