"use strict";
// The page: one number, the step that is shown, and everything that follows from it.

(function () {
  const byId = (id) => document.getElementById(id);
  const trace = JSON.parse(byId("trace").textContent);
  const steps = new Steps(trace);
  const numBlocks = trace.about.num_blocks;
  const drawnBlocks = numBlocks <= DETAILED ? numBlocks : Math.min(steps.highest + 1, MOST_CELLS);
  let shown = 0, timer = null;

  // -- what is shown -----------------------------------------------------------------------------

  function show(index) {
    shown = Math.min(Math.max(index, 0), steps.length);
    const state = steps.at(shown), isEnd = shown === steps.length;
    const name = isEnd ? "The end" : `Step ${shown.toLocaleString("en-US")}`;
    byId("slider").value = shown;
    byId("where").textContent = isEnd ? `End of ${steps.length.toLocaleString("en-US")}` : `${name} of ${(steps.length - 1).toLocaleString("en-US")}`;
    const lines = isEnd ? ["nothing more was recorded"] : events(state);
    const said = `${name}: ${summary(state)}. ${lines.join(". ")}.`;
    byId("slider").setAttribute("aria-valuetext", `${name} of ${steps.length - 1}`);
    if (timer === null) byId("live").textContent = said;
    byId("tables").innerHTML = tablesHtml(state);
    byId("pool").innerHTML = poolHtml(state, drawnBlocks);
    byId("pool").setAttribute("aria-label", summary(state));
    byId("pool-note").textContent = summary(state) + poolRest();
    byId("events").innerHTML = lines.map((line) => `<li class="${markOf(line)}">${escaped(line)}</li>`).join("");
    if (byId("as-table").open) byId("table").innerHTML = tableHtml(state);
    drawTimeline();
    moveCursor();
    if (location.hash !== `#${shown}`) history.replaceState(null, "", `#${shown}`);
  }

  function poolRest() {
    return drawnBlocks < numBlocks ? `. Blocks from ${drawnBlocks} on are ${drawnBlocks > steps.highest ? "never used" : "not drawn"}.` : ".";
  }

  function markOf(line) {
    if (line.includes("is preempted") || line.startsWith("evicted")) return "alarm";
    return line.startsWith("copy-on-write") ? "copy" : "";
  }

  function drawTimeline() {
    if (!steps.length) return;
    const width = byId("timeline").clientWidth, narrow = width < 560;
    const columns = Math.max(1, Math.min(steps.length, Math.floor((width - (narrow ? 96 : 150)) / (narrow ? 24 : 26))));
    const now = Math.min(shown, steps.length - 1);
    const start = Math.min(Math.max(now - Math.floor(columns / 2), 0), steps.length - columns);
    byId("timeline").innerHTML = timelineSvg(steps.range(start, start + columns), shown, width);
  }

  // -- the overview: tokens of each step above, blocks below ----------------------------------------

  const canvas = byId("overview");

  function drawOverview() {
    const width = canvas.clientWidth, height = 88, scale = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    context.scale(scale, scale);
    context.clearRect(0, 0, width, height);
    const count = steps.length, columns = Math.min(width, Math.max(count, 1)), each = width / columns;
    const most = Math.max(1, ...maxima(columns));
    for (let column = 0; column < columns; column += 1) {
      const from = Math.floor((column * count) / columns), to = Math.max(from + 1, Math.floor(((column + 1) * count) / columns));
      const group = steps.totals.slice(from, to);
      const x = column * each, wide = Math.max(each - (each > 3 ? 1 : 0), 1);
      const top = group.reduce((a, b) => (a[0] + a[1] + a[2] >= b[0] + b[1] + b[2] ? a : b), [0, 0, 0]);
      let y = 44;
      ["prefill", "decode", "speculative"].forEach((kind, at) => {
        const size = (top[at] * 42) / most;
        context.fillStyle = colour(kind);
        context.fillRect(x, y - size, wide, size);
        y -= size;
      });
      const used = Math.max(0, ...group.map((total) => total[3])), cached = Math.max(0, ...group.map((total) => total[4]));
      const high = (blocks) => (blocks * 36) / numBlocks;
      context.fillStyle = colour("empty");
      context.fillRect(x, 50, wide, 36);
      context.fillStyle = colour("used");
      context.fillRect(x, 86 - high(used), wide, high(used));
      context.fillStyle = colour("cached");
      context.fillRect(x, 86 - high(Math.min(used + cached, numBlocks)), wide, high(Math.min(cached, numBlocks - used)));
    }
    context.strokeStyle = colour("line");
    context.strokeRect(0.5, 50.5, width - 1, 36);
  }

  function maxima(columns) {
    const found = new Array(columns).fill(0);
    steps.totals.forEach((total, index) => {
      const column = Math.floor((index * columns) / steps.length);
      found[column] = Math.max(found[column], total[0] + total[1] + total[2]);
    });
    return found;
  }

  function moveCursor() {
    byId("cursor").style.left = `${(100 * (Math.min(shown, steps.length - 1) + 0.5)) / Math.max(steps.length, 1)}%`;
  }

  // -- controls ----------------------------------------------------------------------------------

  function go(index) {
    pause();
    show(index);
  }

  function pause() {
    if (timer === null) return;
    clearInterval(timer);
    timer = null;
    setPlay(false);
    show(shown); // tells it to those who listen
  }

  function toggle() {
    if (timer !== null) return pause();
    if (shown === steps.length) show(0);
    setPlay(true);
    timer = setInterval(() => {
      if (shown >= steps.length) pause();
      else show(shown + 1);
    }, 1000 / Number(byId("speed").value));
  }

  function setPlay(plays) {
    byId("play").setAttribute("aria-pressed", String(plays));
    byId("play").setAttribute("aria-label", plays ? "Pause" : "Play");
    byId("play-text").textContent = plays ? "Pause" : "Play";
    byId("play-icon").setAttribute("d", plays ? "M4 2h3v12H4zM9 2h3v12H9z" : "M4 2l9 6-9 6z");
  }

  const KEYS = {
    ArrowLeft: (event) => shown - (event.shiftKey ? 10 : 1), ArrowRight: (event) => shown + (event.shiftKey ? 10 : 1),
    PageUp: () => shown - 100, PageDown: () => shown + 100, Home: () => 0, End: () => steps.length,
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "SELECT") return;
    if (event.key === " ") {
      if (["BUTTON", "SUMMARY"].includes(event.target.tagName)) return; // Space presses those
      event.preventDefault();
      toggle();
    } else if (KEYS[event.key]) {
      event.preventDefault();
      go(KEYS[event.key](event));
    }
  });
  const buttons = { first: () => go(0), back: () => go(shown - 1), play: toggle, forward: () => go(shown + 1), last: () => go(steps.length) };
  for (const [id, action] of Object.entries(buttons)) byId(id).addEventListener("click", action);
  byId("slider").addEventListener("input", (event) => go(Number(event.target.value)));
  byId("speed").addEventListener("change", () => { if (timer !== null) { pause(); toggle(); } });
  byId("as-table").addEventListener("toggle", () => show(shown));
  canvas.addEventListener("click", (event) => go(Math.floor((event.offsetX * steps.length) / canvas.clientWidth)));
  byId("timeline").addEventListener("click", (event) => {
    if (event.target.dataset.step !== undefined) go(Number(event.target.dataset.step));
  });
  window.addEventListener("hashchange", () => go(Number(location.hash.slice(1)) || 0));
  const redraw = () => { drawOverview(); show(shown); };
  window.addEventListener("resize", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  // -- at first ----------------------------------------------------------------------------------

  const about = trace.about;
  byId("about").textContent = [
    about.device && `on ${about.device}`, amount(steps.length, "step"), amount(trace.sequences.length, "sequence"),
    `${amount(numBlocks, "block")} of ${amount(about.block_size, "token")}`,
    about.max_num_batched_tokens && `at most ${amount(about.max_num_batched_tokens, "token")} a step`, about.policy && `policy ${about.policy}`,
  ].filter(Boolean).join(" · ");
  byId("slider").max = steps.length;
  byId("pool").className = drawnBlocks > DETAILED ? "small" : "";
  byId("tables-note").textContent = `In each cell the physical block that holds the KV of ${amount(about.block_size, "token")}.`;
  byId("overview-legend").innerHTML = legendHtml([
    [swatch("background:var(--prefill)"), "prompt tokens of a step"], [swatch("background:var(--decode)"), "decoded tokens"],
    [swatch("background:var(--used)"), "blocks in use"], [swatch("background:var(--cached)"), "cached and free"],
    [swatch("background:var(--alarm);width:3px;border:0"), "the step shown"],
  ]);
  byId("timeline-legend").innerHTML = timelineLegend();
  byId("pool-legend").innerHTML = poolLegend();
  byId("tables-legend").innerHTML = tablesLegend();
  setPlay(false);
  drawOverview();
  show(Number(location.hash.slice(1)) || 0);
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
})();
