// A command that the studio started: what it is, what it prints, how it ended, and a way to stop it.
import { html, useEffect, useState } from "../html.js";
import { get, post } from "../api.js";
import { t } from "../text.js";
import { Badge, Command, Fault, usePolling } from "./basics.js";

const POLL_MS = 700;

// The job with that id, asked for until it ends.
export function useJob(id) {
  const [job, setJob] = useState(null);
  const [error, setError] = useState(null);
  const ask = async () => {
    try { setJob(await get(`jobs/${id}`)); setError(null); } catch (fault) { setError(fault); }
  };
  useEffect(() => { setJob(null); setError(null); if (id) ask(); }, [id]);
  const isRunning = Boolean(id) && (!job ? !error : job.state === "running");
  usePolling(ask, POLL_MS, isRunning);
  return { job, error, isRunning };
}

export const startJob = (command, words) => post("jobs", { command, words });

// `isOpen`: the output is shown at once, and not only where the command failed. `hasStop`: false where the page has its own.
export function Job({ id, job, error, isOpen, hasStop = true }) {
  if (error) return html`<${Fault} error=${error} />`;
  if (!job) return null;
  const output = (Array.isArray(job.output) ? job.output.join("\n") : job.output ?? "").trim();
  const isRunning = job.state === "running";
  return html`<section class="job" aria-live="polite">
    <div class="job-head"><${Badge} state=${job.state} />
      ${isRunning && hasStop && html`<button type="button" onClick=${() => post(`jobs/${id}/stop`)}>${t("stop")}</button>`}
      ${job.exit_code != null && job.exit_code !== 0 && html`<span class="soft">${t("exit_code", { code: job.exit_code })}</span>`}</div>
    <${Command} shown=${job.shown} />
    ${output && html`<details open=${isOpen || job.state === "failed"}><summary>${t("output")}</summary><pre class="log" tabindex="0">${output}</pre></details>`}
  </section>`;
}
