"use strict";
// From what a trace holds, changes, to what is shown, states. The same as minipaged/view/replay.py and words.py,
// with which tests/view/test_page.py compares it.

class Replay {
  constructor(trace) {
    const { about, sequences, start } = trace;
    Object.assign(this, { blockSize: about.block_size, sequences, lastRun: [] });
    this.refCnts = new Int32Array(about.num_blocks);
    this.cached = new Set(start.cached || []);
    this.alive = new Map(); // number: how often it was preempted
    this.tables = new Map();
    this.known = new Map();
    this.computed = new Map();
    for (const [block, count] of start.ref_cnts || []) this.refCnts[block] = count;
    this.apply(start);
    for (const [number, count] of start.computed || []) this.computed.set(number, count);
  }

  copy() {
    const twin = Object.create(Replay.prototype);
    Object.assign(twin, this, { refCnts: this.refCnts.slice(), cached: new Set(this.cached) });
    for (const name of ["alive", "tables", "known", "computed"]) twin[name] = new Map(this[name]);
    return twin; // tables are replaced, never changed, so they may be shared
  }

  apply(record) {
    for (const number of record.new || []) {
      this.alive.set(number, 0);
      this.known.set(number, this.sequences[number][2]);
      this.computed.set(number, 0);
    }
    for (const number of record.preempt || []) {
      this.alive.set(number, this.alive.get(number) + 1);
      this.tables.delete(number);
      this.computed.set(number, 0);
    }
    for (const kind of ["finish", "abort"])
      for (const number of record[kind] || [])
        for (const name of ["tables", "alive", "known", "computed"]) this[name].delete(number);
    for (const [number, count] of record.admit || []) this.known.set(number, count);
    for (const [number, keep, blocks] of record.tables || [])
      this.tables.set(number, (this.tables.get(number) || []).slice(0, keep).concat(blocks));
    if (record.blocks) this.change(record.blocks);
  }

  change(blocks) {
    for (const [kind, sign] of [["allocate", 1], ["share", 1], ["free", -1]])
      for (const block of blocks[kind] || []) this.refCnts[block] += sign;
    const early = []; // evicted before what was published: a block may come and go several times
    for (const block of blocks.evict || []) if (!this.cached.delete(block)) early.push(block);
    for (const block of blocks.publish || []) {
      const at = early.indexOf(block);
      if (at >= 0) early.splice(at, 1);
      else this.cached.add(block);
    }
  }

  runOf(record) {
    if (!record.run) return this.lastRun.map((number) => [number, 1, this.computed.get(number), 0]);
    return record.run.map(([number, length, start, guesses]) => [number, length, start, guesses || 0]);
  }

  skip(record) {
    this.apply(record);
    const run = this.runOf(record);
    this.advance(run, record);
    return run;
  }

  advance(run, record) {
    const after = record.after || {};
    const accepted = new Map(after.accepted || []);
    for (const [number, length, start, guesses] of run) {
      const end = start + length - guesses + (accepted.get(number) || 0), known = this.known.get(number);
      this.known.set(number, Math.max(known, end + (end >= known ? 1 : 0)));
      this.computed.set(number, end);
    }
    this.lastRun = run.map(([number]) => number);
    this.apply(after);
    for (const number of after.new || []) {
      const parent = this.parent(number);
      if (this.tables.has(number) && this.computed.has(parent)) this.computed.set(number, this.computed.get(parent));
    }
  }

  state() {
    const sequences = [...this.alive].map(([number, preemptions]) => ({
      number, preemptions, scheduled: 0,
      id: this.name(number), prompt: this.sequences[number][1], known: this.known.get(number),
      computed: this.computed.get(number), table: this.tables.get(number) || [],
    }));
    const { blockSize } = this;
    return { blockSize, sequences, refCnts: this.refCnts.slice(), cached: new Set(this.cached), ...this.counts() };
  }

  counts() {
    let used = 0, shared = 0, cachedFree = 0;
    for (const count of this.refCnts) { used += count > 0; shared += count > 1; }
    for (const block of this.cached) cachedFree += this.refCnts[block] === 0;
    return { used, shared, cachedFree, free: this.refCnts.length - used - cachedFree };
  }

  step(index, record) {
    const before = new Set(this.tables.keys());
    this.apply(record);
    const run = this.runOf(record);
    for (const [number, length, start, guesses] of run) {
      this.computed.set(number, start);
      this.known.set(number, Math.max(this.known.get(number), start + length - guesses));
    }
    const after = record.after || {}, blocks = record.blocks || {};
    const names = (key) => [...(record[key] || []), ...(after[key] || [])].map((number) => this.name(number));
    const allocated = new Set(blocks.allocate || []);
    const step = {
      ...this.state(), index, isStep: true, time: record.t / 1e6, seconds: record.us.map((part) => part / 1e6),
      arrived: (record.new || []).filter((n) => this.parent(n) === undefined).map((n) => this.name(n)),
      preempted: (record.preempt || []).map((number) => this.name(number)),
      finished: names("finish"), aborted: names("abort"),
      forked: [...(record.new || []), ...(after.new || [])].filter((n) => this.parent(n) !== undefined)
        .map((n) => [this.name(this.parent(n)), this.name(n)]),
      copies: record.copies || [], swappedOut: record.swap_out || [],
      swappedIn: (record.swap_in || []).map(([host, block]) => [block, host]),
      evicted: (blocks.evict || []).filter((block) => allocated.has(block)),
      published: (after.blocks || {}).publish || [],
    };
    const admitted = new Set((record.admit || []).map(([number]) => number).filter((number) => !before.has(number)));
    step.admitted = [...admitted].map((number) => this.name(number));
    step.work = workOf(step, run, admitted, new Map(after.accepted || []));
    this.advance(run, record);
    return step;
  }

  name(number) { return this.sequences[number][0]; }
  parent(number) { return this.sequences[number][3]; }
}

function workOf(step, run, admitted, accepted) {
  const byNumber = new Map(step.sequences.map((sequence) => [sequence.number, sequence]));
  const swappedIn = new Set(step.swappedIn.map(([block]) => block));
  return run.map(([number, length, start, guesses]) => {
    const sequence = byNumber.get(number);
    sequence.scheduled = length;
    const decodes = length - guesses === 1 && start >= sequence.prompt && start + 1 === sequence.known;
    const work = { sequence, kind: decodes ? "decode" : "prefill", tokens: length, start, guesses, accepted: accepted.get(number) || 0, cached: 0, swapped: 0 };
    if (admitted.has(number)) {
      const count = sequence.table.findIndex((block) => swappedIn.has(block));
      work.cached = count < 0 ? start : count * step.blockSize;
      work.swapped = start - work.cached;
    }
    return work;
  });
}

// -- words ---------------------------------------------------------------------------------------

function amount(number, noun) {
  if (number === 1) return `1 ${noun}`;
  return `${number.toLocaleString("en-US")} ${noun}${noun.endsWith("s") ? "es" : "s"}`;
}

function listing(items, limit = 12) {
  const parts = [];
  for (let at = 0; at < items.length; ) {
    let end = at;
    while (Number.isInteger(items[at]) && items[end + 1] === items[end] + 1) end += 1;
    if (end - at > 1) parts.push(`${items[at]}-${items[end]}`);
    else parts.push(...items.slice(at, end + 1).map(String));
    at = end + 1;
  }
  if (parts.length > limit) return `${parts.slice(0, limit).join(", ")} and ${parts.length - limit} more`;
  return parts.join(", ");
}

function summary(state) {
  const shared = state.shared ? `, ${state.shared} of them shared` : "";
  const cached = state.cachedFree ? `${state.cachedFree} cached and free, ` : "";
  return `${state.used} of ${amount(state.refCnts.length, "block")} in use${shared}; ${cached}${state.free} free`;
}

function events(step) {
  const admitted = new Set(step.admitted);
  const isPlain = (work) => work.kind === "decode" && !work.guesses && !admitted.has(work.sequence.id);
  const plain = step.work.filter(isPlain).map((work) => work.sequence.id);
  const lines = step.arrived.map((name) => `${name} arrives`);
  lines.push(...step.preempted.map((name) => `${name} is preempted: its blocks are taken`));
  if (step.swappedOut.length) lines.push(`swapped out to host memory: blocks ${listing(step.swappedOut.map(([block]) => block))}`);
  lines.push(...step.work.filter((work) => !isPlain(work)).map((work) => inWords(work, admitted.has(work.sequence.id))));
  if (plain.length) lines.push(`${listing(plain)} ${plain.length > 1 ? "decode 1 token each" : "decodes 1 token"}`);
  lines.push(...step.copies.map(([source, target]) => `copy-on-write: block ${source} is copied to block ${target}`));
  if (step.evicted.length) lines.push(`evicted from the prefix cache for new tokens: blocks ${listing(step.evicted)}`);
  if (step.published.length) lines.push(`new in the prefix cache: blocks ${listing(step.published)}`);
  lines.push(...step.forked.map(([parent, child]) => `${child} is forked from ${parent}`));
  lines.push(...step.finished.map((name) => `${name} finishes: its blocks are given back`));
  lines.push(...step.aborted.map((name) => `${name} is dropped`));
  return lines.length ? lines : ["nothing to compute"];
}

function doing(work, admitted) {
  const parts = admitted ? ["is admitted"] : [];
  if (work.cached) parts.push(`takes ${amount(work.cached, "token")} from the prefix cache`);
  if (work.swapped) parts.push(`gets ${amount(work.swapped, "token")} back from host memory`);
  const known = work.tokens - work.guesses, noun = work.start + known <= work.sequence.prompt ? "prompt token" : "token";
  parts.push(work.kind === "prefill" ? `computes ${amount(known, noun)}` : "decodes 1 token");
  if (work.guesses) parts.push(`verifies ${amount(work.guesses, "guess")}, ${work.accepted} right`);
  return parts.join(", ");
}

function inWords(work, admitted) {
  return `${work.sequence.id} ${doing(work, admitted)}`;
}

// -- any step, quickly ---------------------------------------------------------------------------

class Steps {
  // Goes through all steps once; keeps what the overview shows of each, and a state every so often.
  constructor(trace, every = 128) {
    this.trace = trace;
    this.every = every;
    this.checkpoints = [];
    this.length = trace.steps.length;
    this.totals = []; // of each step: tokens of prompts, decoded, guessed; blocks in use, cached and free
    this.highest = -1; // block that is ever used
    const replay = new Replay(trace);
    const count = { used: 0, cachedFree: 0 };
    Object.assign(count, replay.counts());
    trace.steps.forEach((record, index) => {
      if (index % every === 0) this.checkpoints.push(replay.copy());
      replay.apply(record);
      const run = replay.runOf(record);
      if (record.blocks) Object.assign(count, replay.counts());
      const total = [0, 0, 0, count.used, count.cachedFree];
      for (const [number, length, start, guesses] of run) {
        const decodes = length - guesses === 1 && start >= trace.sequences[number][1];
        total[decodes ? 1 : 0] += length - guesses;
        total[2] += guesses;
      }
      this.totals.push(total);
      for (const block of (record.blocks || {}).allocate || []) this.highest = Math.max(this.highest, block);
      replay.advance(run, record);
      if (record.after && record.after.blocks) Object.assign(count, replay.counts());
    });
    replay.apply(trace.end);
    this.end = { ...replay.state(), index: this.length, isStep: false, work: [] };
    replay.refCnts.forEach((held, block) => { if (held) this.highest = Math.max(this.highest, block); });
    for (const block of replay.cached) this.highest = Math.max(this.highest, block);
    new Replay(trace).refCnts.forEach((held, block) => { if (held) this.highest = Math.max(this.highest, block); });
  }

  range(start, stop) {
    const replay = this.checkpoints[Math.floor(start / this.every)].copy(), found = [];
    for (let index = start - (start % this.every); index < stop; index += 1) {
      if (index < start) replay.skip(this.trace.steps[index]);
      else found.push(replay.step(index, this.trace.steps[index]));
    }
    return found;
  }

  at(index) {
    return index === this.length ? this.end : this.range(index, index + 1)[0];
  }
}

if (typeof module !== "undefined") module.exports = { Replay, Steps, events, summary, doing, listing, amount };
