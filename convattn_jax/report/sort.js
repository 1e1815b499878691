"use strict";
// A click on a column's name sorts its table by it; another click turns the order round. Empty cells stay last.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
    const turn = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const key = (row) => row.cells[head.cellIndex].dataset.value;
    const rows = Array.from(body.rows);
    const numbers = rows.every((row) => key(row) === undefined || !Number.isNaN(Number(key(row))));
    rows.sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      return turn * (numbers ? Number(x) - Number(y) : x.localeCompare(y));
    });
    for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", turn === 1 ? "ascending" : "descending");
    body.append(...rows);
  });
}
