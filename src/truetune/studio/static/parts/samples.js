// The same prompts answered by base and current model, at each evaluation.
import { html } from "../html.js";
import { t, whole } from "../text.js";
import { Fault, useAsked } from "./basics.js";

// `latest` changes when there are new ones.
export function Samples({ name, latest }) {
  const { value, error } = useAsked(`runs/${encodeURIComponent(name)}/samples`, {}, [name, latest]);
  if (error) return html`<${Fault} error=${error} />`;
  const samples = Array.isArray(value) ? value : value?.samples ?? [];
  if (value && !samples.length) return html`<p class="soft">${t("no_samples")}</p>`;
  const prompts = Object.values(Object.groupBy(samples, (sample) => sample.number));
  return html`<section>${prompts.map((taken) => {
    const latest = taken.at(-1);
    return html`<article class="row" key=${latest.number}><p class="asked">${latest.prompt}</p>
      <div class="sides"><div><b>${t("base")}</b>${latest.base}</div>
        <div class="tuned"><b>${t("tuned_at", { step: whole(latest.step) })}${!latest.is_ended && html` · ${t("cut_off")}`}</b>${latest.answer}</div></div>
      ${taken.length > 1 && html`<details><summary>${t("earlier", { count: taken.length - 1 })}</summary>
        <dl class="earlier">${taken.slice(0, -1).reverse().map((sample) => html`<dt key=${sample.step}>${t("at_step", { step: whole(sample.step) })}</dt><dd>${sample.answer}</dd>`)}</dl></details>`}
    </article>`;
  })}</section>`;
}
