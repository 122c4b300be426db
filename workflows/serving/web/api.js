// The service's HTTP API, as the page uses it.

const KEY = "cartridges-api-key";

export const getKey = () => sessionStorage.getItem(KEY) ?? "";
export const setKey = (key) => sessionStorage.setItem(KEY, key);

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const key = getKey();
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw new ApiError(response.status, told?.error?.message ?? `the service answered ${response.status}`);
}

export const listCartridges = async () => (await (await request("v1/cartridges")).json()).data;

export const getCartridge = async (name) =>
  (await request(`v1/cartridges/${encodeURIComponent(name)}`)).json();

// Streams one answer. `onText` gets the answer so far. Resolves to the text and what was measured:
// seconds to the first token and tokens a second after it, as this browser saw them.
export async function streamAnswer(body, signal, onText) {
  const began = performance.now();
  const response = await request("v1/chat/completions", {
    method: "POST",
    signal,
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  let text = "", first = null, last = null, context = null, usage = null;
  for await (const chunk of events(response.body)) {
    if (chunk.error) throw new ApiError(200, chunk.error.message);
    context = chunk.context ?? context;
    usage = chunk.usage ?? usage;
    const piece = chunk.choices?.[0]?.delta?.content;
    if (!piece) continue;
    last = performance.now();
    first ??= last;
    text += piece;
    onText(text);
  }
  const tokens = usage?.completion_tokens ?? 0;
  const seconds = first === null ? 0 : (last - first) / 1000;
  return {
    text, context, usage,
    ttft: first === null ? null : (first - began) / 1000,
    speed: tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null,
  };
}

// Server-sent events of `stream` as parsed JSON.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const lines = buffer.split("\n");
    buffer = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}
