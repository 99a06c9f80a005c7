"use strict";
// Drawings of one step, as text of HTML and SVG. Nothing here knows where they stand on the page.

const HUES = 8;
const KINDS = { // in the order of the legend
  prefill: "prefill: computes its prompt", decode: "decode: 1 token", speculative: "guesses verified too",
  cached: "tokens from the prefix cache", swapped: "back from host memory",
  preempted: "preempted: loses its blocks", waiting: "waiting",
};
const DETAILED = 256, MOST_CELLS = 4096; // blocks drawn with text in them; blocks drawn at all
const MOST_EACH = 128; // blocks of a table that are drawn, the last ones

function escaped(text) {
  return String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
}

function hue(sequence) {
  return `var(--hue${sequence.number % HUES})`;
}

// -- block tables --------------------------------------------------------------------------------

function tablesHtml(state, most = 40) {
  const copied = new Set((state.copies || []).map(([, target]) => target));
  const rows = state.sequences.slice(0, most).map((sequence) => {
    const tokens = amount(sequence.known, "token");
    const status = sequence.table.length ? "" : sequence.preemptions ? ", preempted" : ", waiting";
    const cells = sequence.table.slice(-MOST_EACH).map((block, at) =>
      logicalHtml(state, sequence, block, at + Math.max(sequence.table.length - MOST_EACH, 0), copied.has(block)));
    if (sequence.table.length > MOST_EACH) cells.unshift(`<span class="waits">${sequence.table.length - MOST_EACH} before</span>`);
    const label = sequence.table.length ? `<span class="hidden">physical blocks</span>` : `<span class="waits">no blocks</span>`;
    return `<li style="--hue:${hue(sequence)}"><div class="name"><b>${escaped(sequence.id)}</b><small>${tokens}${status}</small></div>` +
      `<div class="cells">${label}${cells.join(" ")}</div></li>`;
  });
  if (!rows.length) rows.push("<li>no sequences</li>");
  if (state.sequences.length > most) rows.push(`<li>and ${state.sequences.length - most} more sequences</li>`);
  return rows.join("");
}

function logicalHtml(state, sequence, block, index, copied) {
  const size = state.blockSize, within = (count) => Math.min(Math.max(count - index * size, 0), size);
  const computed = within(sequence.computed), end = within(sequence.computed + sequence.scheduled);
  const share = (count) => `${(100 * count) / size}%`;
  const bar = `linear-gradient(90deg,var(--muted) ${share(computed)},var(--new) ${share(computed)} ${share(end)},transparent ${share(end)})`;
  const title = `logical block ${index} is physical block ${block}; ${end} of ${size} slots hold KV` +
    (end > computed ? `, ${end - computed} written in this step` : "");
  return `<span class="logical${copied ? " copied" : ""}" title="${title}">${block}<i style="background-image:${bar}"></i></span>`;
}

// -- pool ----------------------------------------------------------------------------------------

function poolHtml(state, numBlocks) {
  const holders = new Map();
  for (const sequence of state.sequences)
    for (const block of sequence.table) holders.set(block, [...(holders.get(block) || []), sequence]);
  const evicted = new Set(state.evicted || []), from = new Map((state.copies || []).map(([source, target]) => [target, source]));
  const cells = [];
  for (let block = 0; block < numBlocks; block += 1)
    cells.push(physicalHtml(state, block, holders.get(block) || [], evicted.has(block), from.get(block)));
  return cells.join("");
}

function physicalHtml(state, block, holders, evicted, source) {
  const count = state.refCnts[block], cached = state.cached.has(block);
  const classes = ["physical", count ? (count > 1 ? "shared" : "") : cached ? "cached-free" : "free"];
  if (source !== undefined) classes.push("copied");
  const shown = holders.slice(0, 6), part = 100 / shown.length;
  const stops = shown.map((sequence, at) => `${hue(sequence)} ${at * part}% ${(at + 1) * part}%`);
  const paint = shown.length ? ` style="background:linear-gradient(90deg,${stops.join(",")})"` : "";
  const where = count ? `held by ${listing(holders.map((sequence) => sequence.id))}` : cached ? "free, its KV is cached" : "free";
  const title = `block ${block}: ${where}${count && cached ? "; in the prefix cache" : ""}${evicted ? "; evicted, used anew" : ""}`;
  return `<div class="${classes.join(" ")}"${paint} title="${escaped(title)}"><span class="id">${block}</span>` +
    (count ? `<span class="refs${count > 1 ? " many" : ""}">×${count}</span>` : "") +
    (cached ? `<span class="dot"></span>` : "") + (evicted ? `<span class="evicted"></span>` : "") +
    (source !== undefined ? `<span class="from">←${source}</span>` : "") + "</div>";
}

// -- timeline ------------------------------------------------------------------------------------

function timelineSvg(steps, now, width, mostRows = 24) {
  const narrow = width < 560, labels = narrow ? 96 : 150, cell = narrow ? 24 : 26, height = 24;
  const rows = new Map();
  for (const step of steps)
    for (const sequence of step.sequences) if (!rows.has(sequence.number)) rows.set(sequence.number, sequence.id);
  const present = new Set((steps.find((step) => step.index === now) || steps[steps.length - 1]).sequences.map((s) => s.number));
  const order = [...rows.keys()].sort((a, b) => a - b);
  const keep = order.length <= mostRows ? order : order.filter((number) => present.has(number)).slice(0, mostRows);
  const at = new Map(keep.map((number, row) => [number, row]));
  const top = 22, bottom = top + keep.length * (height + 3);
  const parts = [];
  const every = cell * 2 >= 34 ? 2 : 1;
  steps.forEach((step, column) => {
    const x = labels + column * cell;
    const wide = String(step.index).length > 3 ? 5 : every;
    if (step.index % wide === 0) parts.push(`<text class="faint number" x="${x + cell / 2 - 1}" y="14">${step.index}</text>`);
    parts.push(...columnOf(step, at, x, top, cell, height));
  });
  keep.forEach((number, row) => {
    const y = top + row * (height + 3), name = rows.get(number), most = narrow ? 11 : 19;
    const short = name.length > most ? `${name.slice(0, 3)}…${name.slice(4 - most)}` : name;
    parts.push(`<text x="0" y="${y + 17}">${escaped(short)}<title>${escaped(name)}</title></text>`);
  });
  const column = steps.findIndex((step) => step.index === now);
  if (column >= 0) parts.push(`<rect class="now" x="${labels + column * cell - 2}" y="${top - 3}" width="${cell + 2}" height="${bottom - top + 4}" rx="3"/>`);
  steps.forEach((step, index) => parts.push(
    `<rect class="hit" data-step="${step.index}" x="${labels + index * cell}" y="0" width="${cell}" height="${bottom + 2}"><title>step ${step.index}</title></rect>`));
  let total = bottom + 4;
  if (keep.length < order.length) {
    parts.push(`<text class="faint" x="0" y="${total + 12}">and ${order.length - keep.length} more sequences</text>`);
    total += 20;
  }
  return `<svg viewBox="0 0 ${width} ${total}" width="${width}" height="${total}" role="img" aria-label="Timeline of steps ${steps[0].index} to ${steps[steps.length - 1].index}; the tables below tell each step in words">${parts.join("")}</svg>`;
}

function columnOf(step, rows, x, top, cell, height) {
  const parts = [], busy = new Map(step.work.map((work) => [work.sequence.number, work]));
  const preempted = new Set(step.preempted);
  for (const sequence of step.sequences) {
    if (!rows.has(sequence.number)) continue;
    const y = top + rows.get(sequence.number) * (height + 3), work = busy.get(sequence.number), width = cell - 2;
    if (preempted.has(sequence.id)) parts.push(cellSvg("preempted", x, y, width, height));
    else if (!work) parts.push(cellSvg("waiting", x, y, cell, height));
    else {
      const kind = work.guesses ? "speculative" : work.swapped ? "swapped" : work.kind;
      parts.push(cellSvg(kind, x, y, width, height, work.cached > 0));
      const text = work.tokens < 1000 ? work.tokens : "…";
      parts.push(`<text class="number" x="${x + width / 2}" y="${y + (work.cached ? 20 : 17)}">${text}</text>`);
    }
  }
  return parts;
}

function cellSvg(kind, x, y, width, height, cached = false) {
  if (kind === "waiting") return `<rect x="${x}" y="${y + height / 2 - 1.5}" width="${width}" height="3" fill="var(--waiting)"/>`;
  if (kind === "preempted") {
    const cx = x + width / 2, cy = y + height / 2;
    return `<rect class="lost" x="${x + 0.5}" y="${y + 0.5}" width="${width - 1}" height="${height - 1}" rx="2"/>` +
      `<path class="cross" d="M${cx - 5} ${cy - 5}l10 10m0 -10l-10 10"/>`;
  }
  const band = cached ? `<rect x="${x}" y="${y}" width="${width}" height="7" fill="var(--cached)"/>` +
    `<path d="M${x} ${y + 7}l5 -7m1 7l5 -7m1 7l5 -7" stroke="var(--muted)" stroke-width="1.6"/>` : "";
  return `<rect x="${x}" y="${y}" width="${width}" height="${height}" rx="2" fill="var(--${kind})"/>${band}`;
}

// -- legends -------------------------------------------------------------------------------------

function swatch(style, inner = "") {
  return `<i class="swatch" style="${style};position:relative">${inner}</i>`;
}

function legendHtml(entries) {
  return entries.map(([mark, text]) => `<span>${mark}${text}</span>`).join("");
}

function timelineLegend() {
  return legendHtml(Object.entries(KINDS).map(([kind, text]) => [
    `<svg width="20" height="20" viewBox="0 0 20 20" aria-hidden="true">${cellSvg(kind === "cached" ? "prefill" : kind, 1, 1, 18, 18, kind === "cached")}</svg>`, text]));
}

function poolLegend() {
  const dot = `<b style="position:absolute;right:2px;top:2px;width:6px;height:6px;border-radius:50%;background:var(--ink)"></b>`;
  const corner = `<b style="position:absolute;left:0;bottom:0;border:5px solid transparent;border-left-color:var(--alarm);border-bottom-color:var(--alarm)"></b>`;
  return legendHtml([
    [swatch("background:var(--hue0)"), "in use, ×n: by n tables"],
    [swatch("background:linear-gradient(90deg,var(--hue0) 50%,var(--hue1) 50%)"), "shared"],
    [swatch("background:var(--page)", dot), "in the prefix cache"],
    [swatch("background:var(--cached);border:1px dashed var(--muted)", dot), "cached and free"],
    [swatch("background:var(--empty);border-style:dashed"), "free"],
    [swatch("background:var(--hue0);outline:2.5px solid var(--copy);outline-offset:-1px"), "copy-on-write, ←from"],
    [swatch("background:var(--hue0)", corner), "evicted, used anew"],
  ]);
}

function tablesLegend() {
  return legendHtml([
    [`<i style="width:18px;height:5px;background:var(--muted)"></i>`, "slots with KV"],
    [`<i style="width:18px;height:5px;background:var(--new)"></i>`, "written in this step"],
    [swatch("background:var(--hue0);outline:2.5px solid var(--copy);outline-offset:-1px"), "copied before writing"],
  ]);
}

// -- the same as tables, for those who hear or copy them ------------------------------------------

function tableHtml(state) {
  const work = new Map(state.work.map((each) => [each.sequence.number, each])), admitted = new Set(state.admitted || []);
  const row = (cells) => `<tr>${cells.map((cell, at) => (at ? `<td>${escaped(cell)}</td>` : `<th scope="row">${escaped(cell)}</th>`)).join("")}</tr>`;
  const head = (names) => `<thead><tr>${names.map((name) => `<th scope="col">${name}</th>`).join("")}</tr></thead>`;
  const sequences = state.sequences.map((s) => row([
    s.id, work.has(s.number) ? doing(work.get(s.number), admitted.has(s.id)) : s.table.length ? "computes nothing" : "waits",
    s.known, s.computed, listing(s.table, 200) || "none",
  ]));
  const blocks = [...state.refCnts.keys()], free = (block) => state.refCnts[block] === 0;
  const kinds = [
    ["In use", blocks.filter((block) => !free(block))],
    ["Shared", blocks.filter((block) => state.refCnts[block] > 1)],
    ["In the prefix cache", blocks.filter((block) => state.cached.has(block))],
    ["Cached and free", blocks.filter((block) => free(block) && state.cached.has(block))],
    ["Free", blocks.filter((block) => free(block) && !state.cached.has(block))],
  ];
  return `<table><caption>Sequences</caption>${head(["Sequence", "In this step", "Tokens known", "Tokens with KV before", "Physical blocks"])}<tbody>${sequences.join("")}</tbody></table>` +
    `<table><caption>Pool</caption>${head(["Blocks", "How many", "Which"])}<tbody>${kinds.map(([name, ids]) => row([name, ids.length, listing(ids, 200) || "none"])).join("")}</tbody></table>`;
}

