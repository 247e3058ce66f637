// Texts of the catalogue in the page's language, and numbers as that language writes them.
import { get } from "./api.js";

const KEPT = "truetune.lang";
let texts = {};
let language = "en";

export const lang = () => language;

export async function loadTexts(wanted) {
  language = wanted || localStorage.getItem(KEPT) || (navigator.language.startsWith("zh") ? "zh" : "en");
  if (wanted) localStorage.setItem(KEPT, wanted);
  texts = await get("texts", { lang: language });
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
}

// t("of", {total: 3}): the text of "studio.of", its braces filled. A key that is not there is shown.
export const t = (key, values) => anyText(`studio.${key}`, values);

// Any text of the catalogue; of Python's formats, those that it uses: {share:.0%}, {rate:g}, {loss:.3f}, {count:,}.
export function anyText(key, values = {}) {
  const found = texts[key];
  if (found === undefined) return key.replace(/^studio\./, "");
  return found.replace(/\{(\w+)(?::([^}]*))?\}/g, (all, name, format) => (name in values ? formatted(values[name], format) : all));
}

function formatted(value, format) {
  if (!format || typeof value !== "number") return String(value);
  const digits = Number(/\.(\d)/.exec(format)?.[1] ?? 0);
  if (format.endsWith("%")) return `${(100 * value).toFixed(digits)}%`;
  return format.endsWith("f") ? value.toFixed(digits) : number(value);
}

export const whole = (value) => (value == null ? "–" : Math.round(value).toLocaleString(language));

export function number(value, digits = 4) {
  if (value == null || Number.isNaN(value)) return "–";
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(2);
  return value.toLocaleString(language, { maximumSignificantDigits: digits });
}

export function bytes(value) {
  if (value == null) return "–";
  const steps = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  while (value >= 1000 && at < steps.length - 1) { value /= 1000; at += 1; }
  return `${number(value, 3)} ${steps[at]}`;
}

export function duration(seconds) {
  if (seconds == null || !Number.isFinite(seconds)) return "–";
  if (seconds < 60) return t("time_s", { s: number(seconds, 2) });
  const all = Math.round(seconds);
  const [h, m, s] = [Math.floor(all / 3600), Math.floor((all % 3600) / 60), all % 60];
  if (h) return t("time_hm", { h, m });
  return m ? t("time_ms", { m, s }) : t("time_s", { s });
}

// Paths inside the home folder are told from there, as the command line does.
let home = "";
export const setHome = (path) => { home = `${path.replace(/\/$/, "")}/`; };
export const nearPath = (path) => (path?.startsWith(home) ? path.slice(home.length) : path);

export const baseName = (path) => String(path ?? "").replace(/\/+$/, "").split("/").pop();
