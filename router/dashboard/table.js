// A table whose rows and columns come and go while its cells stay: rows are kept by key, cells by column.

import { h, keyed, setAttribute, setText } from "/static/dom.js";

export class Table {
  #columns = () => [];
  #head = h("tr");
  #body = h("tbody");
  #empty;
  #table;

  /**
   * @param host element to fill
   * @param options `{caption, empty: node, columns(context) -> [{key, title, label, class, update(cell, row)}], key(row)}`
   */
  constructor(host, options) {
    this.#columns = options.columns;
    this.key = options.key;
    this.#table = h("table", { hidden: true }, h("caption", { class: "unseen" }, options.caption), h("thead", {}, this.#head), this.#body);
    this.#empty = h("p", { class: "empty" }, ...options.empty);
    host.append(this.#table, this.#empty);
  }

  /** Shows the rows; `context` is handed to `columns`. */
  render(rows, context) {
    const columns = this.#columns(context);
    this.#table.hidden = rows.length === 0;
    this.#empty.hidden = rows.length > 0;
    keyed(this.#head, columns, ({ key }) => key, () => h("th", { scope: "col" }), (cell, column) => {
      setText(cell, column.label);
      setAttribute(cell, "class", column.class);
      setAttribute(cell, "title", column.title);
    });
    keyed(this.#body, rows, this.key, () => h("tr"), (line, row) => renderRow(line, row, columns));
  }
}

function renderRow(line, row, columns) {
  keyed(line, columns, ({ key }) => key, (column) => (column.heads ? h("th", { scope: "row" }) : h("td")), (cell, column) => {
    setAttribute(cell, "class", column.class);
    column.update(cell, row);
  });
}

/** A column of text. */
export function textColumn(key, label, text, options = {}) {
  return {
    key, label, ...options,
    update(cell, row) {
      setText(cell, text(row));
      if (options.hover !== undefined) setAttribute(cell, "title", options.hover(row));
    },
  };
}
