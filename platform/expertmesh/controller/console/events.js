// Server-sent events over fetch: EventSource can send no credential but in the URL or a cookie.

/** The events of a response, as [name, data]; ends with it. Comments and other fields are skipped. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let name = "message";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield [name, data.join("\n")];
          name = "message";
          data = [];
        } else if (line.startsWith("event:")) name = line.slice(6).trim();
        else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

const SILENCE_MS = 6000;
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 5000;

/** Stays on a stream until it is closed or its credential is refused. */
export class LiveStream {
  /** `on`: event(name, value), down(problem), refused(). */
  constructor(url, credential, on) {
    this.url = url;
    this.credential = credential;
    this.on = on;
    this.closed = new AbortController();
  }

  close() {
    this.closed.abort();
  }

  async run() {
    let pause = FIRST_PAUSE_MS;
    while (!this.closed.signal.aborted) {
      try {
        if (await this.once(() => { pause = FIRST_PAUSE_MS; })) return;
        this.problem("the controller ended the connection");
      } catch (error) {
        this.problem(error.name === "AbortError" ? "the controller fell silent" : "no answer from the controller");
      }
      await new Promise((resolve) => setTimeout(resolve, pause * (0.75 + Math.random() / 2)));
      pause = Math.min(pause * 2, LONGEST_PAUSE_MS);
    }
  }

  problem(text) {
    if (!this.closed.signal.aborted) this.on.down(text);
  }

  /** Whether that was the last time. */
  async once(heard) {
    const silence = new AbortController();
    const abort = () => silence.abort();
    this.closed.signal.addEventListener("abort", abort);
    let alarm = setTimeout(abort, SILENCE_MS);
    try {
      const response = await fetch(this.url, {
        headers: { Authorization: `Bearer ${this.credential}` },
        signal: silence.signal, cache: "no-store",
      });
      if (response.status === 401) {
        this.on.refused();
        return true;
      }
      if (!response.ok) {
        const body = await response.json().catch(() => ({}));
        this.problem(body.error?.message ?? `the controller answered ${response.status}`);
        return false;
      }
      for await (const [name, data] of eventsOf(response)) {
        clearTimeout(alarm);
        alarm = setTimeout(abort, SILENCE_MS);
        if (name === "ended") {
          this.on.refused();
          return true;
        }
        heard();
        this.on.event(name, JSON.parse(data));
      }
      return this.closed.signal.aborted;
    } finally {
      clearTimeout(alarm);
      this.closed.signal.removeEventListener("abort", abort);
    }
  }
}
