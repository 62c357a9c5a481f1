// The demo page: sends prompts, follows its jobs, plays their clips. The API is demo.py's.
// Paths are relative to the page, so that it also works below a proxy's prefix.

const POLL_MS = 200;
const RETRY_MS = 2000; // while the server is away, or the page is hidden
const SEGMENTS = 16; // more steps than this make a plain bar
const CRISP_BELOW = 400; // narrower clips are enlarged, so their pixels are shown as squares
const STORE = "fewstep-jobs";
const PLAIN = ["prompt", "seed", "sample"]; // fields with a place of their own, or with none
const TERMINAL = ["done", "failed", "cancelled"];
const stillness = matchMedia("(prefers-reduced-motion: reduce)");

const $ = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((wake) => setTimeout(wake, ms));
const videoPath = (job) => `api/jobs/${job.id}/video`;
const finished = (job) => TERMINAL.includes(job.state);

const jobs = new Map(); // this session's, oldest first
const cards = new Map(); // job id -> list item
const fields = new Map(); // name of any other field that this model takes -> { input, schema }
let shown = null; // id of the job on the stage

// A JSON reply, or an Error whose message may be shown and whose `status` is 0 if nobody answered.
async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options });
  } catch {
    throw Object.assign(new Error("The server does not answer. Is it still running?"), { status: 0 });
  }
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  const message = body.error ?? `The server answered with status ${response.status}.`;
  throw Object.assign(new Error(message), { status: response.status });
}

function complain(text) {
  const named = text.split("\n").map((line) => line.split(":")[0]);
  const inputs = { prompt: $("prompt"), seed: $("seed") };
  for (const [name, { input }] of fields) inputs[name] = input;
  $("problem").textContent = text;
  for (const [name, input] of Object.entries(inputs)) {
    input.setAttribute("aria-invalid", String(named.includes(name)));
  }
  const first = inputs[named.find((name) => name in inputs)];
  if (first?.closest("details")) first.closest("details").open = true;
  first?.focus();
}

async function submit(wanted) {
  complain("");
  $("generate").disabled = true; // one click, one clip
  try {
    const job = await call("api/jobs", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(wanted),
    });
    history.replaceState(null, "", `?${new URLSearchParams(asWords(wanted))}`);
    put(job);
    remember();
    show(job.id);
    follow(job.id);
  } catch (error) {
    complain(error.message);
  } finally {
    $("generate").disabled = false;
  }
}

// Ask for a job's news until it has ended; a server that is away for a while is asked again.
async function follow(id) {
  while (!finished(jobs.get(id))) {
    try {
      put(await call(`api/jobs/${id}`));
      await sleep(document.hidden ? RETRY_MS : POLL_MS);
    } catch (error) {
      if (error.status === 404) return put({ ...jobs.get(id), state: "failed", error: error.message });
      put({ ...jobs.get(id), trouble: error.message });
      await sleep(RETRY_MS);
    }
  }
}

async function cancel(id) {
  try {
    put(await call(`api/jobs/${id}`, { method: "DELETE" }));
  } catch (error) {
    if (error.status !== 409) complain(error.message); // 409: it has just ended by itself
  }
}

// Take a job's news into the page.
function put(job) {
  const before = jobs.get(job.id);
  jobs.set(job.id, job);
  if (job.state !== before?.state) {
    renderCard(job);
    $("announcer").textContent = `${job.prompt}: ${job.state}`;
  }
  if (job.id === shown) renderStage(job);
}

function show(id) {
  shown = id;
  for (const [other, card] of cards) {
    card.firstChild.setAttribute("aria-current", String(other === id));
  }
  renderStage(jobs.get(id));
}

function headline(job) {
  if (job.trouble) return job.trouble;
  if (job.state === "queued") {
    return job.position ? `Waiting for ${job.position} other${job.position > 1 ? "s" : ""}` : "Next";
  }
  if (!job.step) return "Starting";
  if (job.stage === "decode" && job.fraction < 1) {
    return `Decoding \u00b7 ${Math.round(100 * job.fraction)} %`;
  }
  if (job.step === job.steps) return "Making the video file";
  return `Step ${job.step} of ${job.steps} \u00b7 ${job.seconds.toFixed(1)} s`;
}

function renderStage(job) {
  const ended = finished(job);
  $("stage").dataset.state = job.state;
  $("work").hidden = ended;
  $("message").hidden = !ended || job.state === "done";
  $("message").textContent = job.state === "cancelled" ? "Cancelled." : job.error ?? "";
  $("progress").textContent = headline(job);
  renderBar(job);
  renderVideo(job);
  $("caption").hidden = false;
  $("shown-prompt").textContent = job.prompt;
  renderFacts(job);
  for (const id of ["download", "pause"]) $(id).hidden = job.state !== "done";
  $("download").href = `${videoPath(job)}?download=1`;
}

function renderBar({ step, steps }) {
  const bar = $("bar");
  const total = steps || 1;
  const apart = total > 1 && total <= SEGMENTS;
  bar.classList.toggle("segments", apart);
  $("pulse").hidden = !apart;
  bar.style.setProperty("--steps", total);
  bar.setAttribute("aria-valuemax", total);
  bar.setAttribute("aria-valuenow", step);
  $("fill").style.width = `${(100 * step) / total}%`;
  $("pulse").style.left = `${(100 * step) / total}%`;
  $("pulse").style.width = `${100 / total}%`;
}

function renderVideo(job) {
  const video = $("video");
  video.hidden = job.state !== "done";
  if (video.hidden) {
    video.removeAttribute("src");
    video.load();
  } else if (video.getAttribute("src") !== videoPath(job)) {
    video.autoplay = !stillness.matches;
    $("pause").textContent = video.autoplay ? "Pause" : "Play";
    video.src = videoPath(job);
    video.setAttribute("aria-label", job.prompt);
  }
}

function renderFacts(job) {
  const video = $("video");
  const words = [`seed ${job.seed}`];
  if (job.state === "done") {
    words.push(`${job.steps} steps`, `${job.seconds.toFixed(1)} s`);
    if (video.videoWidth) words.push(`${video.videoWidth}\u00a0\u00d7\u00a0${video.videoHeight}`);
  }
  $("shown-facts").textContent = words.join(" \u00b7 ");
}

function renderCard(job) {
  const card = cards.get(job.id) ?? document.createElement("li");
  if (!cards.has(job.id)) {
    cards.set(job.id, card);
    $("cards").prepend(card);
    $("history").hidden = false;
  }
  const button = element("button", { type: "button" });
  button.setAttribute("aria-current", String(job.id === shown));
  button.addEventListener("click", () => show(job.id));
  const thumb = element("span", { className: "thumb" });
  if (job.state === "done") thumb.append(thumbnail(job, button));
  else thumb.textContent = job.state[0].toUpperCase() + job.state.slice(1);
  const words = element("span", { className: "words" });
  words.append(
    element("span", { textContent: job.prompt }),
    element("span", { textContent: `seed ${job.seed}` }),
  );
  button.append(thumb, words);
  const focused = card.contains(document.activeElement);
  card.replaceChildren(button);
  if (focused) button.focus();
}

// A still that moves while it is pointed at.
function thumbnail(job, button) {
  const video = element("video", { preload: "metadata", loop: true, muted: true, playsInline: true });
  video.src = videoPath(job);
  video.tabIndex = -1;
  video.setAttribute("aria-hidden", "true");
  video.addEventListener("loadedmetadata", crisp);
  const play = () => stillness.matches || video.play().catch(() => {});
  for (const name of ["pointerenter", "focus"]) button.addEventListener(name, play);
  for (const name of ["pointerleave", "blur"]) button.addEventListener(name, () => video.pause());
  return video;
}

function crisp({ currentTarget: video }) {
  video.classList.toggle("crisp", video.videoWidth < CRISP_BELOW);
}

function element(name, properties) {
  return Object.assign(document.createElement(name), properties);
}

function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

// What the form asks for. An empty field is the model's own value, and is not sent.
function wanted() {
  const body = { prompt: $("prompt").value, seed: seedValue() };
  for (const [name, { input, schema }] of fields) {
    if (input.value !== "") body[name] = fieldValue(input.value, schema);
  }
  return body;
}

// What is not of the field's type goes to the server as it is, which says so.
function fieldValue(text, { type }) {
  const size = /^\s*(\d+)\s*[x*\u00d7]\s*(\d+)\s*$/.exec(text);
  if (type === "array") return size ? [Number(size[1]), Number(size[2])] : text;
  if (type === "string" || Number.isNaN(Number(text))) return text;
  return Number(text);
}

function asWords(body) {
  const words = Object.entries(body).map(([name, value]) => [name, word(value)]);
  return Object.fromEntries(words);
}

function word(value) {
  return Array.isArray(value) ? value.join("x") : String(value);
}

// An input for each field that this model takes beside prompt and seed.
function makeFields({ properties }) {
  for (const [name, schema] of Object.entries(properties)) {
    if (PLAIN.includes(name)) continue;
    const id = `field-${name}`;
    const label = element("label", { htmlFor: id, textContent: name.replaceAll("_", " ") });
    const usual = "default" in schema ? word(schema.default) : "";
    const input = element("input", { id, placeholder: usual, title: schema.description });
    label.title = schema.description;
    $("fields").append(label, input);
    fields.set(name, { input, schema });
  }
  $("options").hidden = !fields.size;
}

function fill(words) {
  for (const [name, { input }] of fields) {
    input.value = words[name] ?? "";
    if (input.value) $("options").open = true;
  }
}

// The seed field as a number; what is no number goes to the server as it is, which says so.
function seedValue() {
  const { valueAsNumber } = $("seed");
  return Number.isNaN(valueAsNumber) ? $("seed").value : valueAsNumber;
}

function remember() {
  try {
    sessionStorage.setItem(STORE, JSON.stringify([...jobs.keys()]));
  } catch {
    // Without storage a reload forgets the clips, no more.
  }
}

// After a reload: this tab's jobs that the server still has.
async function recall() {
  let ids = [];
  try {
    ids = JSON.parse(sessionStorage.getItem(STORE)) ?? [];
  } catch {
    return;
  }
  for (const id of ids) {
    const job = await call(`api/jobs/${id}`).catch(() => null);
    if (job) put(job);
    if (job && !finished(job)) follow(id);
  }
  if (jobs.size) show([...jobs.keys()].at(-1));
}

function describe(status) {
  const facts = [status.model, `${status.steps} steps`];
  if (status.network_evaluations !== status.steps) {
    facts.push(`${status.network_evaluations} network evaluations`);
  }
  if (status.vae !== "full") facts.push(`preview: ${status.vae} decoder`);
  facts.push(...status.adapters);
  $("facts").textContent = facts.join(" \u00b7 ");
  for (const prompt of status.examples) {
    const chip = element("button", { type: "button", textContent: prompt, title: prompt });
    chip.addEventListener("click", () => {
      $("prompt").value = prompt;
      $("prompt").focus();
    });
    $("examples").append(chip);
  }
  $("examples").hidden = !status.examples.length;
}

function listen() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    submit(wanted());
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("form").requestSubmit();
  });
  $("dice").addEventListener("click", () => {
    $("seed").value = randomSeed();
  });
  $("again").addEventListener("click", () => {
    const { request } = jobs.get(shown);
    $("prompt").value = request.prompt;
    fill(asWords(request));
    $("seed").value = randomSeed();
    $("form").requestSubmit();
  });
  $("pause").addEventListener("click", () => {
    if ($("video").paused) $("video").play();
    else $("video").pause();
  });
  $("video").addEventListener("play", () => ($("pause").textContent = "Pause"));
  $("video").addEventListener("pause", () => ($("pause").textContent = "Play"));
  $("cancel").addEventListener("click", () => cancel(shown));
  $("video").addEventListener("loadedmetadata", (event) => {
    crisp(event);
    renderFacts(jobs.get(shown));
  });
}

// A link such as ?prompt=a+red+circle&seed=3&go=1 fills the form, and with go=1 sends it.
async function start() {
  listen();
  const link = new URLSearchParams(location.search);
  $("prompt").value = link.get("prompt") ?? "";
  $("seed").value = link.get("seed") ?? $("seed").value;
  try {
    const status = await call("api/status");
    makeFields(status.request);
    fill(Object.fromEntries(link));
    describe(status);
    await recall();
  } catch (error) {
    complain(error.message);
  }
  if (link.has("go")) $("form").requestSubmit();
}

start();
