// The mask view: a row as chat bubbles, or as the tokens that are trained, the learned ones coloured.
//
//   ids      151644  872  198 …  151644  77091  198 │ 40  1079  …  151645
//   shown    <|im_start|> user ↵   …  assistant  ↵  │ I   am    …  <|im_end|>
//                                                   └ pair.learned: from here on all is learned
import { html, useState } from "../html.js";
import { nearPath, t, whole } from "../text.js";
import { Choice } from "./basics.js";

// Tokens that are drawn at first; a click draws the rest.
const MOST_TOKENS = 1500;

// [what is shown, the line break after it]: the id of a token that ends a line stands on that line.
function visible(text) {
  const shown = text.replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t");
  return shown.endsWith("\n") ? [shown.slice(0, -1), "\n"] : [shown, ""];
}

export function Token({ text, id, at, kind, hasId }) {
  const [shown, end] = visible(text ?? "");
  return html`<span class=${`token ${kind}`} title=${`${at}: ${id}`}>${shown}${hasId && html`<sub>${id}</sub>`}${end}</span>`;
}

function Tokens({ pair, hasIds }) {
  const [isWhole, setWhole] = useState(false);
  const { ids, texts, learned } = pair;
  const specials = new Set(pair.specials ?? []);
  const from = isWhole ? 0 : Math.max(0, Math.min(learned - MOST_TOKENS / 2, ids.length - MOST_TOKENS));
  const to = isWhole ? ids.length : from + MOST_TOKENS;
  const spans = ids.slice(from, to).map((id, offset) => {
    const at = from + offset;
    const kind = `${at >= learned ? "learned" : "prompt"}${specials.has(at) ? " special" : ""}`;
    return html`<${Token} key=${at} text=${texts[at]} id=${id} at=${at} kind=${kind} hasId=${hasIds} />`;
  });
  return html`<div class=${`tokens${hasIds ? " with-ids" : ""}`}>${spans}</div>
    ${(from > 0 || to < ids.length) && html`<button type="button" class="quiet" onClick=${() => setWhole(true)}>${t("all_tokens", { count: whole(ids.length) })}</button>`}`;
}

export const Bubble = ({ role, content, isLearned, children }) => html`
  <div class=${`bubble ${role}${isLearned ? " learned" : ""}`}>
    <div class="role">${t(`role_${["system", "user", "assistant", "tool"].includes(role) ? role : "other"}`)}${isLearned && html` · <span class="mark">${t("is_learned")}</span>`}</div>
    <div class="content">${content}</div>${children}
  </div>`;

const contentOf = (message) => (typeof message.content === "string" ? message.content : JSON.stringify(message.content ?? message.tool_calls ?? "", null, 1));

// Where a row stands again.
const Again = ({ count, others }) => html`<p class="again"><span class="soft">${t("repeated_in", { count: whole(count) })}</span>
  ${others.map((place) => html` <span key=${place} class="where">${nearPath(place)}</span>`)}${count > others.length && html` <span class="soft">${t("more_places", { count: whole(count - others.length) })}</span>`}</p>`;

export function Row({ row, view, hasIds }) {
  const numTokens = row.pairs.reduce((sum, pair) => sum + pair.ids.length, 0);
  const numLearned = row.pairs.reduce((sum, pair) => sum + pair.ids.length - pair.learned, 0);
  return html`<article class="row">
    <div class="row-head"><span class="where">${nearPath(row.where)}</span>
      <span>${t("row_tokens", { learned: whole(numLearned), total: whole(numTokens) })}</span></div>
    ${row.again && html`<${Again} ...${row.again} />`}
    ${view === "chat"
      ? html`<div class="talk">${row.messages.map((message, at) => html`
          <${Bubble} key=${at} role=${message.role} content=${contentOf(message)} isLearned=${message.learned ?? (at === row.messages.length - 1)} />`)}</div>`
      : row.pairs.map((pair, at) => html`<div key=${at}>
          ${row.pairs.length > 1 && html`<h4>${t(pair.is_rejected ? "pair_rejected" : "pair", { number: at + 1, count: row.pairs.length })}</h4>`}
          <${Tokens} pair=${pair} hasIds=${hasIds} /></div>`)}
  </article>`;
}

// Rows with the choice of how to see them; the choice is kept.
export function Rows({ rows }) {
  const [view, setView] = useState(localStorage.getItem("truetune.view") ?? "chat");
  const [hasIds, setIds] = useState(false);
  const choose = (wanted) => { localStorage.setItem("truetune.view", wanted); setView(wanted); };
  return html`<div class="rows-head">
      <${Choice} label=${t("view")} value=${view} onChange=${choose} options=${[["chat", t("view_chat")], ["tokens", t("view_tokens")]]} />
      ${view === "tokens" && html`<label class="check"><input type="checkbox" checked=${hasIds} onChange=${(event) => setIds(event.target.checked)} /> ${t("show_ids")}</label>
        <span class="legend"><span class="token learned">${t("legend_learned")}</span><span class="token prompt">${t("legend_prompt")}</span><span class="token special">${t("legend_special")}</span></span>`}
    </div>
    ${rows.map((row) => html`<${Row} key=${`${row.where}/${row.index}`} row=${row} view=${view} hasIds=${hasIds} />`)}`;
}
