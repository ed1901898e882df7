// Sorts and filters tables, shows and hides runs, says what a figure holds where it is pointed at. Without it, all is there.
"use strict";
const all = (what, within = document) => [...within.querySelectorAll(what)];

// --- theme: auto, light, dark ---
const theme = document.getElementById("theme");
const themes = ["auto", "light", "dark"];
const remembered = (value) => {
  try {
    if (value !== undefined) localStorage.setItem("secateur-theme", value);
    return localStorage.getItem("secateur-theme");
  } catch { return null; }  // a page from disk may have no storage
};
const wear = (name) => {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  theme.textContent = `Theme: ${name}`;
  theme.value = name;
};
wear(themes.includes(remembered()) ? remembered() : "auto");
theme.hidden = false;
theme.addEventListener("click", () => {
  const next = themes[(themes.indexOf(theme.value) + 1) % themes.length];
  wear(next);
  remembered(next);
});

// --- tables sort ---
const key = (row, place) => {
  const cell = row.cells[place];
  if (cell.dataset.v !== undefined) return cell.dataset.v === "nan" ? NaN : Number(cell.dataset.v);
  const text = cell.textContent.trim();
  return /^-?\d+(\.\d+)?$/.test(text) ? Number(text) : text.toLowerCase();
};
const order = (a, b) => {
  if (typeof a === "number" && typeof b === "number") return Number.isNaN(a) - Number.isNaN(b) || a - b || 0;
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return a.localeCompare(b, "en", { numeric: true });
};
const sort = (table, head) => {
  const down = head.getAttribute("aria-sort") === "ascending";
  all("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [key(row, head.cellIndex), row]);
  const unknown = (k) => typeof k === "number" && Number.isNaN(k);  // last, in both directions
  rows.sort(([a], [b]) => unknown(a) || unknown(b) ? unknown(a) - unknown(b) : down ? order(b, a) : order(a, b));
  body.append(...rows.map(([, row]) => row));
};
for (const table of all("table")) {
  for (const head of all("thead th", table)) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.title = "sort";
    head.append(button);
    button.addEventListener("click", () => sort(table, head));
  }
}

// --- tables filter ---
for (const block of all("[data-filters]")) {
  const bar = block.querySelector(".filters");
  const [words, kind, differences] = ["input[type=search]", "select", "[data-differences]"].map((s) => bar.querySelector(s));
  const rows = [...block.querySelector("tbody").rows];
  const apply = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const stays = wanted.every((word) => text.includes(word)) &&
        (!kind?.value || row.dataset.kind === kind.value) && !(differences?.checked && row.dataset.same === "yes");
      row.classList.toggle("filtered", !stays);
      shown += stays;
    }
    bar.querySelector(".count").textContent = `${shown} of ${rows.length} rows`;
  };
  bar.hidden = false;
  bar.addEventListener("input", apply);
  apply();
}

// --- runs are shown and hidden ---
for (const box of all("[data-show]")) {
  box.closest("fieldset").hidden = false;
  const run = box.dataset.show;
  const show = () => all(`.run-${run}, [data-run="${run}"]`).forEach((part) => part.classList.toggle("off", !box.checked));
  box.addEventListener("change", show);
  show();
}
const hidden = (run) => document.querySelector(`[data-show="${run}"]`)?.checked === false;

// --- what scrolls can be reached by keys ---
const reachable = () => all(".scroll").forEach((part) => {
  if (part.scrollWidth > part.clientWidth + 1 || part.scrollHeight > part.clientHeight + 1) part.tabIndex = 0;
  else part.removeAttribute("tabindex");
});
addEventListener("resize", reachable);
document.addEventListener("toggle", reachable, true);
reachable();

// --- figures tell what they hold at a place, by pointer and by arrow keys ---
const short = (v) => v === null || v === undefined ? "–" : Number(v.toPrecision(4)).toString();
const readers = {
  map: (data) => {
    const [rows, columns] = [data.values.length, data.values[0].length];
    const tell = (row, column) => {
      const value = data.values[row][column];
      const size = data.units[row] / columns;
      const place = data.column === "channels" && size > 1
        ? `channels ${Math.round(column * size)} to ${Math.round((column + 1) * size) - 1}` : `${data.column.replace(/s$/, "")} ${column}`;
      const said = value === null ? "none there" : data.unit === "gate value"
        ? (value ? `gate value ${short(value)}` : "removed") : `${short(value)} ${data.unit}`;
      return `layer ${data.layers[row]}, ${place}: ${said}`;
    };
    return {
      rows, columns,
      at: (x, y) => [Math.min(rows - 1, Math.floor(y * rows)), Math.min(columns - 1, Math.floor(x * columns))],
      tell: (row, column) => [tell(row, column), column / columns, row / rows, 1 / columns, 1 / rows],
    };
  },
  lines: (data) => {
    const longest = data.lines.reduce((a, b) => b.x.length > a.x.length ? b : a);
    const [low, high] = data.x;
    const near = (xs, x) => xs.reduce((best, v, i) => Math.abs(v - x) < Math.abs(xs[best] - x) ? i : best, 0);
    return {
      rows: 1, columns: longest.x.length,
      at: (x) => [0, near(longest.x, low + x * (high - low))],
      tell: (_, i) => {
        const x = longest.x[i];
        const said = data.lines.filter((line) => line.x.length && !hidden(line.run)).map((line) => `${line.name} ${short(line.y[near(line.x, x)])}`);
        return [`${data.at} ${short(x)}: ${said.slice(0, 8).join(", ")}${said.length > 8 ? " …" : ""}`, (x - low) / (high - low), 0, 0, 1];
      },
    };
  },
  points: (data) => {
    const scale = ([low, high], v, log) => log ? Math.log(v / low) / Math.log(high / low) : (v - low) / (high - low);
    const places = data.points.map((p) => [scale(data.x, p.x, false), 1 - scale(data.y, p.y, data.log)]);
    return {
      rows: 1, columns: places.length,
      at: (x, y) => [0, places.reduce((best, p, i) => hidden(data.points[i].run) ? best :
        Math.hypot(p[0] - x, p[1] - y) < Math.hypot(places[best][0] - x, places[best][1] - y) ? i : best, 0)],
      tell: (_, i) => [`${data.points[i].name}: ${data.points[i].text}`, places[i][0] - .012, places[i][1] - .02, .024, .04],
    };
  },
};
for (const source of all("figure > script")) {
  const data = JSON.parse(source.textContent);
  const figure = source.parentElement;
  const canvas = figure.querySelector(".canvas");
  const says = figure.querySelector(".readout");
  const reader = readers[data.kind](data);
  if (!reader.columns) continue;
  const [left, top, width, height] = data.box;
  const cross = document.createElement("div");
  cross.className = "cross";
  canvas.append(cross);
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "group");
  canvas.setAttribute("aria-label", `${figure.querySelector("figcaption").textContent}: arrow keys read it`);
  let [row, column] = [0, 0];
  const show = () => {
    const [text, x, y, w, h] = reader.tell(row, column);
    says.textContent = text;
    const share = (v) => `${100 * v}%`;
    Object.assign(cross.style, { display: "block", left: share(left + x * width), top: share(top + y * height), width: share(w * width), height: share(h * height) });
  };
  canvas.addEventListener("pointermove", (event) => {
    const place = canvas.getBoundingClientRect();
    const x = ((event.clientX - place.left) / place.width - left) / width;
    const y = ((event.clientY - place.top) / place.height - top) / height;
    if (x < 0 || y < 0 || x > 1 || y > 1) return;
    [row, column] = reader.at(x, y);
    show();
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    row = Math.max(0, Math.min(reader.rows - 1, row + step[0]));
    column = Math.max(0, Math.min(reader.columns - 1, column + step[1]));
    show();
  });
  canvas.addEventListener("focus", () => { if (canvas.matches(":focus-visible")) show(); });
  canvas.addEventListener("blur", () => { cross.style.display = "none"; says.textContent = ""; });
}
