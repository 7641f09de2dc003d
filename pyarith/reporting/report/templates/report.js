"use strict";
(function () {
  const root = document.documentElement;
  root.classList.add("js");
  const all = (selector, from) => Array.from((from || document).querySelectorAll(selector));

  // Figures name colours of the page's palette: "@c1" is the variable --c1, "@c1/0.2" the same with an opacity.
  const variable = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
  const scales = {
    diverging: ["low", "low-1", "zero", "high-1", "high"],
    sequential: ["zero", "high-1", "high"],
  };
  function colour(name) {
    if (scales[name]) return scales[name].map((one, i, list) => [i / (list.length - 1), variable(one)]);
    const [key, opacity] = name.split("/");
    const value = variable(key);
    if (!opacity) return value;
    const parts = [1, 3, 5].map((i) => parseInt(value.slice(i, i + 2), 16));
    return "rgba(" + parts.join(",") + "," + opacity + ")";
  }
  function coloured(value, key) {
    if (Array.isArray(value)) return value.map((one) => coloured(one, key));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, coloured(one, name)]));
    }
    const isColour = typeof value === "string" && value[0] === "@" && /color(scale)?$/.test(key);
    return isColour ? colour(value.slice(1)) : value;
  }

  function axis(given) {
    const title = Object.assign({ standoff: 8 }, given && given.title);
    const own = { fixedrange: true, automargin: true, gridcolor: variable("line"), zerolinecolor: variable("muted"), linecolor: variable("line") };
    return Object.assign(own, given, { title });
  }
  function draw(figure) {
    const target = figure.querySelector(".plot");
    const spec = coloured(JSON.parse(figure.querySelector("script").textContent), "");
    const given = spec.layout;
    const narrow = target.clientWidth < 520;
    const across = axis(given.xaxis);
    const step = narrow && across.tickvals && across.tickvals.length > 12 ? Math.ceil(across.tickvals.length / 10) : 1;
    for (const name of ["tickvals", "ticktext"]) {
      if (step > 1) across[name] = across[name].filter((_, i) => i % step === 0);
    }
    const names = spec.data.filter((one) => one.name).length;
    const layout = Object.assign(
      {
        autosize: true,
        dragmode: false,
        font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: variable("ink") },
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        hoverlabel: { bgcolor: variable("shade"), bordercolor: variable("muted"), font: { color: variable("ink") }, align: "left" },
        hovermode: "closest",
        legend: { orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom", traceorder: "normal", tracegroupgap: 0 },
      },
      given,
      {
        height: given.height + (narrow && names > 2 ? 20 * names : 0), // the legend gets a line for each name
        margin: Object.assign({ l: 8, r: 8, t: 8, b: 8 }, given.margin),
        xaxis: across,
        yaxis: axis(given.yaxis),
      }
    );
    target.style.height = layout.height + "px";
    Plotly.react(target, spec.data, layout, { displayModeBar: false, responsive: true });
  }
  const shown = (element) => element.offsetParent !== null;
  const drawShown = (from) => all(".chart", from).filter(shown).forEach(draw);

  all(".tabs").forEach((box) => {
    const tabs = all('[role="tab"]', box.querySelector('[role="tablist"]') || document.createElement("p"));
    const panels = tabs.map((tab) => document.getElementById(tab.getAttribute("aria-controls")));
    function choose(index) {
      tabs.forEach((tab, i) => {
        tab.setAttribute("aria-selected", String(i === index));
        tab.tabIndex = i === index ? 0 : -1;
        panels[i].hidden = i !== index;
      });
      drawShown(panels[index]);
    }
    tabs.forEach((tab, i) => {
      tab.addEventListener("click", () => choose(i));
      tab.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!step) return;
        const next = (i + step + tabs.length) % tabs.length;
        choose(next);
        tabs[next].focus();
      });
    });
    if (tabs.length) choose(0);
  });
  drawShown();

  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawShown());

  // Paper shows every panel and every table; afterwards all is as it was.
  let opened = [];
  window.addEventListener("beforeprint", () => {
    if (root.classList.contains("printing")) return;
    root.classList.add("printing");
    opened = all("details:not([open]):not(.long)");
    opened.forEach((one) => (one.open = true));
    drawShown();
  });
  window.addEventListener("afterprint", () => {
    root.classList.remove("printing");
    opened.forEach((one) => (one.open = false));
    drawShown();
  });
})();
