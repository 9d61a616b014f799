// Prompt -> Stage C -> Stage B -> Stage A, over the bundle's own graphs. One picture at a time, of the bundle's size.

import * as ort from "./ort/ort.wasm.min.mjs";
import { TorchNoise } from "./noise.js";
import { guide, makeSchedule, resize, timestepEmbedding, weighted } from "./sampling.js";
import { Words } from "./text.js";

ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more need headers that a static host does not send, and were slower on two cores

const ENGINES = ["text_encoder", "stage_c.context", "stage_c.step", "stage_b.context", "stage_b.step", "stage_a.decode"];
const float = (values, shape) => new ort.Tensor("float32", values, shape);
const int64 = (values, shape) => new ort.Tensor("int64", BigInt64Array.from(values), shape);

function twice(values) {
  const out = new Float32Array(2 * values.length);
  out.set(values);
  out.set(values, values.length);
  return out;
}

export class Cascade {
  /**
   * Load a bundle.
   * @param {string} place address of its folder
   * @param {(loaded: number, all: number) => void} progress told in bytes
   */
  static async load(place, progress) {
    const manifest = await (await fetched(`${place}/cascade.json`)).json();
    const plain = manifest.engines.filter((row) => row.runtime === "onnx" && row.features.length === 0);
    const records = ENGINES.map((name) => plain.find((row) => row.name === name));
    const names = [...new Set(records.flatMap((row) => [row.file, ...row.weights]))];
    const all = names.reduce((sum, name) => sum + manifest.files[name].bytes, 0);
    let loaded = 0;
    const files = new Map();
    for (const name of names) {
      const data = new Uint8Array(await (await fetched(`${place}/${name}`)).arrayBuffer());
      if (data.length !== manifest.files[name].bytes) {
        throw new Error(`${name} has ${data.length} bytes, the manifest says ${manifest.files[name].bytes}; load the page again`);
      }
      files.set(name, data);
      loaded += data.length;
      progress(loaded, all);
    }
    const words = new Words(await (await fetched(`${place}/${manifest.tokenizer.file}`)).json(), manifest.tokenizer);
    const sessions = new Map();
    for (const record of records) {
      const externalData = record.weights.map((path) => ({ path, data: files.get(path) }));
      const options = { executionProviders: ["wasm"], externalData };
      sessions.set(record.name, await ort.InferenceSession.create(files.get(record.file), options));
    }
    return new Cascade(manifest, records, sessions, words);
  }

  constructor(manifest, records, sessions, words) {
    if (manifest.model.default_sampler !== "original") throw new Error("this page has the sampler original alone");
    this.manifest = manifest;
    this.records = new Map(records.map((row) => [row.name, row]));
    this.sessions = sessions;
    this.words = words;
    this.size = [manifest.model.height, manifest.model.width];
  }

  get presets() {
    return ["quality", ...Object.keys(this.manifest.presets)];
  }

  /** Steps and guidance of both stages under a preset. */
  settings(preset) {
    const { prior, decoder } = this.manifest.sampling.original;
    const chosen = this.manifest.presets[preset] ?? {};
    const over = (own, row = {}) => ({ ...own, ...Object.fromEntries(Object.entries(row).filter(([, v]) => v !== null)) });
    return { prior: over(prior, chosen.prior), decoder: over(decoder, chosen.decoder) };
  }

  /**
   * Draw a picture.
   * @param {{prompt: string, seed: bigint, preset: string}} request
   * @param {(stage: string, step: number, steps: number, preview: ImageData) => void} told after every step
   * @returns {Promise<ImageData>}
   */
  async draw({ prompt, seed, preset }, told) {
    const noise = new TorchNoise(seed);
    const { prior, decoder } = this.settings(preset);
    const guided = [prior, decoder].some((loop) => loop.guidance_scale > 1);
    const texts = await this.encode(guided ? [prompt, ""] : [prompt]);
    const { resolution_multiple: multiple, compression } = this.manifest.model;
    const small = this.size.map((side) => Math.ceil(side / multiple));
    const effnetSide = this.size[0] / compression / 2;

    const latents = noise.normal(16 * small[0] * small[1]);
    const image = this.dims("stage_c.context", "clip_img")[2];
    const embeddings = await this.denoise("stage_c", [16, ...small], latents, prior, noise, told, (rows) => ({
      clip_text: float(texts.hidden.slice(0, (rows * texts.hidden.length) / texts.rows), [rows, texts.length, texts.width]),
      clip_text_pooled: float(texts.pooled.slice(0, rows * texts.width), [rows, 1, texts.width]),
      clip_img: float(new Float32Array(rows * image), [rows, 1, image]),
    }));

    const grid = this.size.map((side) => side / compression);
    const effnet = resize(embeddings, 16, small[0], effnetSide);
    const start = noise.normal(4 * grid[0] * grid[1]);
    const made = await this.denoise("stage_b", [4, ...grid], start, decoder, noise, told, (rows) => {
      const maps = new Float32Array(rows * effnet.length); // of the negative prompt: zeros
      maps.set(effnet);
      return {
        clip_text_pooled: float(texts.pooled.slice(0, rows * texts.width), [rows, 1, texts.width]),
        effnet: float(maps, [rows, 16, effnetSide, effnetSide]),
      };
    });
    const scaled = weighted([Math.fround(this.manifest.sampling.original.latent_scale)], [made]);
    const { pixels } = await this.run("stage_a.decode", { latents: float(scaled, [1, 4, ...grid]) });
    return imageOf(pixels.data, pixels.dims[2], pixels.dims[3]);
  }

  dims(engine, tensor) {
    return this.records.get(engine).inputs.find((row) => row.name === tensor).axes;
  }

  run(engine, feeds) {
    return this.sessions.get(engine).run(feeds);
  }

  async encode(prompts) {
    const rows = prompts.map((prompt) => this.words.encode(prompt));
    const shape = [rows.length, this.words.length];
    const out = await this.run("text_encoder", {
      input_ids: int64(rows.flatMap((row) => row.ids), shape),
      attention_mask: int64(rows.flatMap((row) => row.mask), shape),
    });
    const [, length, width] = out.hidden_states.dims;
    return { rows: rows.length, length, width, hidden: out.hidden_states.data, pooled: out.pooled.data };
  }

  /** A stage's loop; returns the last prediction of the clean latents. */
  async denoise(stage, shape, start, loop, noise, told, conditions) {
    const schedule = makeSchedule(loop.num_inference_steps, loop);
    const guided = loop.guidance_scale > 1;
    const rows = guided ? 2 : 1;
    const dim = this.dims(`${stage}.context`, "timestep_embedding")[1];
    const embedding = timestepEmbedding(schedule.map((row) => row.ratio), dim);
    const context = await this.run(`${stage}.context`, {
      timestep_embedding: float(embedding, [schedule.length, dim]),
      ...conditions(rows),
    });
    let latents = start;
    let x0 = start;
    for (const [index, row] of schedule.entries()) {
      const { prediction } = await this.run(`${stage}.step`, {
        latents: float(guided ? twice(latents) : latents, [rows, ...shape]),
        step: int64(Array.from({ length: rows }, () => BigInt(index)), [rows]),
        ...context,
      });
      const count = latents.length;
      const answer = guided
        ? guide(prediction.data.slice(0, count), prediction.data.slice(count), loop.guidance_scale, loop.guidance_rescale)
        : prediction.data;
      if (!answer.every(Number.isFinite)) throw new Error(`${stage} made numbers that are not finite`);
      x0 = weighted(row.x0, [latents, answer]);
      latents = weighted(row.update, [latents, answer, noise.normal(count)]);
      told(stage, index + 1, schedule.length, this.preview(stage, x0, shape));
    }
    return x0;
  }

  /** Latents as colours, by the bundle's own factors: no network. */
  preview(stage, latents, [channels, height, width]) {
    const { factors, offset } = this.manifest.previews[stage === "stage_c" ? "prior" : "decoder"];
    const planes = new Float32Array(3 * height * width);
    for (let k = 0; k < 3; k += 1) {
      for (let i = 0; i < height * width; i += 1) {
        let sum = offset[k];
        for (let c = 0; c < channels; c += 1) sum += factors[c][k] * latents[c * height * width + i];
        planes[k * height * width + i] = sum;
      }
    }
    return imageOf(planes, height, width);
  }
}

/** `[3, height, width]` of 0..1 as an image. */
function imageOf(planes, height, width) {
  const image = new ImageData(width, height);
  const area = height * width;
  for (let i = 0; i < area; i += 1) {
    for (let k = 0; k < 3; k += 1) image.data[4 * i + k] = Math.round(255 * Math.min(Math.max(planes[k * area + i], 0), 1));
    image.data[4 * i + 3] = 255;
  }
  return image;
}

async function fetched(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${address} cannot be fetched: ${answer.status} ${answer.statusText}`);
  return answer;
}
