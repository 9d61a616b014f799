// The cascade in a thread of its own, so that the page stays alive while it draws.

import { Cascade } from "./cascade.js";

const loading = Cascade.load("bundle", (loaded, all) => postMessage({ kind: "loading", loaded, all }));
loading.then(
  (cascade) => postMessage({ kind: "ready", presets: cascade.presets, preset: cascade.manifest.model.default_preset }),
  (error) => postMessage({ kind: "error", message: error.message }),
);

onmessage = async ({ data: request }) => {
  try {
    const cascade = await loading;
    const began = performance.now();
    const image = await cascade.draw(request, (stage, step, steps, preview) =>
      postMessage({ kind: "step", stage, step, steps, preview }));
    postMessage({ kind: "done", image, request, seconds: (performance.now() - began) / 1000 });
  } catch (error) {
    postMessage({ kind: "error", message: error.message });
  }
};
