"""cascade-tiny: a small trained Stable Cascade and the recipe it was trained by.

The world it knows is drawn, not collected: one to three flat shapes on a coloured background. Its weights ship as an
engine bundle in `cascade_tiny/bundle/`, which the runtime finds through `importlib.resources`.

Modules, in the order data flows: `scenes` draws and describes pictures, `meaning` says what the semantic latents hold,
`text` makes the tokenizer, `recipe` holds every size and every number of the training, `weights` the networks of each
stage, `data` makes batches, `diffusion` is what the denoisers learn, `train` trains, `look` shows and judges what the
networks make meanwhile, `publish` writes the checkpoint folder, and `judge` tells whether a picture shows what its
caption says. `scenes`, `meaning` and `judge` need NumPy only; nothing is imported here.
"""
