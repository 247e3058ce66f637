// Loss and held-out loss, other runs over them, the smaller curves below, and the steps that stand out.
import { html, useEffect, useMemo, useState } from "../html.js";
import { bytes, number, t, whole } from "../text.js";
import { Fault, NumberInput, useAsked } from "./basics.js";
import { Chart } from "./chart.js";
import { askLoss } from "./series.js";
import { moved, within, zoomed } from "./zoom.js";

const NUM_SPIKES = 4;

// `children` (the rows of a step) stand right below the curve that was clicked.
export function Curves({ name, series, range, onZoom, step, onPick, children }) {
  const [others, setOthers] = useState([]);
  const { value: runs } = useAsked("runs", {}, []);
  const { lines, error } = useOverlay(others, range);
  const all = useMemo(() => [
    { label: t("loss"), x: series.step, y: series.loss, colour: "--deep" },
    { label: t("held_out_loss"), x: series.eval.map(([at]) => at), y: series.eval.map(([, loss]) => loss), isPoints: true, colour: "--mark" },
    ...lines,
  ], [series, lines]);
  const bounds = useMemo(() => [1, Math.max(series.total, series.step.at(-1) ?? 1)], [series]);
  const spikes = useMemo(() => findSpikes(series, range ?? bounds), [series, range, bounds]);
  const go = (to) => onZoom(within(to, bounds));
  const rest = (runs ?? []).filter((run) => run.name !== name && !others.includes(run.name));
  return html`<section>
    <${Chart} lines=${all} label=${t("curve_label")} height=${320} range=${range} bounds=${bounds} onZoom=${onZoom} onPick=${(at) => at >= 1 && onPick(at)} />
    <div class="curve-bar">
      <form class="inline" onSubmit=${(event) => { event.preventDefault(); onPick(Number(new FormData(event.target).get("step"))); }}>
        <label>${t("rows_of")} <${NumberInput} name="step" min="1" max=${series.step.at(-1)} required value=${step ?? ""} /></label><button>${t("show")}</button></form>
      ${spikes.length > 0 && html`<span class="spikes">${t("spikes")} ${spikes.map(([at, loss]) => html`<button key=${at} type="button" class="chip" aria-pressed=${step === at} onClick=${() => onPick(at)}>${whole(at)} <span class="soft">${number(loss, 3)}</span></button>`)}</span>`}
      <span class="choice" role="group" aria-label=${t("zoom")}>
        ${range && html`<button type="button" aria-label=${t("zoom_earlier")} title=${t("zoom_earlier")} onClick=${() => go(moved(range, -0.5))}>‹</button>`}
        <button type="button" aria-label=${t("zoom_in")} title=${t("zoom_in")} onClick=${() => go(zoomed(range ?? bounds, 0.5))}>+</button>
        ${range && html`<button type="button" aria-label=${t("zoom_less")} title=${t("zoom_less")} onClick=${() => go(zoomed(range, 2))}>−</button>
        <button type="button" aria-label=${t("zoom_later")} title=${t("zoom_later")} onClick=${() => go(moved(range, 0.5))}>›</button>
        <button type="button" onClick=${() => onZoom(null)}>${t("zoom_out")}</button>`}</span>
      ${rest.length > 0 && html`<label>${t("overlay")} <select value="" onChange=${(event) => setOthers([...others, event.target.value])}>
        <option value="">${t("choose_run")}</option>${rest.map((run) => html`<option key=${run.name} value=${run.name}>${run.name}</option>`)}</select></label>`}
      ${others.map((other) => html`<span key=${other} class="chip">${other}<button type="button" class="quiet" aria-label=${t("remove", { name: other })} onClick=${() => setOthers(others.filter((one) => one !== other))}>×</button></span>`)}
    </div>
    <p class="soft">${t("curve_hint")}</p><${Fault} error=${error} />
    ${children}
    <${Small} series=${series.rest} range=${range} bounds=${bounds} onPick=${onPick} />
  </section>`;
}

// Steps whose loss is the highest of its near neighbours and stands out most above the middle of the wider ones.
function findSpikes({ step, loss }, [first, last]) {
  const found = [];
  const around = (at, width) => loss.slice(Math.max(0, at - width), at + width + 1).filter((value) => value != null);
  for (let at = 1; at < step.length; at += 1) {
    if (step[at] < first || step[at] > last || loss[at] == null || loss[at] < Math.max(...around(at, 2))) continue;
    const wide = around(at, 7).sort((a, b) => a - b);
    found.push([step[at], loss[at], loss[at] - wide[Math.floor(wide.length / 2)]]);
  }
  return found.filter(([, , height]) => height > 0).sort((a, b) => b[2] - a[2]).slice(0, NUM_SPIKES).sort((a, b) => a[0] - b[0]);
}

function useOverlay(others, range) {
  const [lines, setLines] = useState([]);
  const [error, setError] = useState(null);
  useEffect(() => {
    let isOver = false;
    Promise.all(others.map((other) => askLoss(other, range))).then(
      (all) => !isOver && setLines(all.map((found, at) => ({ label: others[at], x: found.step, y: found.loss, colour: ["--blue", "--violet", "--rose", "--teal"][at % 4] }))),
      (fault) => !isOver && setError(fault),
    );
    return () => { isOver = true; };
  }, [others, range?.[0], range?.[1]]);
  return { lines, error };
}

function Small({ series, range, bounds, onPick }) {
  const curves = useMemo(() => {
    return [
      [t("rewards"), [[t("reward_chosen"), series.rewards_chosen], [t("reward_rejected"), series.rewards_rejected]]],
      [t("reward_accuracy"), [[t("reward_accuracy"), series.reward_accuracy]]],
      [t("learning_rate"), [[t("learning_rate"), series.learning_rate]]],
      [t("grad_norm"), [[t("grad_norm"), series.grad_norm]]],
      [t("rows_s"), [[t("rows_s"), series.rows_per_s]]],
      [t("tokens_s"), [[t("tokens_s"), series.tokens_per_s]]],
      [t("memory"), [[t("memory"), series.memory_bytes]], bytes],
      [t("use_percent"), [["CPU", series.cpu_percent], ["GPU", series.gpu_percent]]],
    ].map(([title, lines, format]) => ({
      title, format, lines: lines.filter(([, y]) => y?.some((value) => value != null)).map(([label, y]) => ({ label, x: series.step, y })),
    })).filter(({ lines }) => lines.length);
  }, [series]);
  return html`<div class="small-charts">${curves.map(({ title, lines, format }) => html`<figure key=${title}><figcaption>${title}</figcaption>
    <${Chart} lines=${lines} label=${title} height=${150} format=${format} range=${range} bounds=${bounds} hasLegend=${lines.length > 1} onPick=${onPick} /></figure>`)}</div>`;
}
