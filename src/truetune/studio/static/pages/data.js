// Data: choose files and a model, check them, and see each row as it will be trained. #/data/JOB keeps the last check.
import { html, useEffect, useState } from "../html.js";
import { get } from "../api.js";
import { nearPath, number, t, whole } from "../text.js";
import { Choice, Fault, Pager, Tiles, useAsked } from "../parts/basics.js";
import { FileChoice } from "../parts/files.js";
import { Job, startJob, useJob } from "../parts/job.js";
import { ModelChoice } from "../parts/model.js";
import { Lengths } from "../parts/lengths.js";
import { Rows } from "../parts/rows.js";

const PER_PAGE = 10;
const KEPT = "truetune.data";

export function DataPage({ rest, state }) {
  const [ask, setAsk] = useState(() => ({ data: [], model: state.models[0] ?? "", system: "", max_length: "2048", ...JSON.parse(localStorage.getItem(KEPT) ?? "{}") }));
  const [error, setError] = useState(null);
  const id = rest[0];
  const { job, error: lost, isRunning } = useJob(id);
  const set = (change) => setAsk((old) => { const made = { ...old, ...change }; localStorage.setItem(KEPT, JSON.stringify(made)); return made; });
  const check = async (event) => {
    event.preventDefault();
    setError(null);
    try {
      location.hash = `#/data/${(await startJob("check", wordsOf(ask))).id}`;
    } catch (fault) { setError(fault); }
  };
  return html`<h1>${t("data_title")}</h1>
    <p class="lead">${t("data_lead")}</p>
    <form class="card" onSubmit=${check}>
      <${FileChoice} value=${ask.data} onChange=${(data) => set({ data })} />
      <div class="fields">
        <${ModelChoice} value=${ask.model} models=${state.models} onChange=${(model) => set({ model })} />
        <label>${t("system")}<input value=${ask.system} placeholder=${t("system_none")} onInput=${(event) => set({ system: event.target.value })} /></label>
        <label>${t("max_length")}<input type="number" min="1" value=${ask.max_length} onInput=${(event) => set({ max_length: event.target.value })} /></label>
      </div>
      <div class="buttons">
        <button class="main" disabled=${!ask.data.length || !ask.model || isRunning}>${isRunning ? t("checking") : t("check")}</button>
        <a class="button" href=${`#/train?${trainQuery(ask)}`}>${t("go_train")}</a>
      </div>
      <${Fault} error=${error} />
    </form>
    ${id && html`<${Job} id=${id} job=${job} error=${lost} />`}
    ${job?.result && !isRunning && html`<${Checked} key=${id} result=${job.result} store=${job.store ?? job.result.store} limit=${Number(ask.max_length)} />`}`;
}

const wordsOf = (ask) => [
  ...ask.data, "--model", ask.model,
  ...(ask.system ? ["--system", ask.system] : []),
  ...(ask.max_length ? ["--max-length", String(ask.max_length)] : []),
];

function trainQuery(ask) {
  const query = new URLSearchParams();
  for (const path of ask.data) query.append("data", path);
  for (const name of ["model", "system", "max_length"]) if (ask[name]) query.set(name, ask[name]);
  return query;
}

function Checked({ result, store, limit }) {
  const numRefused = result.rows_refused;
  const shapes = Object.entries(result.formats ?? {}).map(([name, count]) => `${name} (${whole(count)})`).join(", ");
  const tiles = [
    [t("rows_used"), whole(result.rows_used)],
    [t("rows_held_out"), whole(result.rows_held_out)],
    [t("rows_refused"), whole(numRefused), numRefused ? "bad" : ""],
    [t("duplicates"), whole(result.exact_duplicates)],
    [t("learned_tokens"), whole(result.learned_tokens)],
    [t("share_learned"), `${number((100 * result.learned_tokens) / Math.max(result.total_tokens, 1), 3)} %`],
    [t("longest"), whole(result.longest)],
    [t("steps"), whole(result.steps)],
  ];
  return html`<section>
    <h2>${t("checked_title")}</h2>
    ${shapes && html`<p class="soft">${t("shape", { shapes })}</p>`}
    <${Tiles} tiles=${tiles} />
    ${[...(result.diagnosis ?? []), ...(result.notes ?? [])].length > 0 && html`<ul class="remarks">
      ${[...(result.diagnosis ?? []), ...(result.notes ?? [])].map((remark) => html`<li key=${remark}>${remark}</li>`)}</ul>`}
    ${store && html`<${Lengths} store=${store} limit=${limit} />
      <${StoredRows} store=${store} />`}
  </section>`;
}

const SIDES = ["train", "eval", "repeated", "refused"];
const LISTS = { repeated: "duplicates", refused: "refused" };
const total = (store, side) => get(LISTS[side] ?? "rows", { store, side, count: 0 }).then((told) => told.total, () => 0);

// The rows of a store (of a check or of a run), page by page.
export function StoredRows({ store }) {
  const [totals, setTotals] = useState(null);
  const [chosen, setSide] = useState(null);
  useEffect(() => { Promise.all(SIDES.map((side) => total(store, side))).then(setTotals); }, [store]);
  const side = chosen ?? SIDES[Math.max(0, (totals ?? []).findIndex((count) => count > 0))];
  const [start, setStart] = useState(0);
  const [typed, setTyped] = useState("");
  const [search, setSearch] = useState("");
  useEffect(() => {
    const timer = setTimeout(() => { setSearch(typed); setStart(0); }, 250);
    return () => clearTimeout(timer);
  }, [typed]);
  const hasSearch = !LISTS[side];
  const query = { store, start, count: PER_PAGE, ...(hasSearch ? { side, search } : {}) };
  const { value, error, isWaiting } = useAsked(totals && (LISTS[side] ?? "rows"), query, [store, side, start, search]);
  const options = SIDES.map((name, at) => [name, t(`side_${name}`, { count: whole(totals?.[at]) })]);
  const choose = (wanted) => { setSide(wanted); setStart(0); };
  const pager = html`<${Pager} start=${start} count=${PER_PAGE} total=${value?.total ?? 0} onStart=${setStart} />`;
  return html`<h2>${t("rows")}</h2>
    <div class="rows-bar">
      <${Choice} label=${t("side")} options=${options} value=${side} onChange=${choose} />
      ${hasSearch && html`<input type="search" aria-label=${t("search")} placeholder=${t("search")} value=${typed} onInput=${(event) => setTyped(event.target.value)} />`}
    </div>
    <${Fault} error=${error} />
    <div class=${isWaiting ? "waiting" : ""} aria-busy=${isWaiting}>
      ${value && (value.rows?.[0]?.reason
        ? html`<${Refused} rows=${value.rows} />`
        : html`<${Rows} rows=${(value.rows ?? []).filter((row) => row.pairs)} />`)}
      ${value && !(value.rows ?? []).length && html`<p class="soft">${t("no_rows")}</p>`}
    </div>${pager}`;
}

const Refused = ({ rows }) => rows.length > 0 && html`<table class="refused"><thead><tr><th scope="col">${t("place")}</th><th scope="col">${t("reason")}</th></tr></thead>
  <tbody>${rows.map((row, at) => html`<tr key=${at}><td class="where">${nearPath(row.where)}</td><td>${row.reason}<br /><span class="soft">${row.fix}</span></td></tr>`)}</tbody></table>`;
