// The server's HTTP interface: models, and answers as they are written. Addresses are relative, so that the page works under any prefix.

export class ApiError extends Error {
  constructor(message, status = 0) {
    super(sentence(message));
    this.status = status;
  }
}

export async function listModels(key) {
  const response = await request("v1/models", { headers: headers(key) });
  const body = await response.json();
  return body.data.map((model) => model.id);
}

// Yields the chunks of a streamed chat completion; throws ApiError, or an AbortError once `signal` says so.
export async function* streamChat(body, key, signal) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, ...options }),
    signal,
  });
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, response.status);
    yield chunk;
  }
  throw new ApiError("The connection broke off, so the answer is not complete");
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached; check that it is still running, then retry");
  }
  if (response.ok) return response;
  throw new ApiError(await reason(response), response.status);
}

async function reason(response) {
  try {
    const { error } = await response.json();
    if (error?.message) return error.message;
  } catch {
    // Not our server's JSON; a proxy's page, perhaps.
  }
  return `The server answered with status ${response.status} and no explanation`;
}

// The data of server-sent events in a stream of bytes.
async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await read(reader, signal);
      if (done) return;
      text += value;
      const blocks = text.split(/\r?\n\r?\n/);
      text = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal.aborted || error.name === "AbortError") throw new DOMException("stopped", "AbortError");
    throw new ApiError("The connection broke off, so the answer is not complete");
  }
}

function sentence(text) {
  const trimmed = String(text).trim();
  const begun = trimmed.charAt(0).toUpperCase() + trimmed.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}
