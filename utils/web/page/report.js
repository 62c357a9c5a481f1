// Reports: values under the pointer, and how long ago the run was heard of. No library.
"use strict";

for (const plot of document.querySelectorAll(".plot")) {
  const lines = JSON.parse(plot.dataset.lines);
  const svg = plot.querySelector("svg");
  const cursor = plot.querySelector(".cursor");
  const told = plot.querySelector("output");

  const nearest = (points, x) =>
    points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    const found = lines.map((line) => ({ line, point: nearest(line.points, x) }));
    const at = found.reduce((best, one) =>
      Math.abs(one.point[0] - x) < Math.abs(best.point[0] - x) ? one : best).point;
    cursor.setAttribute("x1", at[0]);
    cursor.setAttribute("x2", at[0]);
    told.replaceChildren();
    const head = document.createElement("strong");
    head.textContent = at[2];
    told.append(head);
    for (const { line, point } of found) {
      const row = document.createElement("div");
      row.textContent = `${line.name}: ${point[3]}${point[2] === at[2] ? "" : ` (at ${point[2]})`}`;
      row.style.color = `var(--s${line.colour})`;
      told.append(row);
    }
    cursor.style.visibility = told.style.visibility = "visible";
    const left = at[0] / scale;
    const wide = told.getBoundingClientRect().width;
    told.style.left = `${left + wide + 14 > box.width ? Math.max(0, left - wide - 10) : left + 10}px`;
  });
  svg.addEventListener("pointerleave", () => {
    cursor.style.visibility = told.style.visibility = "hidden";
  });
}

for (const mark of document.querySelectorAll("[data-since]")) {
  const minutes = (Date.now() / 1000 - Number(mark.dataset.since)) / 60;
  if (minutes < 2) continue;
  const ago = minutes < 120 ? `${Math.round(minutes)} minutes` : minutes < 2880
    ? `${Math.round(minutes / 60)} hours` : `${Math.round(minutes / 1440)} days`;
  mark.textContent = ` (${ago} ago)`;
  const silent = document.querySelector("[data-silent]");
  if (silent && minutes > Number(silent.dataset.silent)) silent.hidden = false;
}
