// A file of the folders that the studio may read, or one that is dropped on the page.
import { html, useRef, useState } from "../html.js";
import { upload } from "../api.js";
import { baseName, bytes, nearPath, t, whole } from "../text.js";
import { Fault, useAsked } from "./basics.js";

// `value`: the chosen paths; dropping or choosing adds one.
export function FileChoice({ value, onChange }) {
  const [share, setShare] = useState(null);
  const [error, setError] = useState(null);
  const [isOver, setOver] = useState(false);
  const [isPicking, setPicking] = useState(false);
  const input = useRef(null);
  const send = async (files) => {
    setError(null);
    try {
      const added = [];
      for (const file of files) {
        setShare(0);
        added.push(nearPath((await upload(file, setShare)).path));
      }
      onChange([...value, ...added.filter((path) => !value.includes(path))]);
    } catch (fault) { setError(fault); }
    setShare(null);
  };
  const drop = (event) => {
    event.preventDefault();
    setOver(false);
    send([...event.dataTransfer.files]);
  };
  const add = (path) => { onChange(value.includes(path) ? value : [...value, path]); setPicking(false); };
  return html`<div class=${`drop${isOver ? " over" : ""}`} onDragOver=${(event) => { event.preventDefault(); setOver(true); }}
      onDragLeave=${() => setOver(false)} onDrop=${drop}>
    ${value.map((path) => html`<span key=${path} class="chip" title=${path}>${baseName(path)}
      <button type="button" class="quiet" aria-label=${t("remove", { name: baseName(path) })} onClick=${() => onChange(value.filter((other) => other !== path))}>×</button></span>`)}
    <p class="soft">${share === null ? t("drop_hint") : t("uploading", { percent: whole(share * 100) })}</p>
    <div class="buttons">
      <button type="button" onClick=${() => input.current.click()}>${t("choose_file")}</button>
      <button type="button" aria-expanded=${isPicking} onClick=${() => setPicking(!isPicking)}>${t("browse")}</button>
      <input ref=${input} type="file" hidden multiple accept=".json,.jsonl" aria-label=${t("choose_file")} onChange=${(event) => { send([...event.target.files]); event.target.value = ""; }} />
    </div>
    <${Fault} error=${error} />
    ${isPicking && html`<${Browser} onChoose=${add} />`}
  </div>`;
}

// The folders of this machine that were opened to the studio.
export function Browser({ onChoose }) {
  const [path, setPath] = useState("");
  const { value, error } = useAsked("files", { path }, [path]);
  if (error) return html`<${Fault} error=${error} />`;
  if (!value) return null;
  // Other roots are listed by their whole paths.
  const join = (name) => (name.startsWith("/") ? name : `${value.path.replace(/\/$/, "")}/${name}`);
  return html`<div class="browser" role="group" aria-label=${t("browse")}>
    <div class="soft path">${value.path}</div>
    <ul>
      ${value.parent && html`<li><button type="button" class="quiet" onClick=${() => setPath(value.parent)}>↑ ..</button></li>`}
      ${value.folders.map((folder) => html`<li key=${folder}><button type="button" class="quiet" onClick=${() => setPath(join(folder))}>${folder.startsWith("/") ? folder : `${folder}/`}</button></li>`)}
      ${value.files.map((file) => html`<li key=${file.name}><button type="button" class="quiet" onClick=${() => onChoose(nearPath(join(file.name)))}>${file.name}</button><span class="soft">${bytes(file.bytes)}</span></li>`)}
    </ul>
  </div>`;
}
