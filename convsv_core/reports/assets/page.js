"use strict";
(() => {
  const [data, pictures] = ["charts-data", "pictures-data"].map((id) => JSON.parse(document.getElementById(id).textContent));
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const scales = {}, views = {};
  let picked = 0;

  const all = (selector) => document.querySelectorAll(selector);
  // Vega finds a curve near its points alone, and the element under the pointer finds it everywhere.
  const depthOf = (event, item) => {
    const found = item || event.target.__data__;
    return (found && found.datum && found.datum.depth) || 0;
  };

  function tell(signal, depth) {
    for (const view of Object.values(views)) view.signal(signal, depth).runAsync();
  }

  function pick(depth) {
    picked = depth === picked ? 0 : depth;
    tell("picked", picked);
    for (const element of all("[data-depth]")) {
      element.classList.toggle("on", Number(element.dataset.depth) === picked);
    }
    for (const chip of all(".chip")) chip.setAttribute("aria-pressed", Number(chip.dataset.depth) === picked);
    const bar = document.getElementById("picked");
    bar.hidden = !picked;
    if (!picked) return;
    const row = document.querySelector(`#layers-table tr[data-depth="${picked}"]`);
    const label = document.createElement("span");
    const noun = document.getElementById("layers-table").dataset.noun;
    label.textContent = `${noun} ${row.cells[0].textContent}: ${row.cells[1].textContent}`;
    const parts = [label];
    if (document.getElementById(`layer-${picked}`)) {
      const link = document.createElement("a");
      link.href = `#layer-${picked}`;
      link.textContent = "its images";
      parts.push(link);
    }
    const release = document.createElement("button");
    release.type = "button";
    release.textContent = "release";
    release.addEventListener("click", () => pick(picked));
    bar.replaceChildren(...parts, release);
  }

  const options = () => ({ actions: false, renderer: "svg", tooltip: { theme: dark.matches ? "dark" : "light" } });

  // A chart of thousands of frequencies takes the place of its picture when the pointer comes, and not before.
  async function enliven(place) {
    const drawn = document.createElement("div");
    await vegaEmbed(drawn, pictures[place.dataset.picture], options());
    place.replaceChildren(drawn);
  }

  async function draw(name) {
    const scale = scales[name] || data[name].first;
    const { view } = await vegaEmbed(`#${name}`, data[name][scale], options());
    views[name] = view;
    view.addEventListener("click", (event, item) => { if (depthOf(event, item)) pick(depthOf(event, item)); });
    view.addEventListener("pointermove", (event, item) => tell("pointed", depthOf(event, item)));
    view.addEventListener("pointerout", () => tell("pointed", 0));
    tell("picked", picked);
  }

  for (const place of all("[data-picture]")) {
    place.addEventListener("pointerenter", () => enliven(place), { once: true });
  }
  for (const button of all("[data-scale]")) {
    button.addEventListener("click", () => {
      scales[button.dataset.chart] = button.dataset.scale;
      for (const other of all(`[data-chart="${button.dataset.chart}"]`)) {
        other.setAttribute("aria-pressed", other === button);
      }
      draw(button.dataset.chart);
    });
  }
  for (const chip of all(".chip")) {
    const depth = Number(chip.dataset.depth);
    chip.addEventListener("click", () => pick(depth));
    chip.addEventListener("pointerenter", () => tell("pointed", depth));
    chip.addEventListener("pointerleave", () => tell("pointed", 0));
  }
  document.querySelector("#layers-table tbody").addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (row && row.dataset.depth) pick(Number(row.dataset.depth));
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && picked) pick(picked); });

  async function sortable() {
    const source = JSON.parse(document.getElementById("table-script").textContent);
    const address = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    const { default: DataTable } = await import(address);
    URL.revokeObjectURL(address);
    new DataTable("#layers-table", {
      paging: false,
      info: false,
      autoWidth: false,
      order: [[0, "asc"]],
      layout: { topStart: "search", topEnd: null, bottomStart: null, bottomEnd: null },
      language: { search: "", searchPlaceholder: "filter by name or figure" },
    });
  }

  const themed = () => document.documentElement.classList.toggle("dark", dark.matches);
  themed();
  dark.addEventListener("change", () => { themed(); Object.keys(data).forEach(draw); });
  window.ready = Promise.all([...Object.keys(data).map(draw), sortable()]);
})();
