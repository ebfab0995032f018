// The view of a picture: figures, requests, tiers, misses. Everything is set as text; nothing is read as markup.
import { BlockMap, KINDS, tally, tile } from "./live_map.js";
import { at, bar, bytes, count, make, rate, say, seconds, share, Spark, Table, text } from "./live_parts.js";

const brief = (id) => (id.length > 16 ? `${id.slice(0, 14)}…` : id);
const within = (part, whole) => {
  const [number, unit] = bytes(part).split("\u00a0"), told = bytes(whole);
  return told.endsWith(unit) ? `${number} of ${told}` : `${number}\u00a0${unit} of ${told}`;
};
const sum = (list, of) => list.reduce((total, one) => total + of(one), 0);

export class View {
  constructor(holders) {
    this.holders = holders;
    this.maps = new Map();
    this.points = [];
    this.figures();
    this.legend();
  }

  // -- figures ------------------------------------------------------------------------------------------------

  figures() {
    const sparks = { ttft: new Spark(2), tpot: new Spark(2), output: new Spark(1), hits: new Spark(1, { ceiling: 1 }) };
    const names = [
      ["requests", "Requests running"], ["pool", "Pool in use"], ["ttft", "Time to first token"],
      ["tpot", "Time per output token"], ["output", "Output tokens/s"], ["hits", "Prompt tokens found"],
      ["pressure", "Evicted blocks"],
    ];
    this.tiles = {};
    for (const [name, label] of names) {
      const value = make("span", { class: "value" }), more = make("span", { class: "more" });
      const plot = sparks[name]?.svg ?? make("span", { class: "gauge", "aria-hidden": "true" });
      const body = make("dd", {}, value, more, plot);
      at("figures").append(make("div", { class: `figure ${name}` }, make("dt", {}, label), body));
      this.tiles[name] = { value, more, plot, spark: sparks[name] };
    }
  }

  figure(name, value, more) {
    say(this.tiles[name].value, value);
    say(this.tiles[name].more, more);
  }

  drawFigures({ engines, now, about }) {
    const running = sum(engines, (e) => e.running), waiting = sum(engines, (e) => e.waiting);
    const total = sum(engines, (e) => e.blocks.total), free = sum(engines, (e) => e.blocks.free);
    const cached = sum(engines, (e) => e.blocks.cached), used = total - free - cached;
    this.figure("requests", count(running), `${count(waiting)} waiting, ${count(about.max_num_seqs * engines.length)} at most`);
    this.gauge("requests", [["used", running / (about.max_num_seqs * engines.length)]]);
    this.figure("pool", share(used / total), `${share(cached / total)} cached, ${share(free / total)} free`);
    this.gauge("pool", [["used", used / total], ["cached", cached / total]]);
    this.figure("ttft", seconds(now.ttft[0]), `95 %: ${seconds(now.ttft[1])}`);
    this.figure("tpot", seconds(now.tpot[0]), `95 %: ${seconds(now.tpot[1])}`);
    this.figure("output", count(Math.round(now.output_per_s)), `${count(now.ended)} ended in a minute`);
    this.figure("hits", share(now.hit_ratio), `of prompts in a minute`);
    const leaked = sum(engines, (e) => e.leaked);
    this.figure("pressure", count(sum(engines, (e) => e.evictions)),
      `${count(sum(engines, (e) => e.preemptions))} preemptions, ${count(now.refused)} refused${leaked ? `, ${count(leaked)} LEAKED` : ""}`);
    this.tiles.pressure.more.classList.toggle("bad", leaked > 0);
  }

  gauge(name, parts) {
    const box = this.tiles[name].plot;
    parts.forEach(([kind, part], i) => {
      const piece = box.children[i] ?? box.appendChild(make("i", { class: kind }));
      piece.style.width = `${100 * Math.max(0, Math.min(1, part))}%`;
    });
  }

  series({ most, first, rows }, whole) {
    if (whole || first !== this.next) this.points = [];
    this.points.push(...rows);
    this.next = first + rows.length;
    this.points.splice(0, this.points.length - most);
    const pick = (...columns) => this.points.map((row) => columns.map((c) => row[c]));
    this.tiles.ttft.spark.draw(pick(0, 1));
    this.tiles.tpot.spark.draw(pick(2, 3));
    this.tiles.output.spark.draw(pick(4));
    this.tiles.hits.spark.draw(pick(5));
  }

  // -- blocks -------------------------------------------------------------------------------------------------

  legend() {
    this.kinds = KINDS.map(([name, means], kind) => {
      const number = make("b"), swatch = make("span", { class: "swatch", "aria-hidden": "true" }, tile(kind, 13));
      const node = make("li", { title: means, hidden: kind > 5 }, swatch, `${name} `, number);
      at("legend").append(node);
      return { node, number, swatch };
    });
  }

  drawMaps(told) {
    for (const [strategy, [number, runs]] of Object.entries(told)) {
      if (!this.maps.has(strategy)) this.maps.set(strategy, new BlockMap(strategy, at("readout"), this.holders));
      this.maps.get(strategy).set(number, runs);
    }
  }

  placeMaps(strategies) {
    for (const name of this.maps.keys()) if (!strategies.includes(name)) this.maps.delete(name);
    const nodes = strategies.filter((name) => this.maps.has(name)).map((name) => this.maps.get(name).node);
    const box = at("maps");
    if (nodes.length && (box.children.length !== nodes.length || nodes.some((node, i) => box.children[i] !== node))) {
      box.replaceChildren(...nodes);
    }
    for (const map of this.maps.values()) map.title.hidden = nodes.length < 2;
    const counts = new Array(KINDS.length).fill(0);
    for (const map of this.maps.values()) tally(map.held).forEach((number, kind) => { counts[kind] += number; });
    this.kinds.forEach(({ node, number }, kind) => {
      say(number, count(counts[kind]));
      if (counts[kind]) node.hidden = false;
    });
  }

  repaint() {
    for (const map of this.maps.values()) map.repaint();
    this.kinds.forEach(({ swatch }, kind) => swatch.replaceChildren(tile(kind, 13)));
  }

  // -- tables -------------------------------------------------------------------------------------------------

  tables({ about, strategies }) {
    const key = `${about.tenants} ${strategies.length > 1} ${about.block_size}`;
    if (this.tabled === key) return;
    this.tabled = key;
    const tenant = about.tenants ? [text("Tenant", (r) => r.tenant || "–", "name")] : [];
    const strategy = strategies.length > 1 ? [text("Strategy", (r) => r.strategy, "code")] : [];
    const id = { label: "Request", kind: "code id", set: (cell, r) => { say(cell, brief(r.id)); cell.title = r.id; } };
    this.now = new Table(at("requests"), "Requests that run or wait", [
      id, ...tenant, ...strategy,
      { label: "Phase", kind: "", set: (cell, r) => { say(cell, r.phase); cell.className = `phase ${r.phase}`; } },
      { label: "Prompt", kind: "num wide beside", set: (cell, r) => bar(cell, [["cached", r.cached / r.prompt], ["used", (r.computed - r.cached) / r.prompt]], count(r.prompt)) },
      text("Cached", (r) => share(r.cached / r.prompt), "num"),
      text("Output", (r) => count(r.output), "num"),
      text("TTFT", (r) => seconds(r.ttft), "num"),
      text("Age", (r) => `${r.age.toFixed(1)} s`, "num"),
      kv(),
    ], "No request runs or waits.", [12, 5]);
    this.past = new Table(at("recent"), "Requests that have ended, the latest first", [
      id, ...tenant, ...strategy,
      { label: "End", kind: "", set: (cell, r) => { say(cell, r.end); cell.className = r.ok ? "phase" : "phase bad"; } },
      text("Prompt", (r) => count(r.prompt), "num"),
      text("Cached", (r) => share(r.prompt ? r.cached / r.prompt : null), "num"),
      text("Output", (r) => count(r.output), "num"),
      text("TTFT", (r) => seconds(r.ttft), "num"),
      text("Took", (r) => seconds(r.took), "num"),
      text("Run of hits ended", (r) => r.miss ?? "–", "name miss"),
      kv(),
    ], "No request has ended yet.", [12, 5]);
    this.tiers = new Table(at("tiers"), "Where keys and values lie", [
      ...(strategies.length > 1 ? [text("Strategy", (t) => t.strategy, "code")] : []),
      { label: "Tier", kind: "name", set: (cell, t) => { say(cell, t.up === false ? `${t.name} (off)` : t.name); cell.classList.toggle("bad", t.up === false); } },
      { label: "In use", kind: "num wide", set: (cell, t) => bar(cell, [["used", t.budget ? t.bytes / t.budget : 0]], t.budget ? within(t.bytes, t.budget) : bytes(t.bytes)) },
      text("Hits", (t) => share(t.asked ? t.hits / t.asked : null), "num"),
      text("Read", (t) => rate(t.loading), "num"),
      text("Written", (t) => rate(t.storing), "num"),
    ], "Nothing to show yet.");
    this.misses = new Table(at("misses"), "Requests by what stopped their run of hits", [
      text("Reason", (m) => m.reason, "name"),
      { label: "Requests", kind: "num wide beside", set: (cell, m) => bar(cell, [["used", m.part]], `${count(m.count)} (${share(m.share)})`) },
    ], "No request has looked for its prefix yet.");
  }

  drawRequests({ requests, counts }, mine) {
    this.now.fill(requests, (r) => mine(r.id));
    const more = counts.more ? `, ${count(counts.more)} more` : "";
    say(at("requests-sum"), `${count(requests.length)} shown${more}${counts.others ? `, ${count(counts.others)} of others` : ""}`);
  }

  drawEnded({ recent }, mine) {
    this.past.fill(recent, (r) => mine(r.id));
    say(at("recent-sum"), recent.length ? `the last ${recent.length}` : "");
  }

  drawEngines({ engines }) {
    this.tiers.fill(engines.flatMap((e) => e.tiers.map((t) => ({ ...t, strategy: e.strategy }))));
    const links = [...new Set(engines.flatMap((e) => e.links))];
    say(at("tiers-sum"), links.length ? links.join(", ") : "");
    const reasons = {};
    for (const e of engines) for (const [reason, n] of Object.entries(e.misses)) reasons[reason] = (reasons[reason] ?? 0) + n;
    const all = Object.values(reasons).reduce((a, b) => a + b, 0);
    const rows = Object.entries(reasons).sort((a, b) => b[1] - a[1]);
    this.misses.fill(rows.map(([reason, n]) => ({ reason, count: n, share: n / all, part: n / rows[0][1] })));
    say(at("misses-sum"), all ? `${count(all)} requests since the start` : "");
    const blocks = engines.map((e) => e.blocks.total).reduce((a, b) => a + b, 0);
    say(at("map-sum"), `${count(blocks)} blocks, ${bytes(sum(engines, (e) => e.tiers[0].budget))}`);
  }
}

// What the methods did to a request's KV; shares are of tokens in every layer and head.
function kv() {
  return text("KV", ({ did }) => {
    const seen = did ? did.kept + did.dropped + did.merged : 0;
    if (!seen) return "–";
    const part = (name) => (did[name] ? [`${name} ${share(did[name] / seen)}`] : []);
    const recalled = did.recalled ? [`recalled ${count(did.recalled)}`] : [], bits = did.bits ? [`${did.bits} bits`] : [];
    return [did.kept === seen ? "all kept" : `kept ${share(did.kept / seen)}`, ...part("dropped"), ...part("merged"), ...recalled, ...bits].join(", ");
  }, "name kv");
}
