// Replies from the server: a stream of JSON lines.

export class Gone extends Error {} // the server can't be reached
export class Refused extends Error { // the server says no, in a sentence
  constructor({ message, key, values }) {
    super(message);
    this.key = key;
    this.values = values;
  }
}

const address = (name) => new URL(name, import.meta.url);

async function post(name, body, signal) {
  let response;
  try {
    response = await fetch(address(name), {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Gone();
  }
  if (response.ok) return response;
  if (response.status === 401) location.reload(); // which asks to sign in; what is here is kept
  const { error } = await response.json().catch(() => ({ error: { message: `${response.status} ${response.statusText}` } }));
  throw new Refused(error);
}

// What the server says of a reply, one object after the other; the last has a finish_reason.
export async function* streamReply(question, signal) {
  const response = await post("reply", question, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let isDone = false;
  while (!isDone) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Gone();
    }
    if (piece.done) throw new Gone();
    const lines = (rest + piece.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const progress = JSON.parse(line);
      if (progress.error) throw new Refused(progress.error);
      isDone = Boolean(progress.finish_reason);
      yield progress;
    }
  }
}

// The text of a file that gradio has taken in: {text, tokens, bytes}.
export async function readFile(path) {
  return (await post("file", { path })).json();
}

// Wait until the server answers again.
export async function waitForServer(signal) {
  for (let pause = 500; ; pause = Math.min(pause * 1.5, 5000)) {
    await new Promise((resolve) => setTimeout(resolve, pause));
    signal.throwIfAborted();
    try {
      if ((await fetch(address("alive"), { cache: "no-store", signal })).ok) return;
    } catch (error) {
      if (error.name === "AbortError") throw error;
    }
  }
}
