// Runs, and one of them while it goes on or afterwards: curves, the rows behind a step, samples, report, what to do with it.
import { html, useEffect, useRef, useState } from "../html.js";
import { get, post } from "../api.js";
import { anyText, baseName, bytes, duration, nearPath, number, t, whole } from "../text.js";
import { Badge, Choice, Fault, Tiles, useAsked, usePolling } from "../parts/basics.js";
import { Curves } from "../parts/curves.js";
import { Job, startJob, useJob } from "../parts/job.js";
import { Samples } from "../parts/samples.js";
import { useSeries } from "../parts/series.js";
import { Rows } from "../parts/rows.js";
import { StoredRows } from "./data.js";
import { ReportPart, UsePart } from "./report.js";

const LIST_MS = 3000;
const RECENT = 20;
const path = (name) => `runs/${encodeURIComponent(name)}`;

export function RunsPage() {
  const { value: runs, error, reload } = useAsked("runs", {}, []);
  usePolling(reload, LIST_MS, true);
  return html`<h1>${t("runs_title")}</h1><${Fault} error=${error} />
    ${runs && !runs.length && html`<p class="lead">${t("runs_none")}</p><p><a class="button" href="#/data">${t("tab_data")}</a></p>`}
    ${runs?.length > 0 && html`<div class="scroll" tabindex="0" role="region" aria-label=${t("runs_title")}><table class="runs"><thead><tr>
      ${["run", "state", "data", "model", "steps", "loss", "held_out"].map((name) => html`<th key=${name} scope="col">${t(`column_${name}`)}</th>`)}</tr></thead>
      <tbody>${runs.map((run) => html`<tr key=${run.name}>
        <th scope="row"><a href=${`#/run/${encodeURIComponent(run.name)}`}>${run.name}</a></th><td><${Badge} state=${run.state} /></td>
        <td>${[run.data].flat().map(baseName).join(", ")}</td><td>${baseName(run.model)}</td>
        <td>${whole(run.steps)} / ${whole(run.total_steps)}</td><td>${number(run.loss, 3)}</td>
        <td>${[run.eval_loss_before, run.eval_loss_after].filter((loss) => loss != null).map((loss) => number(loss, 3)).join(" → ") || "–"}</td></tr>`)}
      </tbody></table></div>`}`;
}

export function RunPage({ rest }) {
  const [name, part = "curves"] = rest;
  const { value: run, error, reload } = useAsked(path(name), {}, [name]);
  const [range, setRange] = useState(null);
  const [step, setStep] = useState(null);
  const [lastSample, setLastSample] = useState("");
  const isRunning = run?.state === "running";
  const { series, error: lost, reload: redraw } = useSeries(name, {
    range, isLive: Boolean(run) && isRunning, onTold: (event) => {
      if (event.kind === "sample") setLastSample(`${event.step}/${event.number}`);
      if (event.kind === "state" && event.state !== run?.state) reload();
    },
  });
  // Zoomed in, the numbers above the curve are still those of the whole run.
  const latest = useRef(null);
  if (!range && series) latest.current = series;
  const [fault, setFault] = useState(null);
  const [jobId, setJobId] = useState(null);
  const { job } = useJob(jobId);
  useEffect(() => { if (!jobId && run) findJob(run).then((found) => found && setJobId(found.id)); }, [run?.state]);
  // Steps are heard of one by one; the rest (checkpoints, a process that was killed) is asked for.
  // One that has not reached its end may be resumed by another tab, or in a terminal.
  usePolling(reload, LIST_MS, Boolean(run) && (run.state !== "done" || job?.state === "running"));
  const before = useRef(null);
  useEffect(() => { if (before.current && isRunning) redraw(); before.current = run?.state; }, [run?.state]);
  useEffect(() => { if (job && job.state !== "running") { reload(); redraw(); } }, [job?.state]);
  if (error && !run) return html`<${Fault} error=${error} />`;
  if (!run) return html`<p class="soft" aria-busy="true">…</p>`;
  const parts = [["curves", t("part_curves")], ["samples", t("part_samples")], ["rows", t("part_rows")], ["log", t("part_log")], ["report", t("part_report")], ["use", t("part_use")]];
  const resume = () => startJob("train", ["--resume", "--output-dir", nearPath(run.path)]).then((started) => setJobId(started.id), setFault);
  const isBusy = job?.state === "running";
  return html`
    <div class="run-head"><h1>${run.name}</h1><${Badge} state=${run.state} />
      <span class="buttons">
        ${isRunning && html`<button type="button" onClick=${() => post(`${path(name)}/stop`).catch(setFault)}>${t("stop")}</button>`}
        ${!isBusy && !isRunning && run.state !== "done" && html`<button type="button" class="main" onClick=${resume}>${t("resume")}</button>`}
        ${run.result_step != null && html`<a class="button" href=${`#/chat/${encodeURIComponent(name)}`}>${t("tab_chat")}</a>`}
      </span></div>
    <p class="soft">${[run.data].flat().map(baseName).join(", ")} · ${baseName(run.model)}</p>
    ${run.error && html`<p class="fault">${run.error}</p>`}
    <${Progress} run=${run} series=${latest.current} />
    <${Choice} label=${t("parts")} options=${parts} value=${part} onChange=${(wanted) => { location.hash = `#/run/${encodeURIComponent(name)}/${wanted}`; }} />
    <${Fault} error=${fault ?? lost} />
    ${part === "curves" && series && html`<${Curves} name=${name} series=${series} range=${range} onZoom=${setRange} step=${step} onPick=${setStep}>
        ${step != null && html`<${StepRows} name=${name} step=${step} last=${series.step.at(-1)} onStep=${setStep} />`}<//>
      <${Checkpoints} run=${run} />`}
    ${part === "samples" && html`<${Samples} name=${name} latest=${lastSample} />`}
    ${part === "rows" && html`<${StoredRows} store=${run.store} />`}
    ${part === "log" && html`<${Events} events=${run.events ?? []} />${jobId ? html`<${Job} id=${jobId} job=${job} isOpen hasStop=${false} />` : html`<p class="soft">${t("no_log")}</p>`}`}
    ${part === "report" && html`<${ReportPart} run=${run} />`}
    ${part === "use" && html`<${UsePart} run=${run} />`}`;
}

// The train command of the studio that writes, or wrote last, into this run; jobs come newest first.
async function findJob(run) {
  const jobs = await get("jobs");
  const own = jobs.filter((job) => job.command === "train" && (job.run === run.name));
  return own.find((job) => job.state === "running") ?? own[0] ?? null;
}

function Progress({ run, series }) {
  if (!series) return null;
  const last = Math.max(series.step.at(-1) ?? 0, run.steps ?? 0);
  const total = run.total_steps;
  const middle = (key) => {
    const recent = series.rest[key].slice(-RECENT).filter((value) => value != null).sort((a, b) => a - b);
    return recent[Math.floor(recent.length / 2)];
  };
  const perStep = middle("seconds");
  const tiles = [
    [t("step"), `${whole(last)} / ${whole(total)}`],
    [t("loss"), number(series.step.at(-1) >= (run.steps ?? 0) ? series.loss.at(-1) : run.loss)],
    [t("held_out_loss"), number(series.eval.at(-1)?.[1])],
    [t("rows_s"), number(middle("rows_per_s"), 3)],
    [t("tokens_s"), number(middle("tokens_per_s"), 3)],
    [t("memory"), bytes(series.rest.memory_bytes.at(-1))],
    run.state === "running" ? [t("remaining"), duration((total - last) * perStep)] : [t("per_step"), duration(perStep)],
  ];
  return html`<progress max=${total} value=${last} aria-label=${t("progress")}></progress><${Tiles} tiles=${tiles} />`;
}

// What one optimizer step was made of.
function StepRows({ name, step, last, onStep }) {
  const { value, error, isWaiting } = useAsked(`${path(name)}/steps/${step}`, {}, [name, step]);
  const event = value?.event ?? {};
  return html`<section class="step-rows" aria-live="polite"><div class="run-head"><h2 id="step-title">${t("rows_of_step", { step: whole(step) })}</h2>
      <span class="buttons"><button type="button" disabled=${step <= 1} onClick=${() => onStep(step - 1)}>${t("previous")}</button>
      <button type="button" disabled=${step >= last} onClick=${() => onStep(step + 1)}>${t("next")}</button>
      <button type="button" onClick=${() => onStep(null)}>${t("close")}</button></span></div>
    <${Fault} error=${error} />
    ${value && html`<div class=${isWaiting ? "waiting" : ""}><${Tiles} tiles=${[[t("loss"), number(event.loss)], [t("grad_norm"), number(event.grad_norm)], [t("learning_rate"), number(event.learning_rate)],
      [t("rows"), whole(event.rows)], [t("learned_tokens"), whole(event.learned_tokens)], [t("time"), duration(event.seconds)]]} />
      <${Rows} rows=${value.rows} />
      ${value.rows.length < (value.places ?? []).length && html`<ul class="soft places">${value.places.map((place, at) => html`<li key=${at}>${place}</li>`)}</ul>`}</div>`}</section>`;
}

// What happened besides steps: how it began and ended, and what it noticed about itself.
function Events({ events }) {
  const told = events.map((event) => {
    if (event.kind === "state") return [event.time?.replace("T", " "), t(`state_${event.state}`)];
    return event.kind === "finding" ? [t("at_step", { step: whole(event.step) }), anyText(`finding.${event.name}`, event)] : null;
  }).filter(Boolean);
  return told.length > 0 && html`<table class="events"><tbody>${told.map(([when, what], at) => html`<tr key=${at}><td class="soft">${when}</td><td>${what}</td></tr>`)}</tbody></table>`;
}

function Checkpoints({ run }) {
  const all = run.checkpoints ?? [];
  if (!all.length) return null;
  return html`<h2>${t("checkpoints")}</h2><table><thead><tr><th scope="col">${t("step")}</th><th scope="col">${t("held_out_loss")}</th><th scope="col">${t("use")}</th></tr></thead>
    <tbody>${all.map((one) => html`<tr key=${one.step ?? one}><th scope="row">${whole(one.step ?? one)}</th><td>${number(one.eval_loss)}</td>
      <td>${(one.step ?? one) === run.result_step ? t("is_result") : ""}</td></tr>`)}</tbody></table>`;
}
