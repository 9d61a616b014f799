"""torch -> ONNX -> engines. Imports `cascade_rt`; never the other way round."""
