// Requests to this server, with the API key of this tab, and the events of a stream.

const KEY = "sagellm-api-key";

export const key = () => sessionStorage.getItem(KEY) ?? "";

export function setKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

export class ApiError extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

export async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key()) headers.authorization = `Bearer ${key()}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  let message = `HTTP ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // a proxy in between may answer with something else than an error object
  }
  throw new ApiError(response.status, message, response.headers.get("retry-after"));
}

export function post(path, body, signal) {
  return request(path, { method: "POST", body: JSON.stringify(body), signal, headers: { "content-type": "application/json" } });
}

// The objects of an event stream up to [DONE]. An error object and a stream that was cut are exceptions.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection was cut");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new ApiError(event.error.code, event.error.message, null);
      yield event;
    }
  }
}
