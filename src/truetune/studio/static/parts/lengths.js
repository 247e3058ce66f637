// How long the pairs are, in tokens, beside the longest that is allowed.
import { html } from "../html.js";
import { t, whole } from "../text.js";
import { useAsked } from "./basics.js";

export function Lengths({ store, limit }) {
  const { value } = useAsked("lengths", { store }, [store]);
  const bars = value?.bars ?? value?.bins ?? [];
  if (!value?.pairs) return null;
  const most = Math.max(...bars.map((bar) => bar.count));
  const end = bars[bars.length - 1].to;
  const max = value.max_length ?? limit;
  const summary = t("lengths_summary", { end: whole(end), max: whole(max) });
  return html`<h2>${t("lengths")}</h2>
    <svg class="bars" viewBox="0 0 100 40" preserveAspectRatio="none" role="img" aria-label=${summary}>
      ${bars.map((bar) => html`<rect key=${bar.from} x=${(100 * bar.from) / end} width=${Math.max((100 * (bar.to - bar.from)) / end - 0.25, 0.2)}
        y=${40 - (39 * bar.count) / most} height=${(39 * bar.count) / most}><title>${`${bar.from}–${bar.to}: ${bar.count}`}</title></rect>`)}
      ${max <= end && html`<line x1=${(100 * max) / end} x2=${(100 * max) / end} y1="0" y2="40" />`}
    </svg>
    <div class="axis"><span>0</span><span>${summary}</span><span>${whole(end)}</span></div>`;
}
