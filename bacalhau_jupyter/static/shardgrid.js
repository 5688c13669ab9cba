/**
 * The live view of one job: a sentence, a bar, a grid with one tile for each shard, and what a
 * chosen shard printed last.
 *
 * The kernel sets three traits and sends no messages, so a page that reloads, or a second view,
 * has everything at once: `states` (one byte for each shard), `summary` (a small object, at most
 * ten times a second) and `inputs` (one text for each shard, once). However many changes arrive,
 * one animation frame draws them, and only tiles that differ are touched.
 */

const NAMES = ["waiting", "running", "done", "failed", "stopped", "retrying"];
const [WAITING, RUNNING, DONE, FAILED, STOPPED, RETRYING] = NAMES.keys();
const SHOWN = [DONE, RUNNING, RETRYING, FAILED, STOPPED, WAITING];
const WORST_FIRST = [FAILED, RETRYING, RUNNING, WAITING, STOPPED, DONE];
const FINAL = new Set(["Completed", "Failed", "Stopped"]);
const MAX_TILES = 2000;
const ANNOUNCE_MS = 5000;

/** Whatever can have the focus tells JupyterLab itself to leave its keys alone: on a parent that has no effect. */
function element(tag, className, attributes = {}) {
  const node = document.createElement(tag);
  node.className = className;
  if (tag === "button" || "tabindex" in attributes) node.dataset.lmSuppressShortcuts = "true";
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function plural(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

function duration(seconds) {
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.floor(seconds % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function bytes(value) {
  if (!value) return new Uint8Array();
  return value.buffer ? new Uint8Array(value.buffer, value.byteOffset, value.byteLength) : new Uint8Array(value);
}

function count(states) {
  const counts = NAMES.map(() => 0);
  for (const code of states) counts[code] += 1;
  return counts;
}

/** The tiles: one for each shard, or, above MAX_TILES, one for each run of shards, showing the worst of them. */
class Grid {
  constructor(onOpen) {
    this.node = element("div", "bj-grid", { role: "group", "aria-label": "Shards: arrow keys move, Enter opens" });
    this.onOpen = onOpen;
    this.tiles = [];
    this.current = 0;
    this.run = 1;
    this.node.addEventListener("keydown", (event) => this.key(event));
    this.node.addEventListener("click", (event) => {
      const index = this.tiles.indexOf(event.target);
      if (index >= 0) this.open(index);
    });
  }

  draw(states, label) {
    this.run = Math.max(1, Math.ceil(states.length / MAX_TILES));
    const needed = Math.ceil(states.length / this.run);
    if (needed !== this.tiles.length) this.build(needed);
    for (let index = 0; index < needed; index += 1) {
      const part = states.subarray(index * this.run, (index + 1) * this.run);
      const code = this.run === 1 ? part[0] : WORST_FIRST.find((each) => part.includes(each));
      const key = this.run === 1 ? code : `${code}:${count(part).join()}`;
      const tile = this.tiles[index];
      if (tile.key === key) continue;
      tile.key = key;
      tile.dataset.code = code;
      const text = label(index * this.run, part);
      tile.setAttribute("aria-label", text);
      tile.title = text;
    }
  }

  build(needed) {
    this.node.dataset.size = needed <= 100 ? "large" : needed <= 500 ? "medium" : "small";
    this.tiles = Array.from({ length: needed }, () => element("button", "bj-tile", { type: "button", tabindex: "-1" }));
    this.node.replaceChildren(...this.tiles);
    this.current = 0;
    if (needed) this.tiles[0].tabIndex = 0;
  }

  columns() {
    const top = this.tiles[0].offsetTop;
    const next = this.tiles.findIndex((tile) => tile.offsetTop !== top);
    return next < 0 ? this.tiles.length : next;
  }

  key(event) {
    const last = this.tiles.length - 1;
    const moves = {
      ArrowRight: () => this.current + 1,
      ArrowLeft: () => this.current - 1,
      ArrowDown: () => this.current + this.columns(),
      ArrowUp: () => this.current - this.columns(),
      Home: () => 0,
      End: () => last,
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    event.stopPropagation();
    const target = moves[event.key]();
    if (target >= 0 && target <= last) this.focus(target);
  }

  focus(index = this.current) {
    this.tiles[this.current].tabIndex = -1;
    this.current = index;
    this.tiles[index].tabIndex = 0;
    this.tiles[index].focus();
  }

  open(index) {
    this.focus(index);
    this.onOpen(index * this.run);
  }

  mark(shard) {
    for (const tile of this.node.querySelectorAll("[aria-expanded]")) tile.removeAttribute("aria-expanded");
    if (shard !== null) this.tiles[Math.floor(shard / this.run)]?.setAttribute("aria-expanded", "true");
  }
}

class View {
  constructor(model, root) {
    this.model = model;
    this.root = root;
    this.frame = null;
    this.timer = null;
    this.announcedAt = -Infinity;
    this.opened = null;
    this.tails = new Map();
    this.states = new Uint8Array();
    this.summary = {};
    this.grid = new Grid((shard) => this.open(shard));
    this.build();
    this.onChange = () => {
      this.frame ??= requestAnimationFrame(() => this.draw());
    };
    for (const name of ["states", "summary", "inputs"]) model.on(`change:${name}`, this.onChange);
    this.draw();
  }

  dispose() {
    for (const name of ["states", "summary", "inputs"]) this.model.off(`change:${name}`, this.onChange);
    if (this.frame !== null) cancelAnimationFrame(this.frame);
    clearTimeout(this.timer);
    this.root.replaceChildren();
  }

  build() {
    this.box = element("div", "bj-job");
    const head = element("div", "bj-head");
    this.mark = element("span", "bj-mark", { "aria-hidden": "true" });
    this.state = element("strong", "bj-state");
    this.title = element("span", "bj-title");
    this.id = element("code", "bj-id");
    this.cancel = element("button", "bj-button", { type: "button" });
    this.cancel.addEventListener("click", () => {
      this.cancel.disabled = true;
      this.model.send({ type: "cancel" });
    });
    head.append(this.mark, this.state, this.title, this.id, this.cancel);

    this.bar = element("div", "bj-bar", { role: "progressbar", "aria-label": "Shards finished", "aria-valuemin": "0" });
    this.segments = SHOWN.map((code) => element("span", "bj-segment", { "data-code": code }));
    this.bar.append(...this.segments);

    const facts = element("div", "bj-facts");
    this.chips = SHOWN.map((code) => element("span", "bj-chip", { "data-code": code }));
    this.bytes = element("span", "bj-bytes");
    this.time = element("span", "bj-time");
    facts.append(...this.chips, this.bytes, this.time);

    this.failures = element("div", "bj-failures");
    this.failures.addEventListener("click", (event) => {
      const shard = event.target.dataset?.shard;
      if (shard !== undefined) this.grid.open(Math.floor(Number(shard) / this.grid.run));
    });
    this.detail = element("div", "bj-detail", { role: "region", tabindex: "-1", "aria-label": "Shard" });
    this.detail.hidden = true;
    this.live = element("div", "bj-live", { role: "status", "aria-live": "polite" });
    this.box.append(head, this.bar, facts, this.grid.node, this.detail, this.failures, this.live);
    this.box.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || this.opened === null) return;
      event.preventDefault();
      event.stopPropagation();
      this.close();
    });
    this.root.replaceChildren(this.box);
  }

  draw() {
    this.frame = null;
    this.states = bytes(this.model.get("states"));
    this.summary = this.model.get("summary") ?? {};
    for (const [shard, lines] of Object.entries(this.summary.tails ?? {})) this.tails.set(Number(shard), lines);
    const counts = count(this.states);
    const ended = counts[DONE] + counts[FAILED] + counts[STOPPED];
    this.drawHead(this.summary);
    this.drawBar(counts, ended);
    this.drawTime(this.summary);
    setText(this.bytes, this.summary.fetching ?? "");
    this.drawFailures(this.summary.failures ?? []);
    this.grid.node.hidden = this.states.length < 2;
    this.grid.draw(this.states, (shard, part) => this.label(shard, part));
    if (this.opened !== null) this.drawDetail();
    this.announce(counts, ended);
  }

  drawHead({ state = "Pending", title = "", reason = "", job = "", cancel = false }) {
    this.box.dataset.state = state;
    setText(this.state, state);
    setText(this.title, reason ? `${title} · ${reason}` : title);
    setText(this.id, job.slice(0, 10));
    this.id.title = job;
    this.cancel.hidden = !cancel || FINAL.has(state);
    setText(this.cancel, this.cancel.disabled ? "Cancelling…" : "Cancel");
  }

  drawBar(counts, ended) {
    SHOWN.forEach((code, index) => {
      this.segments[index].style.flexGrow = counts[code];
      this.segments[index].hidden = !counts[code];
      setText(this.chips[index], `${counts[code].toLocaleString("en")} ${NAMES[code]}`);
      this.chips[index].hidden = !counts[code];
    });
    const values = { "aria-valuemax": this.states.length, "aria-valuenow": ended };
    for (const [name, value] of Object.entries(values)) this.bar.setAttribute(name, value);
    this.bar.setAttribute("aria-valuetext", this.sentence(counts, ended));
  }

  drawTime({ elapsed = null, eta = null, state }) {
    const left = eta === null || FINAL.has(state) ? "" : ` · about ${duration(Math.max(1, eta))} left`;
    setText(this.time, elapsed === null ? "" : `${duration(elapsed)}${left}`);
  }

  drawFailures(failures) {
    const key = JSON.stringify(failures);
    if (this.failures.dataset.key === key) return;
    this.failures.dataset.key = key;
    const buttons = failures.map(([text, shard]) => {
      const button = element("button", "bj-failure", { type: "button", "data-shard": shard });
      button.textContent = text;
      return button;
    });
    this.failures.replaceChildren(...buttons);
  }

  label(shard, part) {
    if (part.length === 1) return `shard ${shard}, ${NAMES[part[0]]}`;
    const counts = count(part);
    const parts = SHOWN.filter((code) => counts[code]).map((code) => `${counts[code]} ${NAMES[code]}`);
    return `shards ${shard} to ${shard + part.length - 1}: ${parts.join(", ")}`;
  }

  open(shard) {
    if (this.opened === shard) {
      this.close();
      return;
    }
    this.opened = shard;
    this.drawDetail();
    this.detail.scrollIntoView({ block: "nearest" });
  }

  close() {
    this.opened = null;
    this.detail.hidden = true;
    this.grid.mark(null);
    this.grid.focus();
  }

  drawDetail() {
    const shard = this.opened;
    const part = this.states.subarray(shard, shard + this.grid.run);
    const inputs = (this.model.get("inputs") ?? [])[shard];
    const lines = this.tails.get(shard) ?? [];
    const key = JSON.stringify([shard, ...part, inputs, lines]);
    this.grid.mark(shard);
    if (this.detail.dataset.key === key && !this.detail.hidden) return;
    this.detail.dataset.key = key;
    this.detail.hidden = false;
    const head = element("div", "bj-detail-head");
    head.textContent = this.label(shard, part) + (inputs && part.length === 1 ? ` · ${inputs}` : "");
    const text = element("pre", "bj-lines", { tabindex: "0", "aria-label": "last lines" });
    text.textContent = lines.length ? lines.join("\n") : "no lines here; job.logs(shard) has all that were printed";
    const back = element("button", "bj-button", { type: "button" });
    back.textContent = "Close (Esc)";
    back.addEventListener("click", () => this.close());
    head.append(back);
    this.detail.setAttribute("aria-label", this.label(shard, part));
    const focused = this.detail.contains(document.activeElement);
    this.detail.replaceChildren(head, text);
    text.scrollTop = text.scrollHeight;
    if (focused) text.focus();
  }

  sentence(counts, ended) {
    const failed = counts[FAILED] ? `, ${counts[FAILED]} failed` : "";
    return `${ended} of ${plural(this.states.length, "shard")} finished${failed}`;
  }

  /** Tell a screen reader, every five seconds at most and once at the end. */
  announce(counts, ended) {
    const { state } = this.summary;
    const text = `${FINAL.has(state) ? `Job ${state.toLowerCase()}: ` : ""}${this.sentence(counts, ended)}`;
    clearTimeout(this.timer);
    const say = () => {
      this.announcedAt = performance.now();
      setText(this.live, text);
    };
    const wait = FINAL.has(state) ? 0 : this.announcedAt + ANNOUNCE_MS - performance.now();
    if (wait <= 0) say();
    else this.timer = setTimeout(say, wait);
  }
}

function render({ model, el }) {
  const view = new View(model, el);
  return () => view.dispose();
}

export default { render };
