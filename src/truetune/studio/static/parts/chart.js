// Lines over steps. Drag to zoom, double click to see all again, click for the rows of a step; wheels as zoom.js says.
import uPlot from "../vendor/uplot.js";
import { html, useEffect, useRef, useState } from "../html.js";
import { number, t } from "../text.js";
import { Hand } from "./zoom.js";

const COLOURS = ["--deep", "--mark", "--blue", "--violet", "--rose", "--teal"];
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// lines: [{label, x: [step], y: [value], isPoints, colour}] → uPlot's columns over the union of all steps.
const columns = (lines) => (lines.length ? uPlot.join(lines.map((line) => [line.x, line.y])) : [[]]);

function axis(format) {
  const font = `12px ${style("--font")}`;
  return {
    font, stroke: style("--soft"), size: format ? 58 : 34, grid: { stroke: style("--line"), width: 1 }, ticks: { show: false },
    ...(format ? { values: (_, values) => values.map(format) } : {}),
  };
}

function seriesOf(line, at) {
  const colour = style(line.colour ?? COLOURS[at % COLOURS.length]);
  return {
    label: line.label, stroke: colour, width: line.isPoints ? 1.5 : 1.25, spanGaps: true,
    value: (_, value) => number(value),
    points: line.isPoints ? { show: true, size: 7, fill: style("--page"), stroke: colour, width: 2 } : { show: line.x.length < 2 },
  };
}

const show = (u, range) => range && u?.setScale("x", { min: range[0], max: range[1] });

// `range`: the steps in view, null for all that `bounds` has.
export function Chart({ lines, label, height = 300, format = (value) => number(value, 3), range, bounds, onPick, onZoom, hasLegend = true }) {
  const place = useRef(null);
  const plot = useRef(null);
  const hand = useRef(null);
  const tell = useRef({});
  tell.current = { onPick, onZoom, range, bounds };
  const shape = lines.map((line) => line.label).join("|");
  useEffect(() => {
    const element = place.current;
    const options = {
      width: Math.max(element.clientWidth, 200), height, legend: { show: hasLegend, live: true },
      scales: { x: { time: false } }, axes: [axis(), axis(format)], 
      cursor: {
        focus: { prox: 24 }, drag: { x: Boolean(onZoom), y: false },
        bind: { mousedown: (u, _, began) => (event) => (event.shiftKey && hand.current && tell.current.range ? hand.current.drag(event) : began(event)) },
      },
      series: [{ label: t("step"), value: (_, value) => value ?? "–" }, ...lines.map(seriesOf)],
      hooks: {
        setSelect: [(u) => {
          if (u.select.width < 4) return;
          tell.current.onZoom?.([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]);
        }],
        ready: [(u) => {
          u.over.addEventListener("dblclick", () => tell.current.onZoom?.(null));
          let down = 0;
          u.over.addEventListener("mousedown", (event) => { down = event.clientX; });
          u.over.addEventListener("click", (event) => {
            if (Math.abs(event.clientX - down) < 4 && u.cursor.idx != null) tell.current.onPick?.(u.data[0][u.cursor.idx]);
          });
        }],
      },
    };
    const made = new uPlot(options, columns(lines), element);
    plot.current = made;
    show(made, tell.current.range);
    hand.current = onZoom ? new Hand(made, {
      bounds: () => tell.current.bounds, view: () => tell.current.range,
      onMove: (to) => show(made, to ?? tell.current.bounds), onRest: (to) => tell.current.onZoom(to),
    }) : null;
    const watch = new ResizeObserver(() => made.setSize({ width: element.clientWidth, height }));
    watch.observe(element);
    return () => { watch.disconnect(); hand.current?.end(); made.destroy(); plot.current = null; };
  }, [shape, useScheme()]);
  // In the middle of a movement, new lines are drawn where the hand is.
  const inView = () => (hand.current?.isBusy ? hand.current.now : range);
  useEffect(() => {
    const to = inView();
    plot.current?.batch(() => { plot.current.setData(columns(lines), !to); show(plot.current, to); });
  }, [lines]);
  useEffect(() => { show(plot.current, inView()); }, [range]);
  return html`<div class=${`chart${onPick ? " pick" : ""}`} role="img" aria-label=${label} ref=${place}></div>`;
}

// Drawn anew when the person switches between light and dark.
function useScheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const [is, set] = useState(dark.matches);
  useEffect(() => {
    const changed = () => set(dark.matches);
    dark.addEventListener("change", changed);
    return () => dark.removeEventListener("change", changed);
  }, []);
  return is;
}
