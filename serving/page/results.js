// The table of *Score many*: sorted and filtered in the browser, so that a thousand rows stay quick.
// `element` and `watch` are Gradio's; `props.value` holds the rows, the most unusual first.
const COLUMNS = [
  { name: "image" },
  { name: "file", of: (row) => row.file.toLowerCase() },
  { name: "verdict", of: (row) => row.verdict },
  { name: "p-value", of: (row) => row.p, isNumber: true },
  { name: "bits per dim", of: (row) => row.bpd, isNumber: true },
  { name: "notes" },
];
const AT_ONCE = 50;
const state = { column: null, isDown: false, only: "all", text: "", shown: AT_ONCE };

const make = (tag, className, text, role) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (role) node.role = role;  // which the display of a list of cards would take from a table
  if (text !== undefined && text !== null) node.textContent = text;
  return node;
};
const rows = () => props.value || [];

function chosen() {
  const found = rows().filter(
    (row) =>
      (state.only === "all" || row.choice === state.only) &&
      row.file.toLowerCase().includes(state.text),
  );
  if (state.column === null) return found;
  const { of } = COLUMNS[state.column];
  const sign = state.isDown ? -1 : 1;
  return found.sort((a, b) => {
    const [x, y] = [of(a), of(b)];
    if (x === null || y === null) return (x === null) - (y === null);  // without a value: last
    return sign * (x < y ? -1 : x > y ? 1 : 0);
  });
}

function rowOf(row) {
  const line = make("tr", "", null, "row");
  const cell = (className, text) => line.appendChild(make("td", className, text, "cell"));
  const picture = cell("");
  if (row.picture) {
    const image = picture.appendChild(make("img"));
    image.src = row.picture;
    image.alt = "";
  }
  cell("ade-file", row.file);
  cell("").appendChild(make("span", `ade-badge ade-${row.choice}`, row.verdict));
  const numbers = [["p", row.p?.toPrecision(2)], ["bits per dim", row.bpd?.toFixed(3)]];
  for (const [name, text] of numbers) cell("ade-number", text ?? "").dataset.name = name;
  cell("ade-note", row.notes);
  return line;
}

const tools = make("div", "ade-tools");
const only = make("select");
const search = make("input");
search.type = "search";
const order = make("select");
order.append(new Option("most unusual first", ""));
COLUMNS.forEach(({ name, of }, i) => { if (of) order.append(new Option(name, i)); });
for (const [label, node] of [["Show", only], ["File name contains", search], ["Sort by", order]]) {
  tools.appendChild(make("label", node === order ? "ade-sort" : "", label)).appendChild(node);
}
const count = tools.appendChild(make("span", "ade-count"));
count.setAttribute("role", "status");
const table = make("table", "", null, "table");
const head = table.appendChild(make("thead", "", null, "rowgroup")).appendChild(make("tr", "", null, "row"));
const body = table.appendChild(make("tbody", "", null, "rowgroup"));
const more = make("button", "ade-more", "Show more");

COLUMNS.forEach((column, i) => {
  const cell = head.appendChild(make("th", column.isNumber ? "ade-number" : "", null, "columnheader"));
  cell.scope = "col";
  if (!column.of) {
    cell.textContent = column.name;
    return;
  }
  cell.appendChild(make("button", "", column.name)).addEventListener("click", () => {
    state.isDown = state.column === i && !state.isDown;
    state.column = i;
    draw();
  });
});

function draw() {
  const found = chosen();
  [...head.children].forEach((cell, i) => {
    if (COLUMNS[i].of) {
      const direction = state.isDown ? "descending" : "ascending";
      cell.setAttribute("aria-sort", state.column === i ? direction : "none");
    }
  });
  order.value = state.column ?? "";
  body.replaceChildren(...found.slice(0, state.shown).map(rowOf));
  const [shown, all] = [Math.min(state.shown, found.length), rows().length];
  const files = `${found.length} file${found.length === 1 ? "" : "s"}`;
  const those = found.length < all ? `${files} found, of ${all}` : files;
  count.textContent = shown < found.length ? `Showing the first ${shown} of ${those}` : those;
  more.hidden = found.length <= state.shown;
  more.style.display = more.hidden ? "none" : "";
}

function restart() {
  Object.assign(state, { column: null, isDown: false, only: "all", text: "", shown: AT_ONCE });
  const names = { all: "all files" };
  for (const row of rows()) names[row.choice] = row.verdict;
  only.replaceChildren(...Object.entries(names).map(([value, name]) => new Option(name, value)));
  search.value = "";
  root.hidden = rows().length === 0;
  root.style.display = root.hidden ? "none" : "";
  draw();
}

only.addEventListener("change", () => { state.only = only.value; state.shown = AT_ONCE; draw(); });
search.addEventListener("input", () => {
  state.text = search.value.toLowerCase();
  state.shown = AT_ONCE;
  draw();
});
order.addEventListener("change", () => {
  Object.assign(state, { column: order.value === "" ? null : Number(order.value), isDown: false });
  draw();
});
more.addEventListener("click", () => { state.shown += 4 * AT_ONCE; draw(); });
const root = element.querySelector(".ade-results");
root.append(tools, table, more);
restart();
watch("value", restart);
