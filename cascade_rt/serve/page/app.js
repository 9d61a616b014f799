"use strict";

const byId = (id) => document.getElementById(id);
const MAX_HISTORY = 24;
let running = null; // the AbortController of the request that runs
let varied = null; // base64 of the picture to vary

function headers(more) {
  const key = byId("key").value.trim();
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
}

async function refusal(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

async function loadModels() {
  const response = await fetch("/v1/models", { headers: headers({}) });
  if (!response.ok) throw new Error(await refusal(response));
  const select = byId("model");
  select.replaceChildren();
  for (const model of (await response.json()).data) {
    const option = document.createElement("option");
    option.value = option.textContent = model.id;
    option.dataset.facts = JSON.stringify(model);
    select.append(option);
  }
  showDefaults();
}

function showDefaults() {
  const chosen = byId("model").selectedOptions[0];
  if (!chosen) return;
  const facts = JSON.parse(chosen.dataset.facts);
  byId("size").placeholder = facts.size;
  byId("steps").placeholder = facts.num_inference_steps;
  byId("guidance").placeholder = facts.guidance_scale;
}

function body() {
  const wanted = { stream: true, partial_images: 3, output_format: "jpeg" };
  for (const name of ["prompt", "negative_prompt", "model", "size"]) {
    const value = byId("form").elements[name].value.trim();
    if (value) wanted[name] = value;
  }
  for (const name of ["num_inference_steps", "guidance_scale", "n"]) {
    const value = byId("form").elements[name].value;
    if (value !== "") wanted[name] = Number(value);
  }
  if (varied) wanted.image_prompts = [varied];
  const seed = byId("seed").value.trim();
  const text = JSON.stringify(wanted);
  // a seed has up to 64 bits, and a number of JavaScript holds 53: it is written as it was typed
  return seed ? `${text.slice(0, -1)},"seed":${BigInt(seed)}}` : text;
}

// JSON of the service, with seeds as text: a number of JavaScript would round them
function parse(text) {
  return JSON.parse(text.replace(/"seed":(\d+)/, '"seed":"$1"'));
}

async function* serverEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield parse(data.slice(6));
    }
  }
}

function figureOf(number) {
  const id = `picture-${number}`;
  let figure = byId(id);
  if (!figure) {
    figure = document.createElement("figure");
    figure.id = id;
    figure.append(document.createElement("img"), document.createElement("figcaption"));
    byId("pictures").append(figure);
  }
  return figure;
}

function show(event, prompt) {
  const figure = figureOf(event.picture);
  const finished = event.type.endsWith("completed");
  const image = figure.querySelector("img");
  image.src = `data:image/${event.output_format};base64,${event.b64_json}`;
  image.alt = finished ? prompt : `unfinished: ${prompt}`;
  figure.classList.toggle("unfinished", !finished);
  figure.querySelector("figcaption").textContent = finished ? `seed ${event.seed}, ${event.size}` : `unfinished ${event.partial_image_index + 1}`;
  return finished;
}

function remember(event, fields) {
  const item = document.createElement("li");
  const image = document.createElement("img");
  image.src = `data:image/${event.output_format};base64,${event.b64_json}`;
  image.alt = "";
  const text = document.createElement("span");
  text.textContent = `${fields.prompt} (seed ${event.seed})`;
  const again = document.createElement("button");
  again.type = "button";
  again.textContent = "Repeat";
  again.setAttribute("aria-label", `Repeat ${fields.prompt} with seed ${event.seed}`);
  again.addEventListener("click", () => {
    for (const [name, value] of Object.entries(fields)) byId("form").elements[name].value = value;
    byId("seed").value = event.seed;
    byId("count").value = 1;
    draw();
  });
  item.append(image, text, again);
  byId("history").prepend(item);
  while (byId("history").children.length > MAX_HISTORY) byId("history").lastElementChild.remove();
}

function formFields() {
  const names = ["prompt", "negative_prompt", "model", "size", "num_inference_steps", "guidance_scale"];
  return Object.fromEntries(names.map((name) => [name, byId("form").elements[name].value]));
}

function busy(isBusy) {
  byId("draw").disabled = isBusy;
  byId("cancel").disabled = !isBusy;
  byId("progress").hidden = !isBusy;
}

async function draw() {
  if (running || !byId("form").reportValidity()) return;
  const fields = formFields();
  const count = Number(byId("count").value) || 1;
  const started = performance.now();
  running = new AbortController();
  byId("pictures").replaceChildren();
  byId("error").textContent = "";
  byId("status").textContent = "drawing";
  byId("progress").removeAttribute("value");
  busy(true);
  try {
    const response = await fetch("/v1/images/generations", {
      method: "POST",
      headers: headers({ "content-type": "application/json" }),
      body: body(),
      signal: running.signal,
    });
    if (!response.ok) throw new Error(await refusal(response));
    let seen = 0;
    let finished = 0;
    for await (const event of serverEvents(response)) {
      if (event.error) throw new Error(event.error.message);
      seen += 1;
      if (show(event, fields.prompt)) {
        finished += 1;
        remember(event, fields);
      }
      byId("progress").value = Math.max(seen / (4 * count), finished / count);
    }
    if (finished < count) throw new Error("the service ended the stream early");
    byId("status").textContent = `${count === 1 ? "1 picture" : `${count} pictures`} in ${((performance.now() - started) / 1000).toFixed(1)} s`;
  } catch (error) {
    const cancelled = error.name === "AbortError";
    byId("status").textContent = cancelled ? "cancelled" : "";
    byId("error").textContent = cancelled ? "" : error.message;
  } finally {
    running = null;
    busy(false);
  }
}

function takePicture(file) {
  if (!file) return;
  const reader = new FileReader();
  reader.addEventListener("load", () => {
    varied = reader.result.slice(reader.result.indexOf(",") + 1);
    byId("drop-text").textContent = file.name;
    byId("drop-clear").hidden = false;
  });
  reader.readAsDataURL(file);
}

function dropPicture() {
  varied = null;
  byId("file").value = "";
  byId("drop-text").textContent = "Drop a picture here, or choose one.";
  byId("drop-clear").hidden = true;
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function showTheme() {
  byId("theme").setAttribute("aria-pressed", String(isDark()));
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) draw();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});
byId("cancel").addEventListener("click", () => running && running.abort());
byId("model").addEventListener("change", showDefaults);
byId("key").addEventListener("change", () => loadModels().then(() => (byId("error").textContent = ""), (error) => (byId("error").textContent = error.message)));
byId("file").addEventListener("change", (event) => takePicture(event.target.files[0]));
byId("drop-clear").addEventListener("click", dropPicture);
byId("drop").addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").classList.add("over");
});
byId("drop").addEventListener("dragleave", () => byId("drop").classList.remove("over"));
byId("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  takePicture(event.dataTransfer.files[0]);
});
byId("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
});
showTheme();
loadModels().catch((error) => (byId("error").textContent = error.message));
