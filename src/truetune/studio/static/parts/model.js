// The base model: a folder, a .gguf file or a hub id, typed or taken from what this machine has used.
import { html } from "../html.js";
import { t } from "../text.js";

export const ModelChoice = ({ value, models, onChange }) => html`<label class="wide">${t("model")}
  <input list="models" required value=${value} placeholder=${t("model_hint")} onInput=${(event) => onChange(event.target.value)} />
  <datalist id="models">${models.map((model) => html`<option key=${model} value=${model} />`)}</datalist></label>`;
