// The server, asked only from here. A refusal is thrown as an Error whose message is a person's sentence.

const address = (path, query = {}) => {
  const url = new URL(`api/${path}`, document.baseURI);
  for (const [name, value] of Object.entries(query)) if (value != null && value !== "") url.searchParams.set(name, value);
  return url;
};

async function answered(response) {
  if (response.ok) return response;
  let told = `${response.status} ${response.statusText}`;
  try {
    const body = await response.json();
    const error = body.error ?? body.detail ?? body;
    told = typeof error === "string" ? error : [error.where, error.message, error.fix].filter(Boolean).join("\n") || told;
  } catch { /* not JSON: the status says it */ }
  throw new Error(told);
}

export async function get(path, query, signal) {
  return (await answered(await fetch(address(path, query), { signal }))).json();
}

export async function post(path, body = {}) {
  const headers = { "Content-Type": "application/json" };
  return (await answered(await fetch(address(path), { method: "POST", headers, body: JSON.stringify(body) }))).json();
}

// Send a file as it is; `onShare` hears of the share (0 to 1) that is sent. XMLHttpRequest, because fetch tells nothing.
export function upload(file, onShare) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", address("files", { name: file.name }));
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.upload.onprogress = (event) => onShare?.(event.loaded / Math.max(event.total, 1));
    request.onerror = () => reject(new Error(String(request.status)));
    request.onload = () => {
      const response = new Response(request.responseText, { status: request.status });
      answered(response).then((ok) => ok.json()).then(resolve, reject);
    };
    request.send(file);
  });
}

export const link = (path, query) => address(path, query).href;

// Server-sent events of a GET; returns what ends them. The browser reconnects by itself.
export function listen(path, query, onEvent) {
  const source = new EventSource(address(path, query));
  source.onmessage = (message) => onEvent(JSON.parse(message.data));
  return () => source.close();
}

// Server-sent events of a POST: yields each data object until the stream ends or [DONE] comes.
export async function* pieces(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const options = { method: "POST", headers, body: JSON.stringify(body), signal };
  const response = await answered(await fetch(address(path), options));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    waiting += value;
    const events = waiting.split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}
