"use strict";
// Scroll the series of a study and hide its marks; without this script one slice of each series is shown.
for (const viewer of document.querySelectorAll(".viewer")) {
  const films = [...viewer.querySelectorAll(".film")];
  const slider = viewer.querySelector("input"), output = viewer.querySelector("output");
  viewer.show = (n) => {
    films.forEach((film, k) => { film.hidden = k !== n; });
    slider.value = n + 1;
    output.textContent = `${n + 1} of ${films.length}`;
  };
  slider.addEventListener("input", () => viewer.show(Number(slider.value) - 1));
}
for (const link of document.querySelectorAll("a[data-slice]")) {
  link.addEventListener("click", () => document.querySelector(link.hash).show(Number(link.dataset.slice)));
}
const marks = document.getElementById("marks");
marks.addEventListener("change", () => document.querySelector(".viewers").classList.toggle("bare", !marks.checked));
