// What the pages do in the browser: the theme, texts of tooltips, the slider. No requests, no other host.
"use strict";
window.eqp = (() => {
  const KEY = "equipoise-theme";
  const ORDER = ["auto", "light", "dark"];
  const system = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => {
    try {
      const kept = localStorage.getItem(KEY);
      return ORDER.includes(kept) ? kept : "auto";
    } catch {
      return "auto"; // storage is switched off
    }
  };
  const theme = () => (chosen() === "auto" ? (system.matches ? "dark" : "light") : chosen());
  const show = () => {
    document.documentElement.dataset.theme = theme();
    document.cookie = `equipoise_theme=${theme()};path=/;SameSite=Strict;max-age=31536000`;
    for (const button of document.querySelectorAll("[data-theme-button]")) {
      button.textContent = `Theme: ${chosen()}`;
    }
    listen();
    if (window.emitEvent && window.socket) emitEvent("eqp_theme", theme());
  };
  let listening = false;
  const listen = () => {
    if (listening || !window.socket) return;
    listening = true;
    const tell = (text, off) => {
      for (const mark of document.querySelectorAll(".live")) {
        mark.textContent = text;
        mark.classList.toggle("off", off);
      }
    };
    window.socket.on("disconnect", () => tell("offline", true));
    window.socket.on("connect", () => tell("live", false));
  };
  const cycle = () => {
    try {
      localStorage.setItem(KEY, ORDER[(ORDER.indexOf(chosen()) + 1) % ORDER.length]);
    } catch {
      return;
    }
    show();
  };
  system.addEventListener("change", show);
  show();

  const number = (x) => {
    if (x === null || x === undefined || Number.isNaN(Number(x))) return "–";
    const size = Math.abs(x);
    if (size !== 0 && (size < 0.001 || size >= 1e6)) return Number(x).toExponential(2);
    return String(Number(Number(x).toPrecision(4)));
  };
  const share = (x) => (x === null || x === undefined ? "–" : `${number(100 * x)} %`);
  const load = (log) => (log <= -6 ? "none, or below 1/64 of fair" : `${number(2 ** log)} × fair`);
  // The name of a row, from the chart that the pointer is on. It is drawn as text on the canvas, never as HTML.
  const row = (p) => {
    const under = document.querySelector(".echart:hover");
    const chart = under && getElement(Number(under.id.slice(1))).chart;
    return chart ? chart.getOption().yAxis[0].data[p.value[1]] : "";
  };
  const heatTip = (p) => `${row(p)}, expert ${p.value[0]}\n${load(p.value[2])}`;
  const historyTip = (p) => `step ${p.name}, expert ${p.value[1]}\n${load(p.value[2])}`;
  const evenTip = (p) => `${row(p)}, step ${p.name}\n${share(p.value[2])} of its experts in effect`;
  const lift = (log) => `${log <= -6 ? "never, or below 1/64" : number(2 ** log)} × chance`;
  const togetherTip = (p) => `experts ${row(p)} and ${p.name}\n${lift(p.value[2])}`;
  const servedTip = (p) => `${row(p)}, expert ${p.value[0]}\n${lift(p.value[2])}`;
  const againstTip = (p) => `experts ${row(p)} and ${p.name}\n${number(2 ** p.value[2])} × as in the first`;
  // Cells of a map, packed by charts.py as little-endian int16 in base64. Raw: Vue need not watch thousands of arrays.
  const cells = (packed, columns, scale) => {
    const text = atob(packed);
    const found = [];
    for (let i = 0; 2 * i < text.length; i++) {
      const value = ((text.charCodeAt(2 * i) | (text.charCodeAt(2 * i + 1) << 8)) << 16) >> 16;
      if (value !== -32768) found.push([i % columns, Math.floor(i / columns), value / scale]);
    }
    return Vue.markRaw(found);
  };

  const slide = (id, value, text) => {
    const slider = document.getElementById(id);
    if (!slider) return;
    slider.value = value;
    slider.setAttribute("aria-valuetext", text);
  };
  const copyLink = async (button) => {
    let copied = true;
    try {
      await navigator.clipboard.writeText(location.href);
    } catch {
      copied = false; // no clipboard outside of localhost and https
      prompt("The link to this incident:", location.href);
    }
    if (!copied) return;
    const before = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = before), 1500);
  };
  return { cells, copyLink, cycle, show, number, share, heatTip, historyTip, evenTip, togetherTip, againstTip, servedTip, slide };
})();
