// The numbers of a run: what the server has, and what comes while one looks.
import { useCallback, useEffect, useRef, useState } from "../html.js";
import { get, listen } from "../api.js";
import { zoomed } from "./zoom.js";

// Beside the loss, which has points of its own so that none of its extremes is lost.
const KEYS = ["learning_rate", "grad_norm", "rows_per_s", "tokens_per_s", "seconds", "memory_bytes", "cpu_percent", "gpu_percent",
  "rewards_chosen", "rewards_rejected", "reward_accuracy"];
const LOSS_POINTS = 3000;
const POINTS = 3000;
// So many live steps are drawn at the end of what was asked for, before all of it is asked for again.
const MOST_LIVE = 1000;
const DRAW_MS = 250;

// Zoomed in, half as much again is asked for on either side, so that moving along shows something at once.
function ask(name, keys, points, range) {
  const query = { keys: keys.join(","), points };
  if (range) {
    const [from, to] = zoomed(range, 2);
    Object.assign(query, { points: 2 * points, from: Math.max(Math.floor(from), 0), to: Math.ceil(to) });
  }
  return get(`runs/${encodeURIComponent(name)}/series`, query);
}

export const askLoss = (name, range) => ask(name, ["loss"], LOSS_POINTS, range);

// {step, loss, eval, total} of the loss, and `rest`: {step, learning_rate, …}.
async function askSeries(name, range) {
  const [found, rest] = await Promise.all([askLoss(name, range), ask(name, KEYS, POINTS, range)]);
  return { ...found, rest };
}

const lastOf = (series) => series?.step.at(-1) ?? 0;

const valueOf = (event, key) => {
  if (key === "rows_per_s") return event.rows / event.seconds;
  return key === "tokens_per_s" ? event.trie_tokens / event.seconds : event[key] ?? null;
};

function withEvents(series, events) {
  const made = { ...series, step: [...series.step], loss: [...series.loss], eval: [...series.eval], rest: { step: [...series.rest.step] } };
  for (const key of KEYS) made.rest[key] = [...series.rest[key]];
  for (const event of events) {
    if (event.kind === "eval" && event.step > (made.eval.at(-1)?.[0] ?? -1)) made.eval.push([event.step, event.eval_loss]);
    if (event.kind !== "step" || event.step <= lastOf(made)) continue;
    made.step.push(event.step);
    made.loss.push(event.loss);
    made.rest.step.push(event.step);
    for (const key of KEYS) made.rest[key].push(valueOf(event, key));
  }
  return made;
}

// {series, error}; `onTold` hears of events that are neither steps nor evaluations' numbers. `range`: the steps zoomed to.
export function useSeries(name, { range, isLive, onTold }) {
  const [series, setSeries] = useState(null);
  const [error, setError] = useState(null);
  const waiting = useRef([]);
  const numLive = useRef(0);
  const told = useRef(onTold);
  told.current = onTold;
  const asked = useRef(0);
  const reload = useCallback(async () => {
    const turn = asked.current += 1;
    try {
      const found = await askSeries(name, range);
      // Of two answers the one that was asked for last counts, whichever comes last.
      if (turn !== asked.current) return;
      waiting.current = [];
      numLive.current = 0;
      setSeries(found);
    } catch (fault) { setError(fault); }
  }, [name, range?.[0], range?.[1]]);
  useEffect(() => { reload(); }, [reload]);
  const isThere = series !== null;
  useEffect(() => {
    if (!isThere || !isLive) return undefined;
    const draw = () => {
      const events = waiting.current.splice(0);
      if (!events.length) return;
      numLive.current += events.length;
      if (numLive.current > MOST_LIVE) reload();
      else if (!range) setSeries((old) => withEvents(old, events));
    };
    const timer = setInterval(draw, DRAW_MS);
    const stop = listen(`runs/${encodeURIComponent(name)}/live`, { after: lastOf(series) }, (event) => {
      if (event.kind === "step" || event.kind === "eval") waiting.current.push(event);
      // A resumed run takes steps again: what is drawn may be of steps that no longer count.
      if (event.kind === "cut") reload();
      told.current?.(event);
    });
    return () => { clearInterval(timer); stop(); };
  }, [isThere, isLive, reload]);
  return { series, error, reload };
}
