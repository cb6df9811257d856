// Numbers and small pieces of the page. Text goes in as text, never as markup.
const GIB = 2 ** 30;
const MIB = 2 ** 20;

function sizeText(bytes) {
  if (Math.abs(bytes) >= GIB) return (bytes / GIB).toFixed(2) + " GiB";
  if (Math.abs(bytes) >= MIB) return (bytes / MIB).toFixed(1) + " MiB";
  return bytes === 0 ? "0" : (bytes / 1024).toFixed(1) + " KiB";
}

function secondsText(s) {
  const a = Math.abs(s);
  if (a >= 100) return Math.round(s).toLocaleString("en") + " s";
  if (a >= 1) return s.toFixed(2) + " s";
  if (a >= 1e-3) return (s * 1e3).toFixed(1) + " ms";
  return s === 0 ? "0" : (s * 1e6).toFixed(0) + " µs";
}

function momentText(s, span) {
  const digits = Math.min(6, Math.max(0, 3 - Math.floor(Math.log10(span || 1))));
  return s.toFixed(digits) + " s";
}

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function swatch(kind) {
  return element("span", { class: "swatch k-" + kind, "aria-hidden": "true" });
}
