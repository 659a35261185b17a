"use strict";

const MOST_ROWS = 200;
const collator = new Intl.Collator("en", { numeric: true });
const count = new Intl.NumberFormat("en");

/** The rows of a table: in an order, those that hold each of some words, and the first of them. */
class Rows {
  constructor(table) {
    this.body = table.tBodies[0];
    this.all = Array.from(this.body.rows);
    this.texts = null;
    this.words = [];
    this.most = MOST_ROWS;
    this.more = document.createElement("p");
    this.more.className = "more";
    this.status = document.createElement("output");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Show all rows";
    button.addEventListener("click", () => {
      this.most = Infinity;
      this.show();
    });
    this.more.append(this.status, " ", button);
    (table.closest(".scroll") ?? table).after(this.more);
    this.show();
  }

  show() {
    const rows = this.words.length ? this.all.filter((row) => this.matches(row)) : this.all;
    const shown = rows.slice(0, this.most);
    for (const row of shown) row.hidden = false;
    this.body.replaceChildren(...shown);
    this.more.hidden = shown.length === this.all.length;
    this.more.lastChild.hidden = shown.length === rows.length;
    this.status.textContent = `${count.format(shown.length)} of ${count.format(this.all.length)} rows`;
  }

  matches(row) {
    this.texts ??= new Map(this.all.map((each) => [each, typed(each.textContent)]));
    return this.words.every((word) => this.texts.get(row).includes(word));
  }

  sortBy(column, sign) {
    const keyed = this.all.map((row) => [sortKey(row.cells[column]), row]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * compare(a, b);
    });
    this.all = keyed.map(([, row]) => row);
    this.show();
  }
}

/** A text as it is typed: in small letters, with the keyboard's minus sign. */
function typed(text) {
  return text.toLowerCase().replaceAll("\u2212", "-");
}

/** What a row sorts by: the data-value of its cell or the text, as a number if it is one. */
function sortKey(cell) {
  const text = (cell?.dataset.value ?? cell?.textContent ?? "").trim().replace("\u2212", "-");
  if (text === "" || text === "\u2013") return null;
  const number = Number(text);
  return Number.isNaN(number) ? text : number;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return collator.compare(String(a), String(b));
}

const rowsOf = new Map();

for (const table of document.querySelectorAll("table.sortable")) {
  const rows = new Rows(table);
  rowsOf.set(table, rows);
  const headers = Array.from(table.tHead.rows[table.tHead.rows.length - 1].cells);
  for (const header of headers) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => {
      const ascending = header.getAttribute("aria-sort") !== "ascending";
      for (const other of headers) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      rows.sortBy(header.cellIndex, ascending ? 1 : -1);
    });
    header.append(button);
  }
}

for (const input of document.querySelectorAll("input.filter")) {
  const rows = rowsOf.get(document.getElementById(input.dataset.table));
  input.addEventListener("input", () => {
    rows.words = typed(input.value).split(/\s+/).filter(Boolean);
    rows.show();
  });
}
