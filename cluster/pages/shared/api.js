// The public HTTP API of the router this page came from.

/** An error the service told, or a connection that failed (status 0). */
export class ApiError extends Error {
  constructor(message, { status = 0, retryAfterS = null } = {}) {
    super(message);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

/** The first served model: {id, max_model_len ...}. */
export async function servedModel() {
  const reply = await call("v1/models");
  return (await reply.json()).data[0];
}

/** Whether a request could be answered now. */
export async function isReady() {
  try {
    return (await fetch(address("ready"))).ok;
  } catch {
    return false;
  }
}

/** What the cluster is doing, as GET /status tells it. */
export async function clusterStatus(signal) {
  return (await call("status", { signal })).json();
}

/** Streams the chunks of a chat completion. Aborting `signal` cancels the request in the cluster. */
export async function* streamChat(body, signal) {
  const reply = await call("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  for await (const data of serverSentEvents(reply.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message);
    yield chunk;
  }
  throw new ApiError("The reply broke off.");
}

// The API lies one level above this page, wherever both are served.
const address = (path) => new URL(`../${path}`, document.baseURI);

async function call(path, options) {
  let reply;
  try {
    reply = await fetch(address(path), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => null);
  const retryAfter = Number(reply.headers.get("retry-after"));
  throw new ApiError(told?.error?.message ?? `The server answered ${reply.status}.`, {
    status: reply.status,
    retryAfterS: retryAfter > 0 ? retryAfter : null,
  });
}

/** The data of each event; comments, which keep a silent connection alive, are passed over. */
async function* serverSentEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event.startsWith("data: ")) yield event.slice(6);
    }
  }
}
