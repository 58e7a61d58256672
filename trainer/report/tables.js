// Tables that a heading sorts, and the table of clips for a chosen metric.

const DIRECTIONS = { none: "ascending", ascending: "descending", descending: "ascending" };

function sortBy(table, heading) {
  const headings = [...heading.parentElement.children];
  const place = headings.indexOf(heading);
  const direction = DIRECTIONS[heading.getAttribute("aria-sort")];
  for (const other of headings) other.setAttribute("aria-sort", other === heading ? direction : "none");
  const value = (row) => {
    const { dataset, textContent } = row.children[place];
    return dataset.value === undefined ? textContent : dataset.value === "" ? null : Number(dataset.value);
  };
  const sign = direction === "ascending" ? 1 : -1;
  const rows = [...table.tBodies[0].rows].sort((one, two) => {
    const [a, b] = [value(one), value(two)];
    if (a === null || b === null) return (a === null) - (b === null); // undefined stands last
    return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  });
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  table.addEventListener("click", (event) => {
    const heading = event.target.closest("thead th");
    if (heading) sortBy(table, heading);
  });
}

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function headingCell(text) {
  const cell = element("th", { scope: "col" }, element("button", { type: "button" }, text));
  cell.setAttribute("aria-sort", "none");
  return cell;
}

const metricChoice = document.getElementById("clip-metric");

function showClips() {
  const { name, digits } = data.metrics.find((metric) => metric.name === metricChoice.value);
  const rows = new Map();
  for (const row of data.values) {
    if (!rows.has(row.clip)) rows.set(row.clip, { clip: row.name, values: new Map() });
    rows.get(row.clip).values.set(row.system, row[name]);
  }
  const body = [...rows.values()].map(({ clip, values }) => {
    const cells = data.systems.map(({ name: system }) => {
      const value = values.get(system) ?? null;
      const cell = element("td", {}, value === null ? "–" : (Math.round(value * 10 ** digits) / 10 ** digits + 0).toFixed(digits).replace("-", "−"));
      cell.dataset.value = value ?? "";
      return cell;
    });
    return element("tr", {}, element("th", { scope: "row" }, clip), ...cells);
  });
  const head = element("tr", {}, headingCell("Clip"), ...data.systems.map(({ label }) => headingCell(label)));
  document.getElementById("by-clip").replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
}

metricChoice.addEventListener("change", showClips);
showClips();
