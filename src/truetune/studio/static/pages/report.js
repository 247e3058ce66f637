// What came of a run: its report card, and merging and exporting it.
import { html, useState } from "../html.js";
import { link } from "../api.js";
import { nearPath, t } from "../text.js";
import { Fault } from "../parts/basics.js";
import { Job, startJob, useJob } from "../parts/job.js";

export function ReportPart({ run }) {
  const address = link(`runs/${encodeURIComponent(run.name)}/report.html`);
  if (!run.has_report_page) return html`<p class="soft">${t("no_report")}</p>`;
  return html`<p><a href=${address} target="_blank" rel="noopener">${t("open_report")}</a></p>
    <iframe class="report" src=${address} sandbox="" title=${t("part_report")}></iframe>`;
}

const QUANTIZE = ["F16", "F32", "BF16", "Q8_0", "Q4_0"];

export function UsePart({ run }) {
  const from = nearPath(run.path);
  if (run.result_step == null) return html`<p class="soft">${t("no_adapter")}</p>`;
  return html`<div class="two">
    <${Making} title=${t("merge_title")} lead=${t("merge_lead")} command="merge" output=${`${from}-merged`}
      wordsOf=${({ output }) => [from, "--output-dir", output]} />
    <${Making} title=${t("gguf_title")} lead=${t("gguf_lead")} command="export" output=${`${from}.gguf`} kinds=${QUANTIZE}
      wordsOf=${({ output, kind }) => [from, "--to", "gguf", "--quantize", kind, "--output", output]} />
    <${Making} title=${t("ollama_title")} lead=${t("ollama_lead")} command="export" output=${`${from}-ollama`} kinds=${QUANTIZE}
      wordsOf=${({ output, kind }) => [from, "--to", "ollama", "--quantize", kind, "--output", output]} />
    <${Making} title=${t("verify_title")} lead=${t("verify_lead")} command="verify" wordsOf=${() => [from]} />
  </div>`;
}

function Making({ title, lead, command, output, kinds, wordsOf }) {
  const [values, setValues] = useState({ output, kind: kinds?.[0] });
  const [id, setId] = useState(null);
  const [error, setError] = useState(null);
  const { job, error: lost, isRunning } = useJob(id);
  const start = async (event) => {
    event.preventDefault();
    setError(null);
    try { setId((await startJob(command, wordsOf(values))).id); } catch (fault) { setError(fault); }
  };
  return html`<form class="card" onSubmit=${start}><h2>${title}</h2><p class="soft">${lead}</p>
    <div class="fields">
      ${output && html`<label class="wide">${t("output_to")}<input required value=${values.output} onInput=${(event) => setValues({ ...values, output: event.target.value })} /></label>`}
      ${kinds && html`<label>${t("quantize")}<select value=${values.kind} onChange=${(event) => setValues({ ...values, kind: event.target.value })}>${kinds.map((kind) => html`<option key=${kind}>${kind}</option>`)}</select></label>`}
    </div>
    <div class="buttons"><button class="main" disabled=${isRunning}>${isRunning ? t("working") : title}</button></div>
    <${Fault} error=${error} />
    ${id && html`<${Job} id=${id} job=${job} error=${lost} isOpen />`}</form>`;
}
