"use strict";
// Sort the table of studies by a heading, and filter it.
const body = document.querySelector("#studies tbody"), heads = [...document.querySelectorAll("#studies thead th")];
const form = document.getElementById("filters"), lines = [...body.rows];
const at = (id) => document.getElementById(id).value;
heads.forEach((head, k) => head.querySelector("button").addEventListener("click", () => {
  const down = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : k > 0;
  const of = (line) => Number(line.cells[k].dataset.sort);
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...lines.sort((a, b) => (down ? of(b) - of(a) : of(a) - of(b))));
}));
const fits = (row) => {
  const [, group, grade, sure] = row.match(/^([a-z]+)(\d)(\d+)$/);
  return (!at("group") || group === at("group")) && (!at("grade") || at("grade").includes(grade))
    && sure >= Number(at("least")) && sure <= Number(at("most") || 100);
};
const filter = () => {
  lines.forEach((line) => { line.hidden = !line.dataset.rows.split(" ").some(fits); });
  document.getElementById("count").textContent = `${lines.filter((line) => !line.hidden).length} of ${lines.length} studies`;
};
form.addEventListener("input", filter);
form.addEventListener("reset", () => setTimeout(filter));
form.addEventListener("submit", (event) => event.preventDefault());
