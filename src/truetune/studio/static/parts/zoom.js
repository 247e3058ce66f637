// Which steps are in view: [from, to] within [first, last], null for all of them; and a hand that changes it.

const LEAST_STEPS = 8;
const TOLD_MS = 150;
const LINE_PX = 16;

// `factor` below 1 zooms in; `at` stays where it is.
export const zoomed = ([from, to], factor, at = (from + to) / 2) => [at - (at - from) * factor, at + (to - at) * factor];

export const moved = ([from, to], share) => [from + share * (to - from), to + share * (to - from)];

export function within([from, to], [first, last]) {
  const width = Math.max(to - from, LEAST_STEPS);
  if (width >= last - first) return null;
  const start = Math.min(Math.max((from + to - width) / 2, first), last - width);
  return [start, start + width];
}

// Ctrl and wheel (a pinch on a trackpad) zooms around the pointer; a wheel sideways or with Shift, and Shift and drag,
// move along what is zoomed. Each frame is drawn of what is there; `onRest` hears where it came to rest.
export class Hand {
  constructor(u, { bounds, view, onMove, onRest }) {
    Object.assign(this, { u, bounds, view, onMove, onRest, frame: 0, timer: 0, toBe: null });
    u.over.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
  }

  get isBusy() { return this.timer !== 0; }

  get now() { return (this.isBusy ? this.toBe : this.view()) ?? this.bounds(); }

  wheel(event) {
    const unit = event.deltaMode === 1 ? LINE_PX : 1;
    const [x, y] = [event.deltaX * unit, event.deltaY * unit];
    const sideways = event.shiftKey && !x ? y : Math.abs(x) > Math.abs(y) ? x : 0;
    // Any other wheel scrolls the page.
    if (!event.ctrlKey && (!sideways || (!this.view() && !this.isBusy))) return;
    event.preventDefault();
    if (event.ctrlKey) this.go(zoomed(this.now, Math.exp(y / 300), this.u.posToVal(event.offsetX, "x")));
    else this.go(moved(this.now, sideways / this.u.over.clientWidth));
  }

  // Begin to move with a mouse that is held down.
  drag(event) {
    let last = event.clientX;
    const follow = (moving) => {
      this.go(moved(this.now, (last - moving.clientX) / this.u.over.clientWidth));
      last = moving.clientX;
    };
    document.addEventListener("mousemove", follow);
    document.addEventListener("mouseup", () => document.removeEventListener("mousemove", follow), { once: true });
  }

  go(range) {
    this.toBe = within(range, this.bounds());
    this.frame ||= requestAnimationFrame(() => { this.frame = 0; this.onMove(this.toBe); });
    clearTimeout(this.timer);
    this.timer = setTimeout(() => { this.timer = 0; this.onRest(this.toBe); }, TOLD_MS);
  }

  end() {
    cancelAnimationFrame(this.frame);
    clearTimeout(this.timer);
  }
}
