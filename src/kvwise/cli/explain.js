// Draws the strips in the reader's colours, and tells what lies under the pointer or the keyboard's cursor.
(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const readout = document.getElementById("readout");
  const [where, text] = readout.children;
  const words = { open: "kept", packed: "kept, packed in codes", recalled: "brought back by the last step" };
  const canvases = [...document.querySelectorAll("canvas")];
  const cursors = new Map(canvases.map((canvas) => [canvas, null]));
  const of = (canvas) => {
    const output = facts[canvas.dataset.output];
    return [output, output.strips[canvas.dataset.strip]];
  };
  const inside = (runs, position) => runs.some(([first, stop]) => first <= position && position < stop);
  const kindAt = (strip, position) =>
    ["recalled", "packed", "open"].find((kind) => inside(strip[kind], position)) || "absent";

  // How many tokens of each kind lie under each pixel column, as parts of all that do.
  const shares = (runs, numTokens, width) => {
    const out = new Float64Array(width), snap = width < numTokens ? (x) => x : Math.round;
    for (const [first, stop] of runs) {
      const from = snap((first / numTokens) * width), to = snap((stop / numTokens) * width);
      for (let x = Math.floor(from); x < Math.min(width, Math.ceil(to)); x++) {
        out[x] += Math.max(0, Math.min(x + 1, to) - Math.max(x, from));
      }
    }
    return out;
  };

  const draw = (canvas) => {
    const [output, strip] = of(canvas);
    const box = canvas.getBoundingClientRect(), scale = window.devicePixelRatio || 1;
    const width = Math.max(1, Math.round(box.width * scale)), height = Math.max(1, Math.round(box.height * scale));
    canvas.width = width;
    canvas.height = height;
    const style = getComputedStyle(document.documentElement), pen = canvas.getContext("2d");
    const colour = (name) => style.getPropertyValue(name).trim();
    pen.fillStyle = colour("--void");
    pen.fillRect(0, 0, width, height);
    const base = new Float64Array(width);
    for (const [kind, name] of [["packed", "--packed"], ["open", "--accent"], ["recalled", "--recalled"]]) {
      pen.fillStyle = colour(name);
      shares(strip[kind], output.numTokens, width).forEach((share, x) => {
        if (!share) return;
        const tall = Math.max(Math.min(share, 1 - base[x]) * height, 2);
        pen.fillRect(x, height - base[x] * height - tall, 1, tall);
        base[x] += Math.min(share, 1 - base[x]);
      });
    }
    if (output.numPrompt < output.numTokens) {
      pen.fillStyle = colour("--ink");
      pen.fillRect(Math.round((output.numPrompt / output.numTokens) * width), 0, Math.max(1, scale), height);
    }
    const cursor = cursors.get(canvas);
    if (cursor !== null) {
      const from = (cursor / output.numTokens) * width, wide = Math.max(2 * scale, width / output.numTokens);
      pen.strokeStyle = colour("--ink");
      pen.lineWidth = 2 * scale;
      pen.strokeRect(Math.min(from, width - wide), scale, wide, height - 2 * scale);
    }
  };

  const printed = (token) => (token === undefined ? "" : token.replaceAll("\n", "⏎"));
  const show = (canvas, position) => {
    const [output, strip] = of(canvas);
    for (const other of canvases) {
      if (other === canvas || cursors.get(other) === null) continue;
      cursors.set(other, null);
      draw(other);
    }
    cursors.set(canvas, position);
    draw(canvas);
    const kind = kindAt(strip, position), state = words[kind] || output.absent;
    const side = position < output.numPrompt ? "prompt" : "output";
    const told = `position ${position} of the ${side}, “${printed(output.tokens[position])}”: ${state}`;
    canvas.setAttribute("aria-valuenow", position);
    canvas.setAttribute("aria-valuetext", told);
    where.textContent = `${strip.label}: ${told}`;
    const parts = [];
    for (let p = Math.max(0, position - 12); p < Math.min(output.numTokens, position + 13); p++) {
      const part = document.createElement("i");
      part.className = kindAt(strip, p) + (p === position ? " here" : "");
      part.textContent = printed(output.tokens[p]) || "·";
      parts.push(part);
    }
    text.replaceChildren(...parts);
    readout.hidden = false;
  };

  for (const canvas of canvases) {
    const [output] = of(canvas);
    const last = output.numTokens - 1;
    if (last < 0) continue;
    const point = (event) => {
      const box = canvas.getBoundingClientRect();
      const position = Math.floor(((event.clientX - box.left) / box.width) * output.numTokens);
      show(canvas, Math.max(0, Math.min(last, position)));
    };
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerdown", point);
    canvas.addEventListener("focus", () => {
      if (cursors.get(canvas) === null) show(canvas, +canvas.getAttribute("aria-valuenow"));
    });
    canvas.addEventListener("keydown", (event) => {
      const now = cursors.get(canvas) ?? 0, far = Math.max(1, Math.round(output.numTokens / 20));
      const steps = {
        ArrowRight: now + 1, ArrowUp: now + 1, ArrowLeft: now - 1, ArrowDown: now - 1,
        PageUp: now + far, PageDown: now - far, Home: 0, End: last,
      };
      if (!(event.key in steps)) return;
      event.preventDefault();
      show(canvas, Math.max(0, Math.min(last, steps[event.key])));
    });
  }
  const drawAll = () => canvases.forEach(draw);
  drawAll();
  window.addEventListener("resize", drawAll);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
})();
