# make help says what there is
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# the pinned set belongs to the Python it was tested with; others resolve by the bounds in pyproject.toml
PINS := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info[:2] == (3, 11) else "")')
PROMPT ?= a large red circle at the left on a blue background
SEED ?= 0
# tests of a file share what they set up, so that a file stays with one worker: tests/conftest.py has the groups
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(4, os.cpu_count() or 1))')
PARALLEL = $(shell $(BIN)/python -c 'import xdist' 2>/dev/null && echo "-n $(WORKERS) --dist loadscope --no-loadscope-reorder")

.PHONY: help demo check test test-wheel lowest lint bench bench-gpu cpp cpp-needs try docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | sed -E 's/^([a-z-]+):.*## /\1|/' | \
		while IFS='|' read -r name text; do printf 'make %-11s %s\n' "$$name" "$$text"; done

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) $(PINS) -e '.[export,onnxruntime]'
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) $(PINS) -e '.[dev]'
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo ## export the tiny cascade and make a picture: demo/picture.png (PROMPT=..., SEED=...)
	$(BIN)/cascade-export --stage all --size tiny --out demo/bundle --overwrite
	$(BIN)/cascade-run "$(PROMPT)" --bundle demo/bundle --seed $(SEED) -o demo/picture.png

check: lint ## lint, types and the fast tests (-m "not slow"): under 90 s on two cores in a tree that is set up
	$(BIN)/python -m pytest -q -m "not slow" $(PARALLEL) --durations=5

test: $(VENV)/.dev ## every test that this machine can run; what is skipped says why (-rs), the slowest thirty their time
	$(BIN)/python -m pytest -rs --durations=30 $(PARALLEL) --ignore=tests/bench
	$(BIN)/python -m pytest -rs --durations=5 tests/bench
	$(MAKE) test-wheel

# the runtime's tests, copied out of the checkout, where only the built wheel and ONNX Runtime are installed
test-wheel: $(VENV)/.dev ## the runtime's tests over the built wheel, without torch
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check $(PINS) \
		"$$(ls build/wheel/*.whl)[onnxruntime]" pytest hypothesis jsonschema
	mkdir build/wheel/tests && cp -r tests/runtime tests/conftest.py tests/opened.py tests/lora_files.py build/wheel/tests/
	cd build/wheel && venv/bin/python -c 'import importlib.util as u; assert u.find_spec("torch") is None'
	cd build/wheel && venv/bin/python -m pytest -q -rs --durations=5 --import-mode=importlib -p no:cacheprovider \
		-o pythonpath=tests -o markers="slow: takes longer than 2 s" tests

# the same tests with the oldest versions that pyproject.toml allows
lowest: ## the runtime's tests over the lowest versions of what it needs (takes uv)
	rm -rf build/lowest && mkdir -p build/lowest
	uv pip compile --quiet --resolution lowest-direct --extra onnxruntime pyproject.toml -o build/lowest/pins.txt
	uv venv --quiet build/lowest/venv
	uv pip install --quiet --python build/lowest/venv/bin/python -r build/lowest/pins.txt pytest hypothesis jsonschema
	uv pip install --quiet --python build/lowest/venv/bin/python --no-deps .
	mkdir build/lowest/tests && cp -r tests/runtime tests/conftest.py tests/opened.py tests/lora_files.py build/lowest/tests/
	cd build/lowest && venv/bin/python -m pytest -q -rs --import-mode=importlib -p no:cacheprovider \
		-o pythonpath=tests -o markers="slow: takes longer than 2 s" tests

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.bench: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) $(PINS) -e '.[bench,onnxruntime,openvino]'
	touch $@

# exit code 1 of the accuracy: a goal was missed, and it says which
bench: $(VENV)/.bench ## race the tiny cascade against PyTorch and judge its pictures (see benchmarks/README.md)
	mkdir -p build
	$(BIN)/cascade-bench --stage text --stage c --stage b --stage a --stage picture --stage host \
		--peer eager,compile --provider cpu,openvino --repeat 15 --json build/race_tiny_cpu.json --plot build/race_tiny_cpu.png
	$(BIN)/cascade-bench --stage cold-start --stage import --repeat 7 --json build/startup.json
	$(BIN)/python benchmarks/tiny_accuracy.py --json build/tiny_accuracy.json

bench-gpu: ## on a machine with a GPU and its engine runtimes installed: WHAT=c, b or picture
	$(BIN)/cascade-bench --stage $(WHAT) --size big --precision bf16,fp16 --peer eager,compile \
		--provider cuda,ort-tensorrt,tensorrt,tensorrt-rtx --repeat 20 --limit 150 --json build/gpu_$(WHAT).json

cpp: cpp-needs ## build the C++ and C kit with CMake: build/cpp (CMAKE_ARGS=...)
	cmake -S engines/cpp -B build/cpp -DCMAKE_BUILD_TYPE=Release $(CMAKE_ARGS)
	cmake --build build/cpp --parallel $(WORKERS)

CPP_PACKAGES := g++ cmake pkg-config nlohmann-json3-dev libpng-dev libssl-dev libutf8proc-dev libgtest-dev
cpp-needs:
	@missing=""; \
	command -v cmake > /dev/null || missing="$$missing CMake"; \
	command -v $${CXX:-c++} > /dev/null || missing="$$missing, a C++ compiler ($${CXX:-c++})"; \
	test -f engines/cpp/CMakeLists.txt || missing="$$missing, engines/cpp"; \
	test -z "$$missing" || { echo "make cpp cannot build here; missing:$${missing#,}."; \
		echo "On Debian and Ubuntu: apt-get install $(CPP_PACKAGES)"; exit 1; }

try: $(VENV)/.demo ## the tiny cascade in your browser: http://127.0.0.1:8001 (fetches onnxruntime-web by npm)
	$(BIN)/python docs/try_page.py build/try
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory build/try 8001

docs: $(VENV)/.dev ## the documentation: build/site (strict: a link that leads nowhere is an error)
	$(BIN)/python docs/site.py build/site

clean: ## remove what these commands made
	rm -rf $(VENV) build dist demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
