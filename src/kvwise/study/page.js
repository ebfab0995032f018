// Draws every chart of the page in the reader's colours, light or dark, and again when these change.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const themed = (layout) => {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const out = structuredClone(layout);
    out.font.color = colour("--ink");
    for (const axis of [out.xaxis, out.yaxis]) {
      axis.gridcolor = colour("--line");
      axis.linecolor = colour("--line");
      axis.tickcolor = colour("--line");
      if (axis.title) axis.title.font = { size: 12, color: colour("--soft") };
      axis.tickfont = { size: 11, color: colour("--soft") };
    }
    for (const shape of out.shapes || []) shape.line.color = colour("--soft");
    for (const note of out.annotations || []) if (!note.font.color) note.font.color = colour("--soft");
    out.hoverlabel = { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } };
    return out;
  };
  const options = { responsive: true, displayModeBar: false, displaylogo: false };
  const draw = (inside = document) => {
    for (const place of inside.querySelectorAll(".plot")) {
      const chart = charts[place.id];
      // What is folded has no width to be drawn in yet.
      if (place.offsetParent) Plotly.react(place, chart.data, themed(chart.layout), options);
    }
  };
  draw();
  for (const fold of document.querySelectorAll("details")) fold.addEventListener("toggle", () => draw(fold));
  dark.addEventListener("change", () => draw());
})();
