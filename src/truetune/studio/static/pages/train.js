// Train: a form made from the configuration's own fields; what stands at its default is not put into the command.
import { html, useEffect, useMemo, useState } from "../html.js";
import { get } from "../api.js";
import { bytes, duration, lang, number, t } from "../text.js";
import { Command, Fault, Tiles, useAsked } from "../parts/basics.js";
import { FileChoice } from "../parts/files.js";
import { Job, startJob, useJob } from "../parts/job.js";
import { ModelChoice } from "../parts/model.js";

const FIRST = ["system", "num_train_epochs", "learning_rate", "batch_size", "max_length", "lora_r", "lora_alpha", "output_dir"];
const ELSEWHERE = ["model", "data", "lang"];
const RUN_POLL_MS = 500;

export function TrainPage({ query, state }) {
  const { value: fields, error } = useAsked("fields", { lang: lang() }, [lang()]);
  const [data, setData] = useState(query.getAll("data"));
  const [values, setValues] = useState(() => Object.fromEntries([...query].filter(([name]) => name !== "data")));
  const [measureId, setMeasureId] = useState(null);
  const [trainId, setTrainId] = useState(null);
  const [fault, setFault] = useState(null);
  const measure = useJob(measureId);
  const train = useJob(trainId);
  useEffect(() => { if (!values.model && state.models[0]) set("model", state.models[0]); }, []);
  const set = (name, value) => setValues((old) => ({ ...old, [name]: value }));
  const words = useMemo(() => wordsOf(data, values, fields ?? []), [data, values, fields]);
  useWayToRun(train.job);
  const begin = async (command, extra, setId) => {
    setFault(null);
    try { setId((await startJob(command, [...words, ...extra])).id); } catch (error) { setFault(error); }
  };
  const choosePreset = (name) => {
    const preset = state.presets.find((one) => one.name === name);
    if (preset) setValues((old) => ({ model: old.model, ...asTexts(preset.values) }));
  };
  const isReady = data.length > 0 && Boolean(values.model);
  const first = FIRST.map((name) => fields?.find((field) => field.name === name)).filter(Boolean);
  const others = (fields ?? []).filter((field) => ![...FIRST, ...ELSEWHERE].includes(field.name));
  return html`<h1>${t("train_title")}</h1><p class="lead">${t("train_lead")}</p>
    <${Fault} error=${error} />
    <form class="card" onSubmit=${(event) => { event.preventDefault(); begin("train", [], setTrainId); }}>
      <${FileChoice} value=${data} onChange=${setData} />
      <div class="fields">
        <${ModelChoice} value=${values.model ?? ""} models=${state.models} onChange=${(model) => set("model", model || null)} />
        ${state.presets.length > 0 && html`<label>${t("preset")}<select onChange=${(event) => choosePreset(event.target.value)}>
          <option value="">${t("preset_none")}</option>${state.presets.map((preset) => html`<option key=${preset.name} value=${preset.name}>${preset.name}</option>`)}</select></label>`}
        ${first.map((field) => html`<${Field} key=${field.name} field=${field} value=${values[field.name]} onChange=${(value) => set(field.name, value)} />`)}
      </div>
      <details><summary>${t("all_settings", { count: others.length })}</summary><div class="fields">
        ${others.map((field) => html`<${Field} key=${field.name} field=${field} value=${values[field.name]} onChange=${(value) => set(field.name, value)} />`)}
      </div></details>
      <${Command} shown=${`truetune train ${words.map(quoted).join(" ")}`} />
      <div class="buttons">
        <button class="main" disabled=${!isReady || train.isRunning}>${train.isRunning ? t("starting") : t("start")}</button>
        <button type="button" disabled=${!isReady || measure.isRunning} onClick=${() => begin("check", ["--measure"], setMeasureId)}>${measure.isRunning ? t("measuring") : t("measure")}</button>
      </div>
      <${Fault} error=${fault} />
    </form>
    ${measureId && html`<${Measured} measured=${measure.job?.result?.measured} /><${Job} id=${measureId} ...${measure} />`}
    ${trainId && html`<${Job} id=${trainId} ...${train} isOpen />`}`;
}

function Measured({ measured }) {
  if (!measured) return null;
  return html`<${Tiles} tiles=${[
    [t("time"), duration(measured.seconds)],
    [t("per_step"), t("time_s", { s: number(measured.seconds_per_step, 3) })],
    [t("memory"), bytes(measured.peak_bytes)],
  ]} />`;
}

// The run's page is opened as soon as the started command has made its folder.
function useWayToRun(job) {
  useEffect(() => {
    if (!job?.run && job?.state !== "running") return undefined;
    let isOver = false;
    const look = async () => {
      const isThere = (await get("runs").catch(() => [])).some((run) => run.name === job.run);
      if (isThere && !isOver) location.hash = `#/run/${encodeURIComponent(job.run)}`;
      if (isThere) return;
      if (!isOver && job.state === "running") setTimeout(look, RUN_POLL_MS);
    };
    look();
    return () => { isOver = true; };
  }, [job?.run, job?.state]);
}

function Field({ field, value, onChange }) {
  const { name, kind, choices, help } = field;
  const shown = value ?? "";
  const described = { "aria-describedby": `help-${name}` };
  const placeholder = defaultText(field.default);
  const change = (event) => onChange(event.target.value === "" ? null : event.target.value);
  const input = kind === "choice" || kind === "bool"
    ? html`<select ...${described} value=${shown} onChange=${change}><option value="">${t("default_is", { value: placeholder })}</option>
        ${(kind === "bool" ? ["true", "false"] : choices).map((choice) => html`<option key=${choice} value=${choice}>${choice}</option>`)}</select>`
    : html`<input ...${described} inputmode=${kind === "number" ? "decimal" : "text"} value=${shown} placeholder=${placeholder} onInput=${change} />`;
  return html`<div class="field"><label>${name}${input}</label><small id=${`help-${name}`}>${help}</small></div>`;
}

const defaultText = (value) => {
  if (value == null || value === "") return "–";
  if (Array.isArray(value)) return value.length ? value.join(", ") : "–";
  return typeof value === "object" ? (Object.keys(value).length ? JSON.stringify(value) : "–") : JSON.stringify(value).replace(/^"|"$/g, "");
};

// As the command line takes them: lists with commas, prompts (which hold commas) and mappings as JSON.
const asText = (name, value) => {
  if (value === null || typeof value !== "object") return value === null ? null : String(value);
  return Array.isArray(value) && name !== "sample_prompts" ? value.join(",") : JSON.stringify(value);
};

const asTexts = (values) => Object.fromEntries(Object.entries(values)
  .filter(([name]) => !ELSEWHERE.includes(name)).map(([name, value]) => [name, asText(name, value)]));

// null: not given; an empty text of a recipe (input_join) is.
function wordsOf(data, values, fields) {
  const known = new Set(fields.map((field) => field.name).filter((name) => name !== "data"));
  const given = Object.entries(values).filter(([name, value]) => known.has(name) && value != null);
  return [...data, ...given.flatMap(([name, value]) => [`--${name.replaceAll("_", "-")}`, String(value)])];
}

export const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);
