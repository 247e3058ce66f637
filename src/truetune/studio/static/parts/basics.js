// Small things that every page uses.
import { html, useEffect, useRef, useState } from "../html.js";
import { get } from "../api.js";
import { t, whole } from "../text.js";

// Ask the server for something, again whenever `deps` change: {value, error, isWaiting, reload}. What was there stays
// until the new answer is.
export function useAsked(path, query, deps) {
  const [told, setTold] = useState({ value: null, error: null, isWaiting: true });
  const [count, setCount] = useState(0);
  useEffect(() => {
    if (!path) { setTold({ value: null, error: null, isWaiting: false }); return undefined; }
    const stop = new AbortController();
    setTold((old) => ({ ...old, isWaiting: true }));
    get(path, query, stop.signal).then(
      (value) => setTold({ value, error: null, isWaiting: false }),
      (error) => { if (error.name !== "AbortError") setTold({ value: null, error, isWaiting: false }); },
    );
    return () => stop.abort();
  }, [path, count, ...deps]);
  return { ...told, reload: () => setCount((old) => old + 1) };
}

// Call `work` every `every_ms` while `isOn`; the next call waits for the last one.
export function usePolling(work, every_ms, isOn) {
  const latest = useRef(work);
  latest.current = work;
  useEffect(() => {
    if (!isOn) return undefined;
    let timer, isOver = false;
    const turn = async () => {
      await latest.current();
      if (!isOver) timer = setTimeout(turn, every_ms);
    };
    timer = setTimeout(turn, every_ms);
    return () => { isOver = true; clearTimeout(timer); };
  }, [every_ms, isOn]);
}

export const Fault = ({ error }) => error && html`<p class="fault" role="alert">${error.message}</p>`;

export const Badge = ({ state }) => html`<span class=${`badge ${state}`}>${t(`state_${state}`)}</span>`;

export function Tiles({ tiles }) {
  return html`<dl class="tiles">${tiles.map(([label, value, kind]) => html`
    <div key=${label} class=${kind ?? ""}><dt>${label}</dt><dd>${value}</dd></div>`)}</dl>`;
}

// Tabs of a page: links or buttons with one of them chosen.
export function Choice({ label, options, value, onChange }) {
  return html`<div class="choice" role="group" aria-label=${label}>${options.map(([name, text]) => html`
    <button key=${name} type="button" aria-pressed=${value === name} onClick=${() => onChange(name)}>${text}</button>`)}</div>`;
}

// What is typed stays while the page is drawn anew, until `value` itself changes.
export function NumberInput({ value, ...rest }) {
  const [typed, setTyped] = useState(value);
  useEffect(() => setTyped(value), [value]);
  return html`<input type="number" ...${rest} value=${typed} onInput=${(event) => setTyped(event.target.value)} />`;
}

export function Pager({ start, count, total, onStart }) {
  if (total <= count) return null;
  const last = Math.floor((total - 1) / count) * count;
  const go = (to) => onStart(Math.max(0, Math.min(to, last)));
  return html`<nav class="pager" aria-label=${t("pager")}>
    <button type="button" disabled=${start <= 0} aria-label=${t("first")} onClick=${() => go(0)}>«</button>
    <button type="button" disabled=${start <= 0} onClick=${() => go(start - count)}>${t("previous")}</button>
    <label>${t("row")} <${NumberInput} min="1" max=${total} value=${start + 1}
      onChange=${(event) => go(Math.floor((Number(event.target.value) - 1) / count) * count)} /></label>
    <span class="soft">${t("of", { total: whole(total) })}</span>
    <button type="button" disabled=${start >= last} onClick=${() => go(start + count)}>${t("next")}</button>
    <button type="button" disabled=${start >= last} aria-label=${t("last")} onClick=${() => go(last)}>»</button>
  </nav>`;
}

export const Command = ({ shown }) => shown && html`
  <div class="command"><span class="soft">${t("command")}</span><code>${shown}</code>
    <button type="button" class="quiet" onClick=${() => navigator.clipboard?.writeText(shown)}>${t("copy")}</button></div>`;
