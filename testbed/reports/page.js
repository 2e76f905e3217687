"use strict";
// Tables sorted by a column, and the choice between light and dark: the page is whole without either.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  if (body.rows.length < 3) continue;
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const number = head.classList.contains("number");
      const rows = Array.from(body.rows, (row) => [row, row.cells[column].dataset.value]);
      rows.sort(([, one], [, other]) => {
        if (one === undefined || other === undefined) return (one === undefined) - (other === undefined);
        return order * (number ? one - other : one.localeCompare(other, undefined, { numeric: true }));
      });
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
      body.append(...rows.map(([row]) => row));
    });
  });
}

const themes = document.createElement("fieldset");
themes.className = "theme";
const legend = document.createElement("legend");
legend.textContent = "Colours";
themes.append(legend);
for (const theme of ["auto", "light", "dark"]) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = theme;
  button.setAttribute("aria-pressed", String(theme === "auto"));
  button.addEventListener("click", () => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    for (const each of themes.querySelectorAll("button")) each.setAttribute("aria-pressed", String(each === button));
  });
  themes.append(button);
}
document.querySelector("nav").append(themes);
