// The frame: which page the address names (#/data/JOB, #/train?model=…, #/runs, #/run/NAME/samples, #/chat/NAME), languages.
import { html, render, useEffect, useState } from "./html.js";
import { get } from "./api.js";
import { lang, loadTexts, setHome, t } from "./text.js";
import { DataPage } from "./pages/data.js";
import { TrainPage } from "./pages/train.js";
import { RunPage, RunsPage } from "./pages/run.js";
import { TalkPage } from "./pages/talk.js";

const PAGES = { data: DataPage, train: TrainPage, runs: RunsPage, run: RunPage, chat: TalkPage };
const TABS = ["data", "train", "runs", "chat"];

function route() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [page, ...rest] = path.split("/").map(decodeURIComponent);
  return { page: PAGES[page] ? page : "data", rest, query: new URLSearchParams(query ?? "") };
}

function App({ state }) {
  const [at, setAt] = useState(route);
  const [shown, setShown] = useState(lang());
  useEffect(() => {
    const moved = () => { setAt(route()); document.querySelector("main")?.focus({ preventScroll: true }); scrollTo(0, 0); };
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);
  const Page = PAGES[at.page];
  const tab = at.page === "run" ? "runs" : at.page;
  const title = t(`tab_${tab}`);
  useEffect(() => { document.title = `${title} · Truetune`; }, [title]);
  const choose = async (wanted) => { await loadTexts(wanted); setShown(wanted); };
  return html`
    <a class="skip" href="#main" onClick=${(event) => { event.preventDefault(); document.querySelector("main").focus(); }}>${t("skip")}</a>
    <header>
      <a class="brand" href="#/data"><img src="static/icon.svg" alt="" width="24" height="24" />Truetune</a>
      <nav aria-label=${t("pages")}>
        ${TABS.map((name) => html`<a key=${name} href=${`#/${name}`} aria-current=${tab === name ? "page" : undefined}>${t(`tab_${name}`)}</a>`)}
      </nav>
      <div class="langs" role="group" aria-label=${t("language")}>
        ${[["en", "English"], ["zh", "中文"]].map(([name, label]) => html`
          <button key=${name} type="button" class="quiet" lang=${name} aria-pressed=${shown === name} onClick=${() => choose(name)}>${label}</button>`)}
      </div>
    </header>
    <main id="main" tabindex="-1" key=${`${shown}/${at.page}/${at.page === "run" ? at.rest[0] : ""}`}>
      <${Page} rest=${at.rest} query=${at.query} state=${state} />
    </main>
    <footer class="soft">Truetune ${state.version} · <code>${state.cwd}</code></footer>`;
}

async function start() {
  const [state] = await Promise.all([get("state"), loadTexts()]);
  setHome(state.cwd);
  render(html`<${App} state=${state} />`, document.getElementById("app"));
}

start().catch((error) => { document.getElementById("app").textContent = error.message; });
