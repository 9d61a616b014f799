# make demo    a picture from a prompt, from a fresh checkout
# make test    every test that this machine can run; what is skipped says why
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# the pinned set belongs to the Python it was tested with; others resolve by the bounds in pyproject.toml
PINS := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info[:2] == (3, 11) else "")')
PROMPT ?= a large red circle at the left on a blue background
SEED ?= 0

.PHONY: help demo test test-wheel lint bench bench-gpu clean

help:
	@echo "make demo   export the tiny cascade and make a picture: demo/picture.png (PROMPT=..., SEED=...)"
	@echo "make test   run every test that this machine can run"
	@echo "make lint   ruff and mypy"
	@echo "make bench  race the tiny cascade against PyTorch and judge its pictures (see benchmarks/README.md)"
	@echo "make clean  remove what these commands made"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) $(PINS) -e '.[export,onnxruntime]'
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) $(PINS) -e '.[dev]'
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/cascade-export --stage all --size tiny --out demo/bundle --overwrite
	$(BIN)/cascade-run "$(PROMPT)" --bundle demo/bundle --seed $(SEED) -o demo/picture.png

test: $(VENV)/.dev
	$(BIN)/python -m pytest
	$(MAKE) test-wheel

# the runtime's tests, copied out of the checkout, where only the built wheel and ONNX Runtime are installed
test-wheel: $(VENV)/.dev
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check $(PINS) \
		"$$(ls build/wheel/*.whl)[onnxruntime]" pytest
	mkdir build/wheel/tests && cp -r tests/runtime tests/conftest.py build/wheel/tests/
	cd build/wheel && venv/bin/python -c 'import importlib.util as u; assert u.find_spec("torch") is None'
	cd build/wheel && venv/bin/python -m pytest -ra --import-mode=importlib -p no:cacheprovider tests

$(VENV)/.bench: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) $(PINS) -e '.[bench,onnxruntime,openvino]'
	touch $@

# exit code 1 of the accuracy: a goal was missed, and it says which
bench: $(VENV)/.bench
	mkdir -p build
	$(BIN)/cascade-bench --stage text --stage c --stage b --stage a --stage picture --stage host \
		--peer eager,compile --provider cpu,openvino --repeat 15 --json build/race_tiny_cpu.json --plot build/race_tiny_cpu.png
	$(BIN)/cascade-bench --stage cold-start --stage import --repeat 7 --json build/startup.json
	$(BIN)/python benchmarks/tiny_accuracy.py --json build/tiny_accuracy.json

# on a machine with a GPU and its engine runtimes installed; WHAT=c, b or picture
bench-gpu:
	$(BIN)/cascade-bench --stage $(WHAT) --size big --precision bf16,fp16 --peer eager,compile \
		--provider cuda,ort-tensorrt,tensorrt,tensorrt-rtx --repeat 20 --limit 150 --json build/gpu_$(WHAT).json

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist demo .mypy_cache .ruff_cache .pytest_cache
