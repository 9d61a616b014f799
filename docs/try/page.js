// What the page shows of the worker's messages.

const at = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });
const canvas = at("picture").getContext("2d");
let ready = false;
let busy = false;

function show(image) {
  const held = new OffscreenCanvas(image.width, image.height);
  held.getContext("2d").putImageData(image, 0, 0);
  canvas.imageSmoothingEnabled = true;
  canvas.drawImage(held, 0, 0, canvas.canvas.width, canvas.canvas.height);
}

function enable() {
  at("draw").disabled = at("another").disabled = !ready || busy;
}

const messages = {
  loading({ loaded, all }) {
    at("progress").value = loaded / all;
    at("status").textContent = `Loading weights: ${(loaded / 1e6).toFixed(0)} of ${(all / 1e6).toFixed(0)} MB`;
  },
  ready({ presets, preset }) {
    for (const name of presets) at("preset").add(new Option(name, name, false, name === preset));
    ready = true;
    at("progress").value = 0;
    at("status").textContent = "Ready.";
  },
  step({ stage, step, steps, preview }) {
    show(preview);
    canvas.canvas.dataset.previews = Number(canvas.canvas.dataset.previews ?? 0) + 1;
    at("progress").value = ((stage === "stage_b" ? 1 : 0) + step / steps) / 2;
    at("status").textContent = `Stage ${stage === "stage_b" ? "B" : "C"}, step ${step} of ${steps}`;
  },
  done({ image, request, seconds }) {
    busy = false;
    canvas.putImageData(image, 0, 0);
    canvas.canvas.setAttribute("aria-label", request.prompt);
    at("progress").value = 1;
    at("status").textContent = `Drawn in ${seconds.toFixed(1)} s on this device.`;
    at("save").href = canvas.canvas.toDataURL("image/png");
    at("save").hidden = false;
    const quoted = `'${request.prompt.replaceAll("'", "'\\''")}'`;
    at("command").textContent = `cascade-run ${quoted} --seed ${request.seed} --preset ${request.preset} -o cascade.png`;
  },
  error({ message }) {
    busy = false;
    at("status").textContent = "";
    at("error").textContent = message;
  },
};

worker.onmessage = ({ data }) => {
  messages[data.kind](data);
  enable();
};
worker.onerror = (event) => {
  messages.error({ message: event.message || "The worker could not start; a browser with module workers is needed." });
};

function draw() {
  busy = true;
  enable();
  at("error").textContent = "";
  at("status").textContent = "Reading the prompt";
  canvas.canvas.dataset.previews = 0;
  worker.postMessage({ prompt: at("prompt").value, seed: BigInt(at("seed").value), preset: at("preset").value });
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
at("another").addEventListener("click", () => {
  at("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
  draw();
});
