"use strict";
// One script for the live page and for a report: pictures of a cache, and on the live page a chat.

const $ = (id) => document.getElementById(id);
const ORDER = ["FP16", "INT8", "INT4", "INT3", "INT2", "EVICTED"];

function color(tier) {
  const styles = getComputedStyle(document.documentElement);
  const base = tier.toLowerCase().replace(/[^a-z0-9].*$/, ""); // a tier like K8V4 has no color of its own
  return styles.getPropertyValue("--" + base).trim() || styles.getPropertyValue("--other").trim();
}

function sorted(names) {
  const place = (name) => (ORDER.includes(name) ? ORDER.indexOf(name) : 2.5);
  return [...new Set(names)].sort((a, b) => place(a) - place(b));
}

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function bytes(n) {
  const units = ["B", "kB", "MB", "GB"];
  let i = 0;
  while (n >= 1000 && i < units.length - 1) { n /= 1000; i += 1; }
  return `${n >= 100 || i === 0 ? n.toFixed(0) : n.toFixed(2)} ${units[i]}`;
}

const round = (n) => (Number.isInteger(n) ? String(n) : n.toFixed(1));

// -- pictures

function prepared(canvas) {
  const scale = window.devicePixelRatio || 1;
  const width = Math.max(1, Math.round(canvas.clientWidth * scale));
  const height = Math.max(1, Math.round(canvas.clientHeight * scale));
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  const pen = canvas.getContext("2d");
  pen.clearRect(0, 0, width, height);
  return [pen, width, height];
}

// A line under a picture says what its width and height are.
function caption(canvas, words) { canvas.nextElementSibling.textContent = words; }

const namesOf = (layers) => `${layers[0].layer} to ${layers[layers.length - 1].layer}`;

// points: [{x, tokens: {tier: count}}], x rising
function drawTokens(canvas, points, label) {
  const [pen, width, height] = prepared(canvas);
  if (!points.length) return;
  const tiers = sorted(points.flatMap((p) => Object.keys(p.tokens)));
  const first = points[0].x, last = points[points.length - 1].x;
  const most = Math.max(1, ...points.map((p) => Object.values(p.tokens).reduce((a, b) => a + b, 0)));
  const x = (v) => (last > first ? ((v - first) / (last - first)) * width : 0);
  const y = (v) => height - (v / most) * height;
  const base = points.map(() => 0);
  for (const tier of tiers) {
    const top = points.map((p, i) => base[i] + (p.tokens[tier] || 0));
    pen.fillStyle = color(tier);
    pen.beginPath();
    pen.moveTo(x(first), y(base[0]));
    top.forEach((v, i) => pen.lineTo(x(points[i].x), y(v)));
    if (last === first) pen.lineTo(width, y(top[0]));
    if (last === first) pen.lineTo(width, y(base[0]));
    for (let i = points.length - 1; i >= 0; i -= 1) pen.lineTo(x(points[i].x), y(base[i]));
    pen.fill();
    top.forEach((v, i) => { base[i] = v; });
  }
  caption(canvas, `${round(first)} to ${round(last)} tokens seen; the height is ${round(most)} tokens`);
  const now = points[points.length - 1].tokens;
  canvas.setAttribute("aria-label",
    `${label}: ${tiers.map((t) => `${round(now[t] || 0)} ${t}`).join(", ")}; at most ${round(most)} tokens`);
}

// map: {length, layers: [{layer, tiers: {tier: [[first, last + 1], ...]}, attention: [0..1, ...]}]}
function drawMap(canvas, map) {
  const [pen, width, height] = prepared(canvas);
  if (!map || !map.layers.length || !map.length) return;
  const tall = height / map.layers.length;
  map.layers.forEach((layer, row) => {
    const top = Math.round(row * tall), bottom = Math.max(top + 1, Math.round((row + 1) * tall) - (tall > 4 ? 1 : 0));
    pen.fillStyle = color("EVICTED");
    pen.fillRect(0, top, width, bottom - top);
    for (const tier of sorted(Object.keys(layer.tiers))) {
      pen.fillStyle = color(tier);
      for (const [start, stop] of layer.tiers[tier]) {
        const left = (start / map.length) * width;
        pen.fillRect(left, top, Math.max(0.5, ((stop - start) / map.length) * width), bottom - top);
      }
    }
    if (layer.attention) { // little attention: toward the background
      const back = getComputedStyle(document.documentElement).getPropertyValue("--panel").trim();
      const wide = width / layer.attention.length;
      pen.fillStyle = back;
      layer.attention.forEach((share, i) => {
        pen.globalAlpha = 0.75 * (1 - Math.sqrt(share));
        pen.fillRect(i * wide, top, wide + 1, bottom - top);
      });
      pen.globalAlpha = 1;
    }
  });
  caption(canvas, `positions 0 to ${map.length - 1}, layers ${namesOf(map.layers)}`);
  canvas.setAttribute("aria-label", `${map.length} positions by ${map.layers.length} layers`);
}

// reads: {length, layers: [{layer, heads, held, read, hits, misses, ranges: [[first, last + 1, heads, fetched], ...]}]}
// where ranges is null if everything was read; map: where the tiers are, as drawMap takes it
function drawReads(canvas, map, reads) {
  const [pen, width, height] = prepared(canvas);
  if (!map || !reads || !reads.layers.length || !map.length) return;
  const tall = height / reads.layers.length;
  reads.layers.forEach((layer, row) => {
    const top = Math.round(row * tall), bottom = Math.max(top + 1, Math.round((row + 1) * tall) - (tall > 4 ? 1 : 0));
    const fill = (start, stop) => {
      const left = (start / map.length) * width, right = (Math.min(stop, map.length) / map.length) * width;
      pen.fillRect(left, top, Math.max(1, right - left), bottom - top);
    };
    pen.fillStyle = color("EVICTED");
    pen.fillRect(0, top, width, bottom - top);
    const held = map.layers.find((one) => one.layer === layer.layer);
    for (const [tier, ranges] of Object.entries(held ? held.tiers : {})) {
      if (tier !== "FP16" && layer.ranges) continue;
      pen.fillStyle = color(tier === "FP16" ? "FP16" : "near");
      for (const [start, stop] of ranges) fill(start, stop);
    }
    for (const [start, stop, heads, fetched] of layer.ranges || []) {
      pen.fillStyle = color(fetched ? "far" : "near");
      pen.globalAlpha = 0.45 + 0.55 * (heads / layer.heads);
      fill(start, stop);
    }
    pen.globalAlpha = 1;
  });
  const words = readsInWords(reads);
  caption(canvas, `${words}.`);
  canvas.setAttribute("aria-label", words);
}

function readsInWords(reads) {
  const mean = (name) => reads.layers.reduce((sum, layer) => sum + layer[name], 0) / reads.layers.length;
  const total = (name) => reads.layers.reduce((sum, layer) => sum + layer[name], 0);
  const hits = total("hits"), misses = total("misses");
  return `At token ${reads.length}, a KV head read ${round(mean("read"))} of ${round(mean("held"))} pages of the middle` +
    (hits + misses ? `; of all chosen pages ${hits} were resident and ${misses} were fetched from the host` : "");
}

function showReads(map, reads) {
  $("reads").hidden = !reads;
  if (!reads) return;
  drawReads($("read-map"), map, reads);
  const far = reads.layers.some((layer) => layer.hits + layer.misses);
  const kinds = [["FP16", "always read"], ["near", far ? "chosen, resident" : "chosen"]];
  if (far) kinds.push(["far", "chosen, fetched from the host"]);
  kinds.push(["EVICTED", "not read"]);
  $("read-legend").replaceChildren(...kinds.map(([tier, words]) => legendItem(tier, words)));
}

function legendItem(tier, words) {
  const item = element("li"), swatch = element("span", undefined, "swatch");
  swatch.style.background = color(tier);
  item.append(swatch, words);
  return item;
}

function showLegend(tokens) {
  const tiers = sorted(Object.keys(tokens)).filter((tier) => tokens[tier]);
  $("legend").replaceChildren(...tiers.map((tier) => legendItem(tier, `${tier} ${round(tokens[tier])}`)));
}

function showBytes(bars) { // [[name, bytes, class]]
  const most = Math.max(1, ...bars.map((bar) => bar[1]));
  $("bytes").replaceChildren(...bars.map(([name, n, className]) => {
    const bar = element("div", undefined, "bar " + (className || "")), line = element("i");
    line.style.width = `${(60 * n) / most}%`;
    bar.append(element("span", name), line, element("span", bytes(n)));
    return bar;
  }));
}

function showNumbers(pairs) {
  $("numbers").replaceChildren(...pairs.map(([name, value]) => {
    const box = element("div");
    box.append(element("dt", name), element("dd", value));
    return box;
  }));
}

function describe(event) {
  if (event.event === "note") return event.text;
  const layers = event.layers ? ` in ${event.layers} layers` : "";
  if (event.event === "recompilation") return "a graph was compiled";
  if (event.event === "selection") {
    const pages = event.hits + event.misses;
    return `until token ${event.seen}, a query read ${round(event.tokens / event.queries)} tokens of the middle` +
      (pages ? `, and ${Math.round((100 * event.misses) / pages)} % of its pages were fetched` : "");
  }
  const into = event.into ? ` into ${event.into}` : "";
  const tokens = event.tokens ? `: ${event.tokens} tokens` : "";
  return `${event.event}${into}${layers}${tokens}${event.seen ? `, at ${event.seen}` : ""}`;
}

function addEvents(events) {
  const list = $("events");
  const below = list.scrollTop + list.clientHeight >= list.scrollHeight - 8;
  for (const event of events) {
    const last = list.lastChild && list.lastChild.event; // layers may tell of one event in two frames
    if (last && event.layers && ["event", "seen", "into"].every((name) => last[name] === event[name])) {
      for (const name of ["layers", "queries", "hits", "misses"]) if (last[name]) event[name] += last[name];
      if (event.event === "selection") event.tokens += last.tokens;
      list.lastChild.remove();
    }
    const item = element("li", describe(event));
    item.event = event;
    list.append(item);
  }
  while (list.children.length > 200) list.firstChild.remove();
  if (below) list.scrollTop = list.scrollHeight;
}

// -- a report

function report(data) {
  const draw = () => {
    drawTokens($("tokens"), data.points, "Tokens of a layer");
    drawMap($("map"), data.map);
    showReads(data.map, data.reads);
    if (data.points.length) showLegend(data.points[data.points.length - 1].tokens);
  };
  $("map-note").textContent = data.map_note;
  showNumbers(data.numbers);
  showBytes(data.bytes);
  draw();
  addEvents(data.events);
  addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

// -- the live page

const live = { points: [], map: null, request: null, totals: {}, state: null, reads: null };

function headers() {
  const given = { "Content-Type": "application/json" };
  if ($("key").value) given.Authorization = `Bearer ${$("key").value}`;
  return given;
}

async function* events(response) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += decoder.decode(value, { stream: true });
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const line = text.slice(0, end);
      if (line.startsWith("data: ")) yield line.slice(6);
    }
  }
}

function draw() {
  drawTokens($("tokens"), live.points, "Tokens of a layer");
  drawMap($("map"), live.map);
  showReads(live.map, live.reads);
}

function showState() {
  const s = live.state, t = live.totals, asked = (t.hits || 0) + (t.misses || 0);
  const numbers = [["Tokens a second", s && s.tokens_per_s ? s.tokens_per_s.toFixed(1) : "–"]];
  if (s) numbers.push(["Tokens seen", String(s.length)], ["From kept caches", `${s.cached} of ${s.prompt}`]);
  numbers.push(["Prefix hits", asked ? `${t.hits} of ${asked}` : "–"]);
  numbers.push(["Waiting / active", `${t.waiting_requests || 0} / ${t.active_requests || 0}`]);
  numbers.push(["Kept caches", `${t.kept_caches || 0}, ${bytes(t.kept_bytes || 0)}`]);
  showNumbers(numbers);
  if (!s) return;
  showLegend(s.tokens);
  const bars = [["this cache", s.allocated], ["uncompressed", s.dense, "dense"]];
  if (s.host) bars.splice(1, 0, ["in host memory", s.host]);
  showBytes(bars);
}

function frame(data) {
  if (data.type === "totals") { live.totals = data; showState(); return; }
  if (data.request !== live.request || (live.points.length && data.length < live.points[live.points.length - 1].x)) {
    live.points = [];
    live.request = data.request;
  }
  live.state = data;
  live.points.push({ x: data.length, tokens: data.tokens });
  if (live.points.length > 600) live.points = live.points.filter((_, i) => i % 2 === 0);
  if (data.map) {
    live.map = data.map;
    live.reads = data.reads || null;
    $("bright").hidden = !data.map.layers.some((layer) => layer.attention);
  }
  showState();
  draw();
  addEvents(data.events);
}

async function watch() {
  for (;;) {
    try {
      const response = await fetch("/view", { headers: headers() });
      if (response.status === 401) {
        $("key-box").hidden = false;
        $("link").textContent = "an API key is needed";
      } else if (response.ok) {
        $("link").textContent = "connected";
        for await (const data of events(response)) frame(JSON.parse(data));
      }
    } catch (error) { /* the server is away: try again */ }
    if ($("link").textContent === "connected") $("link").textContent = "connecting";
    await new Promise((done) => { setTimeout(done, 1000); });
  }
}

const chat = { messages: [], abort: null };

function say(role, text) {
  const talk = $("talk"), box = element("div", undefined, `message ${role}`), words = element("span", text);
  box.append(element("small", role === "user" ? "You" : role === "error" ? "Error" : "Model"), words);
  talk.append(box);
  talk.scrollTop = talk.scrollHeight;
  return words;
}

async function send() {
  const text = $("prompt").value.trim();
  if (!text || chat.abort) return;
  $("prompt").value = "";
  chat.messages.push({ role: "user", content: text });
  say("user", text);
  const words = say("assistant", "");
  chat.abort = new AbortController();
  $("stop").disabled = false;
  $("send").disabled = true;
  let answer = "";
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), signal: chat.abort.signal,
      body: JSON.stringify({
        messages: chat.messages, stream: true, user: "page",
        temperature: Number($("temperature").value), max_tokens: Number($("most").value),
      }),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const part = JSON.parse(data);
      if (part.error) throw new Error(part.error.message);
      answer += (part.choices[0] && part.choices[0].delta.content) || "";
      words.textContent = answer;
      $("talk").scrollTop = $("talk").scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") say("error", error.message);
  }
  if (answer) chat.messages.push({ role: "assistant", content: answer });
  else { chat.messages.pop(); words.parentNode.remove(); }
  chat.abort = null;
  const lost = [$("stop"), document.body].includes(document.activeElement); // a disabled button has no focus
  $("stop").disabled = true;
  $("send").disabled = false;
  if (lost) $("prompt").focus();
}

async function start() {
  $("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  $("stop").addEventListener("click", () => { if (chat.abort) chat.abort.abort(); });
  $("new").addEventListener("click", () => {
    if (chat.abort) chat.abort.abort();
    chat.messages = [];
    $("talk").replaceChildren();
    $("prompt").focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && chat.abort) chat.abort.abort();
  });
  addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { draw(); showState(); });
  showState();
  watch();
  try {
    const models = await (await fetch("/v1/models", { headers: headers() })).json();
    $("model").textContent = models.data.map((model) => model.id).join(", ");
  } catch (error) { $("model").textContent = ""; }
}

if ($("report")) report(JSON.parse($("report").textContent));
else start();
