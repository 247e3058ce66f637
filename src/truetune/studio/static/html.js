// What every part draws with. Text reaches the page only as text: no innerHTML anywhere.
import { h, render } from "./vendor/preact.js";
import htm from "./vendor/htm.js";

export const html = htm.bind(h);
export { render };
export { useCallback, useEffect, useMemo, useRef, useState } from "./vendor/hooks.js";
