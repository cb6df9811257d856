// Starts the page: theme, table, charts. data-ready on <html>: milliseconds until all was drawn.
const root = document.documentElement;

function isDark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function nameTheme() {
  const button = document.getElementById("theme");
  button.textContent = isDark() ? "Light" : "Dark";
  button.setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} theme`);
}

function recolour() {
  nameTheme();
  plots.forEach(paint);
}

document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  recolour();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
nameTheme();
const moduleTable = document.getElementById("modules-table");
if (moduleTable) new ModuleTable(moduleTable, page.table);
drawCharts().then(() => {
  wireZoom();
  wireHover();
  root.dataset.ready = Math.round(performance.now());
});
