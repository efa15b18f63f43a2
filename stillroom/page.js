// A report's script: tables sort by the buttons that it puts into their heads, and paper shows what is folded.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0], first = [...body.rows];
  const said = table.closest("figure").querySelector("[role=status]");
  const valueOf = (row, column) => row.cells[column].dataset.value;
  const compare = (a, b) => a - b || (a === b ? 0 : String(a).localeCompare(String(b), "en", {numeric: true}));
  heads.forEach((head, column) => {
    const button = document.createElement("button"), name = head.textContent;
    const isNumber = first.some(row => row.cells[column].dataset.value !== undefined);
    const key = row => isNumber ? valueOf(row, column) && Number(valueOf(row, column)) : row.cells[column].textContent;
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const was = head.getAttribute("aria-sort");
      const way = was === "ascending" || (was === "none" && isNumber) ? "descending" : "ascending";
      const sign = way === "ascending" ? 1 : -1;
      const rows = [...body.rows].sort((a, b) => {
        const left = key(a), right = key(b);
        if (left === undefined || right === undefined) return (left === undefined) - (right === undefined);
        return sign * compare(left, right);
      });
      body.append(...rows);
      for (const other of heads) other.setAttribute("aria-sort", other === head ? way : "none");
      said.textContent = "sorted by " + name + ", " + way;
    });
  });
}
const closed = [];
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details:not([open])")) { closed.push(part); part.open = true; }
});
addEventListener("afterprint", () => { while (closed.length) closed.pop().open = false; });
