// The sampler "original" as tables, guidance and the timestep embedding, as cascade_rt/sampling.py has them.

const { fround } = Math;
const RANGE = [1e-4, 0.9999];
const clip = (x, low, high) => Math.min(Math.max(x, low), high);

/** One row a step: `x0` and `update` weigh latents, prediction and noise. The network predicts the velocity. */
export function makeSchedule(steps, { shift, s }) {
  const first = Math.cos((s / (1 + s)) * Math.PI * 0.5) ** 2;
  const limits = RANGE.map((a) => Math.log(a / (1 - a)));
  const alpha = Array.from({ length: steps + 1 }, (_, i) => {
    const t = 1 - i / steps;
    const plain = clip(Math.cos(((t + s) / (1 + s)) * Math.PI * 0.5) ** 2 / first, ...RANGE);
    const snr = clip(Math.log(plain / (1 - plain)) + 2 * Math.log(1 / shift), ...limits);
    return 1 / (1 + Math.exp(-snr));
  });
  return Array.from({ length: steps }, (_, i) => {
    const a = Math.sqrt(alpha[i]);
    const b = Math.sqrt(1 - alpha[i]);
    const aNext = Math.sqrt(alpha[i + 1]);
    const bNext = Math.sqrt(1 - alpha[i + 1]);
    const sigma = (bNext / b) * Math.sqrt(Math.max(1 - (a / aNext) ** 2, 0));
    const direction = Math.sqrt(Math.max(bNext ** 2 - sigma ** 2, 0));
    const ratio = (Math.acos(Math.sqrt(alpha[i] * first)) / (Math.PI / 2)) * (1 + s) - s;
    return {
      ratio: fround(clip(ratio, 0, 1)),
      x0: [a, -b].map(fround),
      update: [aNext * a + direction * b, -aNext * b + direction * a, sigma].map(fround),
    };
  });
}

/** Classifier-free guidance, pulled back to the spread of the conditional prediction. */
export function guide(conditional, unconditional, scale, rescale) {
  const factor = fround(scale);
  const guided = conditional.map((c, i) => fround(unconditional[i] + fround(factor * fround(c - unconditional[i]))));
  if (rescale === 0) return guided;
  const actual = spread(guided);
  const ratio = actual > 0 ? spread(conditional) / actual : 1;
  const back = fround(rescale * ratio + (1 - rescale));
  return guided.map((x) => x * back);
}

function spread(values) {
  let sum = 0;
  for (const x of values) sum += x;
  const mean = sum / values.length;
  let squares = 0;
  for (const x of values) squares += (x - mean) ** 2;
  return Math.sqrt(squares / values.length);
}

/** Sum of arrays, each times its number, every operation rounded to float32. */
export function weighted(numbers, arrays) {
  const out = new Float32Array(arrays[0].length);
  for (let i = 0; i < out.length; i += 1) {
    let sum = fround(numbers[0] * arrays[0][i]);
    for (let k = 1; k < arrays.length; k += 1) sum = fround(sum + fround(numbers[k] * arrays[k][i]));
    out[i] = sum;
  }
  return out;
}

/** Sinusoidal embedding of timestep ratios: `[steps, dim]`, float32. */
export function timestepEmbedding(ratios, dim) {
  const half = Math.floor(dim / 2);
  const out = new Float32Array(ratios.length * dim);
  const slope = fround(-Math.log(10000) / (half - 1));
  ratios.forEach((ratio, row) => {
    for (let i = 0; i < half; i += 1) {
      const frequency = fround(Math.exp(fround(i * slope)));
      const angle = fround(fround(ratio * 10000) * frequency);
      out[row * dim + i] = Math.sin(angle);
      out[row * dim + half + i] = Math.cos(angle);
    }
  });
  return out;
}

/** Bilinear resize of `[channels, size, size]` with aligned corners. */
export function resize(values, channels, from, to) {
  const place = Array.from({ length: to }, (_, i) => {
    const position = i * ((from - 1) / Math.max(to - 1, 1));
    const low = Math.min(Math.floor(position), Math.max(from - 2, 0));
    return { low, high: Math.min(low + 1, from - 1), share: fround(position - low) };
  });
  const mix = (a, b, share) => fround(fround(a * fround(1 - share)) + fround(b * share));
  const out = new Float32Array(channels * to * to);
  for (let c = 0; c < channels; c += 1) {
    const at = (y, x) => values[(c * from + y) * from + x];
    for (let y = 0; y < to; y += 1) {
      const row = place[y];
      for (let x = 0; x < to; x += 1) {
        const { low, high, share } = place[x];
        const above = mix(at(row.low, low), at(row.low, high), share);
        const below = mix(at(row.high, low), at(row.high, high), share);
        out[(c * to + y) * to + x] = mix(above, below, row.share);
      }
    }
  }
  return out;
}
