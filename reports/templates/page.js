"use strict";
(() => {
  document.documentElement.classList.add("js");

  // What a cell sorts by: its first number where it begins with one, else its text; nothing comes last.
  const keyOf = (cell) => {
    const text = cell ? cell.textContent.trim() : "";
    if (text === "" || text === "-") return null;
    const found = /^[<+]?(-?(?:\d+\.?\d*|\.\d+))(?![\d_])/.exec(text);
    return found ? Number(found[1]) - (text[0] === "<" ? 1e-9 : 0) : text.toLowerCase();
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), undefined, { numeric: true });
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      heading.querySelector("button").addEventListener("click", () => {
        const down = heading.getAttribute("aria-sort") === "ascending";
        headings.forEach((other) => other.setAttribute("aria-sort", "none"));
        heading.setAttribute("aria-sort", down ? "descending" : "ascending");
        const body = table.tBodies[0];
        const rows = [...body.rows].map((row) => [keyOf(row.cells[column]), row]);
        rows.sort(([a], [b]) => {
          if (a === null || b === null) return (a === null) - (b === null);
          return down ? compare(b, a) : compare(a, b);
        });
        body.append(...rows.map(([, row]) => row));
      });
    });
  }

  const show = (items, wanted, status, noun) => {
    let shown = 0;
    for (const item of items) {
      item.hidden = !wanted(item);
      shown += item.hidden ? 0 : 1;
    }
    status.textContent = `${shown} of ${items.length} ${noun}`;
  };
  for (const box of document.querySelectorAll("input[data-filters]")) {
    const rows = [...document.getElementById(box.dataset.filters).tBodies[0].rows];
    const status = box.closest(".controls").querySelector("output");
    const filter = () => {
      const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
      const has = (row) => words.every((word) => row.textContent.toLowerCase().includes(word));
      show(rows, has, status, "rows");
    };
    box.addEventListener("input", filter);
    filter();
  }
  for (const form of document.querySelectorAll(".filter-examples")) {
    const [run, outcome] = form.querySelectorAll("select");
    const items = [...document.getElementById(form.dataset.filters).querySelectorAll("article")];
    const filter = () => {
      const wanted = (item) =>
        item.dataset.outcomes
          .split(" ")
          .map((pair) => pair.split(":"))
          .some(([r, o]) => (run.value === "" || run.value === r) && (outcome.value === "" || outcome.value === o));
      show(items, wanted, form.querySelector("output"), "examples");
    };
    run.addEventListener("change", filter);
    outcome.addEventListener("change", filter);
    filter();
  }
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
})();
