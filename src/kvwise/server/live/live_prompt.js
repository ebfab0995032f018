// The form: sends a prompt as any client would, and shows where its blocks were before, what hit, where they are now.
import { messageOf, parse, read, write } from "./live_feed.js";
import { at, count, make, say, seconds, share } from "./live_parts.js";

export class Prompt {
  constructor(viewKey, onId) {
    this.viewKey = viewKey; // the key that opened the feed
    this.onId = onId; // told of each new one of `ids`: the feed may have shown that request before
    this.ids = new Set(); // of the requests that this page has sent
    at("api-key").value = read("kvwise-api-key");
    at("prompt").addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    at("stop").addEventListener("click", () => this.abort?.abort());
  }

  mine(id) {
    return [...this.ids].some((one) => id === one || id.startsWith(`${one}-`));
  }

  settle({ about, strategies }) {
    this.about = about;
    this.model = about.model;
    at("api-key-field").hidden = !about.keys || !about.admin;
    at("strategy-field").hidden = strategies.length < 2;
    const select = at("which"), names = [...select.options].map((one) => one.value);
    if (names.join("\n") !== strategies.join("\n")) {
      select.replaceChildren(...strategies.map((name) => make("option", { value: name }, name)));
    }
  }

  headers() {
    const key = this.about?.admin ? at("api-key").value.trim() : this.viewKey();
    if (this.about?.admin) write("kvwise-api-key", key);
    return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  }

  async ask(path, body, headers = {}) {
    const answer = await fetch(path, {
      method: "POST", headers: { ...this.headers(), ...headers }, body: JSON.stringify(body), signal: this.abort.signal,
    });
    if (!answer.ok) throw new Error(await messageOf(answer));
    return answer;
  }

  async send() {
    if (!this.about) return;
    this.abort = new AbortController();
    this.busy(true);
    const prompt = at("text").value, strategy = at("strategy-field").hidden ? {} : { strategy: at("which").value };
    try {
      const before = await (await this.ask("/live/blocks", { prompt, ...strategy })).json();
      this.strips(before);
      const done = await this.complete({ prompt, ...strategy });
      const after = await (await this.ask("/live/blocks", { prompt, ...strategy })).json();
      this.strips(before, done, after);
      this.tell(done);
    } catch (error) {
      say(at("verdict"), error.name === "AbortError" ? "Stopped." : error.message);
    }
    this.busy(false);
  }

  async complete(asked) {
    const id = `live-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`, started = performance.now();
    this.ids.add(id);
    const answer = await this.ask("/v1/completions", {
      model: this.model, max_tokens: +at("most").value, temperature: 0, stream: true, attest: true,
      stream_options: { include_usage: true }, ...asked,
    }, { "X-Request-ID": id });
    const done = { text: "", first: null };
    at("answer").hidden = false;
    at("answer").textContent = "";
    await events(answer.body.getReader(), (chunk) => {
      if (chunk.error) throw new Error(chunk.error.message);
      if (!this.ids.has(chunk.id)) {
        this.ids.add(chunk.id);
        this.onId();
      }
      const [choice] = chunk.choices;
      if (choice) {
        done.first ??= (performance.now() - started) / 1000;
        at("answer").append(choice.text);
      }
      done.kvwise = choice?.kvwise ?? done.kvwise;
      done.usage = chunk.usage ?? done.usage;
    });
    return done;
  }

  tell({ usage, kvwise, first }) {
    const cached = usage.prompt_tokens_details.cached_tokens, loaded = kvwise?.tokens_loaded ?? 0;
    const from = loaded ? `, ${count(loaded)} of them from a tier below` : "";
    say(at("verdict"), `${count(cached)} of ${count(usage.prompt_tokens)} prompt tokens were cached (${share(cached / usage.prompt_tokens)})${from}. ` +
      `${count(usage.completion_tokens)} tokens of output${first == null ? "" : `, the first after ${seconds(first)}`}.`);
  }

  strips(before, done, after) {
    const rows = [["Before", before.runs, "where its blocks were"]];
    if (done) rows.push(["Served", served(before, done), "what the request did"]);
    if (after) rows.push(["Now", after.runs, "where they are"]);
    at("strips").hidden = false;
    at("strips").replaceChildren(...rows.map(([name, runs, means]) => strip(name, runs, means)));
    if (!before.blocks) at("strips").append(make("p", { class: "empty" }, `The prompt fills no block of ${before.block_size} tokens: make it longer.`));
  }

  busy(is) {
    at("send").disabled = is;
    at("stop").disabled = !is;
    at("answer").setAttribute("aria-busy", is);
    if (is) say(at("verdict"), "Sent.");
    at(is ? "stop" : "send").focus({ preventScroll: true });
  }
}

// What became of each block: found on the device, loaded from the tiers that had it, or computed.
function served(before, { usage, kvwise }) {
  const size = before.block_size, loaded = Math.round((kvwise?.tokens_loaded ?? 0) / size);
  const device = Math.round(usage.prompt_tokens_details.cached_tokens / size) - loaded;
  const below = before.runs.filter((run) => !["device", "none"].includes(run.place));
  const runs = [{ place: "device", blocks: device, word: "hit" }];
  let left = loaded;
  for (const run of below) {
    const blocks = Math.min(left, run.blocks);
    runs.push({ place: run.place, blocks, word: `from ${run.place}` });
    left -= blocks;
  }
  if (left) runs.push({ place: "below", blocks: left, word: "from below" });
  runs.push({ place: "none", blocks: Math.max(0, before.blocks - device - loaded), word: "computed" });
  return runs.filter((run) => run.blocks > 0);
}

function strip(name, runs, means) {
  const word = (run) => run.word ?? { none: "not stored", device: "on the device" }[run.place] ?? `on ${run.place}`;
  const kind = (run) => (["device", "none"].includes(run.place) ? run.place : "tier");
  const pieces = runs.map((run) => {
    const piece = make("span", { class: `piece ${kind(run)}` });
    piece.style.flexGrow = run.blocks;
    piece.style.setProperty("--n", run.blocks);
    return piece;
  });
  const told = runs.flatMap((run, i) => [
    make("span", { class: `dot piece ${kind(run)}`, "aria-hidden": "true" }), `${count(run.blocks)} ${word(run)}${i < runs.length - 1 ? ", " : ""}`,
  ]);
  return make("div", { class: "strip", "data-row": name.toLowerCase() },
    make("p", {}, make("b", {}, name), make("span", { class: "unseen" }, `, ${means}: `), make("span", { class: "told" }, ...(told.length ? told : ["no full block"]))),
    make("div", { class: "pieces", "aria-hidden": "true" }, ...pieces));
}

async function events(reader, on) {
  const decoder = new TextDecoder();
  for (let text = ""; ;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += decoder.decode(value, { stream: true });
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const { data } = parse(text.slice(0, end));
      if (data && data !== "[DONE]") on(JSON.parse(data));
    }
  }
}
