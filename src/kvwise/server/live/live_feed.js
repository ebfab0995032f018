// The feed: server-sent events read with fetch, so that a key can be sent; connects again with back-off.
const FIRST_MS = 500, MOST_MS = 15000, SILENT_MS = 8000;

export class Feed {
  // on.picture(kind, data); on.link(state, why, inMs): connecting, live, lost, locked or paused
  constructor(on) {
    this.on = on;
    this.key = read("kvwise-view-key");
    this.wait = FIRST_MS;
    this.stopped = true;
  }

  start() {
    this.stopped = false;
    clearTimeout(this.timer);
    this.connect();
  }

  stop(state) {
    this.stopped = true;
    clearTimeout(this.timer);
    this.abort?.abort();
    if (state) this.on.link(state);
  }

  unlock(key) {
    this.key = key;
    write("kvwise-view-key", key);
    this.stop();
    this.start();
  }

  headers() {
    return this.key ? { Authorization: `Bearer ${this.key}` } : {};
  }

  // Which requests hold a block, in words; nothing where that cannot be told.
  async holders(strategy, block) {
    try {
      const answer = await fetch(`/live/holders?${new URLSearchParams({ strategy, block })}`, { headers: this.headers() });
      if (!answer.ok) return "";
      const { requests, others } = await answer.json(), named = requests.slice(0, 3).map((id) => id.slice(0, 14));
      const more = requests.length - named.length + others;
      return requests.length || others ? `Held by ${[...named, ...(more ? [`${more} more`] : [])].join(", ")}.` : "";
    } catch {
      return "";
    }
  }

  async connect() {
    this.abort?.abort();
    const abort = this.abort = new AbortController();
    this.on.link("connecting");
    let why = "The server does not answer.";
    try {
      const answer = await fetch("/live/events", { headers: this.headers(), signal: abort.signal, cache: "no-store" });
      if (answer.status === 401) {
        this.stopped = true;
        this.on.link("locked", await messageOf(answer), this.key !== "");
        return;
      }
      if (!answer.ok) why = await messageOf(answer);
      else why = await this.listen(answer.body.getReader(), abort);
    } catch (error) {
      if (this.wasLive) why = "The connection to the server is lost.";
    }
    this.wasLive = false;
    if (this.stopped || abort !== this.abort) return;
    const inMs = this.wait * (0.8 + 0.4 * Math.random());
    this.wait = Math.min(MOST_MS, this.wait * 2);
    this.on.link("lost", why, inMs);
    this.timer = setTimeout(() => this.connect(), inMs);
  }

  async listen(reader, abort) {
    const decoder = new TextDecoder();
    let text = "", silence;
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(() => abort.abort(), SILENT_MS);
    };
    try {
      for (heard(); ;) {
        const { done, value } = await reader.read();
        if (done) return "The server has closed the connection.";
        heard();
        text += decoder.decode(value, { stream: true });
        for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
          if (this.take(text.slice(0, end)) === "bye") return "The server is shutting down.";
        }
      }
    } finally {
      clearTimeout(silence);
    }
  }

  take(event) {
    const { kind, data } = parse(event);
    if (!data || kind === "bye") return kind;
    if (!this.wasLive) {
      this.wasLive = true;
      this.wait = FIRST_MS;
      this.on.link("live");
    }
    this.on.picture(kind, JSON.parse(data));
    return kind;
  }
}

export function parse(event) {
  const lines = event.split("\n");
  const of = (name) => lines.filter((line) => line.startsWith(name)).map((line) => line.slice(name.length));
  return { kind: of("event: ")[0] ?? "message", data: of("data: ").join("\n") };
}

export async function messageOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `The server answers with status ${answer.status}.`;
  }
}

export function read(name) {
  try {
    return sessionStorage.getItem(name) ?? "";
  } catch {
    return "";
  }
}

export function write(name, value) {
  try {
    value ? sessionStorage.setItem(name, value) : sessionStorage.removeItem(name);
  } catch { /* storage is closed to us: the key lives as long as the page */ }
}
