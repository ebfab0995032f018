// The live view: connects the feed to the view, and minds the theme, the keys and the keyboard.
import { Feed, write } from "./live_feed.js";
import { at, say } from "./live_parts.js";
import { Prompt } from "./live_prompt.js";
import { View } from "./live_view.js";

const LINKS = { connecting: "connecting", live: "live", lost: "disconnected", locked: "locked", paused: "paused" };
const picture = {};
let paused = false, count;

const feed = new Feed({ picture: onPicture, link: onLink });
const view = new View((strategy, block) => feed.holders(strategy, block));
const prompt = new Prompt(() => feed.key, drawRows);

function onPicture(kind, news) {
  const { maps, series, ...rest } = news, whole = kind === "whole";
  const before = picture.state;
  Object.assign(picture, rest);
  view.tables(picture);
  prompt.settle(picture);
  if (maps) view.drawMaps(maps);
  if (maps || rest.strategies) view.placeMaps(picture.strategies);
  if (series) view.series(series, whole);
  view.drawFigures(picture);
  drawRows("recent" in rest);
  if (rest.engines) view.drawEngines(picture);
  drawHead(before);
}

function drawRows(ended = true) {
  const mine = (id) => prompt.mine(id);
  view.drawRequests(picture, mine);
  if (ended) view.drawEnded(picture, mine);
}

function drawHead(before) {
  say(at("model"), picture.about.model);
  say(at("state"), picture.state);
  at("state").hidden = false;
  at("state").dataset.state = picture.state;
  say(at("strategy"), picture.strategies.join("  |  "));
  if (before && before !== picture.state) say(at("say"), `The server is ${picture.state}.`);
  document.title = `${picture.about.model} · kvwise live`;
}

function onLink(state, why = "", inMs = 0) {
  clearInterval(count);
  document.body.dataset.link = state;
  at("link").dataset.state = state;
  say(at("link"), LINKS[state]);
  const lost = state === "lost", locked = state === "locked";
  if (state !== "connecting") {
    at("lost").hidden = !lost;
    at("unlock").hidden = !locked;
    at("forget").hidden = !feed.key;
  }
  if (lost) {
    const until = performance.now() + inMs;
    const tell = () => say(at("lost-why"), `Disconnected. ${why} Connecting again in ${Math.max(1, Math.ceil((until - performance.now()) / 1000))} s.`);
    tell();
    count = setInterval(tell, 1000);
    say(at("say"), `Disconnected. ${why}`);
  } else if (locked) {
    say(at("unlock-why"), inMs ? `This key does not fit: ${why}.` : `${why}.`);
    at("key").focus();
  } else if (state === "live" && at("say").textContent.startsWith("Disconnected")) {
    say(at("say"), "Connected again.");
  }
}

// -- controls -------------------------------------------------------------------------------------------------

at("again").addEventListener("click", () => { at("main").focus(); feed.stop(); feed.start(); });

at("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  feed.unlock(at("key").value.trim());
  at("key").value = "";
});

at("forget").addEventListener("click", () => {
  write("kvwise-api-key", "");
  at("api-key").value = "";
  feed.unlock("");
});

at("pause").addEventListener("click", () => {
  paused = !paused;
  at("pause").setAttribute("aria-pressed", paused);
  paused ? feed.stop("paused") : feed.start();
});

document.addEventListener("visibilitychange", () => {
  if (paused || at("link").dataset.state === "locked") return;
  document.hidden ? feed.stop("paused") : feed.start();
});

const THEMES = ["auto", "light", "dark"];
function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  say(at("theme"), `Theme: ${theme}`);
  view.repaint();
}
let theme = "auto";
try { theme = THEMES.includes(localStorage.getItem("kvwise-theme")) ? localStorage.getItem("kvwise-theme") : "auto"; } catch { /* none is kept */ }
at("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  try { localStorage.setItem("kvwise-theme", theme); } catch { /* it holds for this page */ }
  setTheme(theme);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => view.repaint());

setTheme(theme);
feed.start();
