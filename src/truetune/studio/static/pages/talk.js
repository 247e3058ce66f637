// Compare and chat: one question, the base's and the tuned model's answer side by side, as they come.
import { html, useRef, useState } from "../html.js";
import { pieces, post } from "../api.js";
import { nearPath, t, whole } from "../text.js";
import { Fault, useAsked } from "../parts/basics.js";
import { Bubble, Token } from "../parts/rows.js";

const SIDES = ["base", "tuned"];

export function TalkPage({ rest }) {
  const { value: runs, error } = useAsked("runs", {}, []);
  const ready = (runs ?? []).filter((run) => run.result_step != null || run.has_adapter || run.state === "done");
  const name = rest[0] ?? ready[0]?.name;
  const choose = (event) => { location.hash = `#/chat/${encodeURIComponent(event.target.value)}`; };
  return html`<h1>${t("chat_title")}</h1><p class="lead">${t("chat_lead")}</p><${Fault} error=${error} />
    ${runs && !name && html`<p class="soft">${t("runs_none")}</p>`}
    ${name && runs && html`<label class="run-choice">${t("column_run")}<select value=${name} onChange=${choose}>${[...new Set([name, ...ready.map((run) => run.name)])].map((one) => html`<option key=${one}>${one}</option>`)}</select></label>
      <${Talk} key=${name} run=${name} />`}`;
}

// turns: [{user, base, tuned}]; each side reads its own earlier answers, as a talk with it alone would.
function messagesOf(turns, side, system) {
  const found = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    found.push({ role: "user", content: turn.user });
    if (turn[side]) found.push({ role: "assistant", content: turn[side] });
  }
  return found;
}

function Talk({ run }) {
  const [turns, setTurns] = useState([]);
  const [asked, setAsked] = useState("");
  const [settings, setSettings] = useState({ system: "", temperature: "0", max_tokens: "256" });
  const [isAnswering, setAnswering] = useState(false);
  const [isLoading, setLoading] = useState(false);
  const [error, setError] = useState(null);
  const stop = useRef(null);
  const set = (change) => setSettings((old) => ({ ...old, ...change }));
  const answer = async (all, side) => {
    const body = { run, side, messages: messagesOf(all, side, settings.system), temperature: Number(settings.temperature), max_tokens: Number(settings.max_tokens) };
    let text = "";
    for await (const piece of pieces("talk", body, stop.current.signal)) {
      if (piece.status) setLoading(piece.status === "loading");
      else setLoading(false);
      if (piece.error) throw new Error(piece.error.message ?? piece.error);
      text += piece.choices?.[0]?.delta?.content ?? "";
      const soFar = text;
      setTurns((old) => old.map((turn, at) => (at === all.length - 1 ? { ...turn, [side]: soFar } : turn)));
    }
  };
  const send = async (event) => {
    event?.preventDefault();
    if (!asked.trim() || isAnswering) return;
    const all = [...turns, { user: asked, base: "", tuned: "" }];
    setTurns(all);
    setAsked("");
    setError(null);
    setAnswering(true);
    stop.current = new AbortController();
    try { await Promise.all(SIDES.map((side) => answer(all, side))); } catch (fault) { if (fault.name !== "AbortError") setError(fault); }
    setAnswering(false);
    setLoading(false);
  };
  return html`<details class="card"><summary>${t("chat_settings")}</summary><div class="fields">
      <label class="wide">${t("system")}<input value=${settings.system} placeholder=${t("system_of_run")} onInput=${(event) => set({ system: event.target.value })} /></label>
      <label>${t("temperature")}<input type="number" min="0" max="2" step="0.1" value=${settings.temperature} onInput=${(event) => set({ temperature: event.target.value })} /></label>
      <label>${t("max_tokens")}<input type="number" min="1" value=${settings.max_tokens} onInput=${(event) => set({ max_tokens: event.target.value })} /></label></div></details>
    <div class="turns" aria-live="polite" aria-busy=${isAnswering}>${turns.map((turn, at) => html`<${Turn} key=${at} run=${run} turns=${turns.slice(0, at + 1)} turn=${turn} system=${settings.system} isOpen=${isAnswering && at === turns.length - 1} />`)}</div>
    <${Fault} error=${error} />
    ${isLoading && html`<p class="soft" role="status">${t("loading")}</p>`}
    <form class="ask" onSubmit=${send}>
      <textarea rows="2" aria-label=${t("question")} placeholder=${t("question_hint")} value=${asked} onInput=${(event) => setAsked(event.target.value)}
        onKeyDown=${(event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event); }}></textarea>
      ${isAnswering ? html`<button type="button" onClick=${() => stop.current.abort()}>${t("stop")}</button>` : html`<button class="main" disabled=${!asked.trim()}>${t("ask")}</button>`}
      ${turns.length > 0 && !isAnswering && html`<button type="button" onClick=${() => setTurns([])}>${t("new_talk")}</button>`}
    </form>`;
}

const Thumb = ({ isDown }) => html`<svg class=${`thumb${isDown ? " down" : ""}`} viewBox="0 0 16 16" width="15" height="15" aria-hidden="true"><path d="M1.5 7h2.6v6.5H1.5zM4.1 7.2 7 1.6c1.3 0 1.9.9 1.7 2L8.3 6h4.4c1 0 1.6.8 1.4 1.7l-1 4.6c-.2.7-.7 1.2-1.5 1.2H4.1z" /></svg>`;

function Turn({ run, turns, turn, system, isOpen }) {
  const [ids, setIds] = useState(null);
  const [error, setError] = useState(null);
  const [saving, setSaving] = useState(null);
  const [saved, setSaved] = useState(null);
  const prompt = (side) => messagesOf(turns.map((one, at) => (at === turns.length - 1 ? { user: one.user } : one)), side, system);
  const showIds = async () => {
    if (ids) { setIds(null); return; }
    try { setIds(await post("talk/ids", { run, messages: prompt("tuned") })); setError(null); } catch (fault) { setError(fault); }
  };
  const save = async (event) => {
    event.preventDefault();
    try {
      const told = await post("talk/save", { run, messages: [...prompt("tuned"), { role: "assistant", content: saving }] });
      setSaved(told.path ?? "");
      setSaving(null);
    } catch (fault) { setError(fault); }
  };
  return html`<article class="turn"><${Bubble} role="user" content=${turn.user} />
    <div class="sides">${SIDES.map((side) => html`<div key=${side} class=${side}><b>${t(side)}</b><span class="content">${turn[side]}${isOpen && !turn[side] && html`<span class="soft">…</span>`}</span></div>`)}</div>
    ${!isOpen && html`<div class="buttons small">
      <button type="button" class="quiet" onClick=${() => { setSaved(null); setSaving(turn.tuned); }} aria-label=${t("good")}><${Thumb} />${t("good_short")}</button>
      <button type="button" class="quiet" onClick=${() => { setSaved(null); setSaving(""); }} aria-label=${t("bad")}><${Thumb} isDown />${t("bad_short")}</button>
      <button type="button" class="quiet" aria-expanded=${Boolean(ids)} onClick=${showIds}>${t("prompt_ids")}</button></div>`}
    ${saving !== null && html`<form class="card" onSubmit=${save}><label>${t("answer_to_learn")}<textarea rows="3" required value=${saving} onInput=${(event) => setSaving(event.target.value)}></textarea></label>
      <div class="buttons"><button class="main">${t("save_row")}</button><button type="button" onClick=${() => setSaving(null)}>${t("cancel")}</button></div></form>`}
    ${saved !== null && html`<p class="soft" role="status">${t("saved_row", { path: nearPath(saved) })}</p>`}
    <${Fault} error=${error} />
    ${ids && html`<div class="tokens with-ids">${ids.ids.map((id, at) => html`<${Token} key=${at} text=${ids.texts[at]} id=${id} at=${at} kind="prompt" hasId />`)}</div><p class="soft">${t("tokens_count", { count: whole(ids.ids.length) })}</p>`}
  </article>`;
}
