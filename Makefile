# Every target sets up the virtual environment in .venv first, and updates it when pyproject.toml changes.
PYTHON ?= python3
# Parallel test processes; each takes whole files. Most of a test's time is spent waiting for services and browsers.
TEST_PROCESSES ?= 2
VENV ?= .venv
BUNDLE ?= pretrained/cifar10
# cuda where there is an NVIDIA driver, otherwise cpu.
DEVICE ?= $(if $(wildcard /dev/nvidiactl /proc/driver/nvidia/version /usr/lib/wsl/lib/libcuda.so.1),cuda,cpu)
BIN := $(VENV)/bin
OTHER_RUNTIME := $(if $(filter cuda,$(DEVICE)),onnxruntime,onnxruntime-gpu)

.PHONY: serve test test-slow test-ray coverage check docs docs-serve fit given bench bench-faults bench-soak bench-bulk bench-training bench-ood bench-codec clean FORCE

serve: $(VENV)/.serve  ## serve BUNDLE over HTTP, with a page
	@exec $(BIN)/ade serve $(BUNDLE)

test: $(VENV)/.test  ## every fast test, in about ten minutes on two cores
	$(BIN)/python -m pytest -m "not slow" -n $(TEST_PROCESSES) --dist loadfile

test-slow: $(VENV)/.test  ## the slow tests: training, resuming, all sizes, fuzzing
	$(BIN)/python -m pytest -m slow -n $(TEST_PROCESSES) --dist loadfile

test-ray: $(VENV)/.test  ## the engine on Ray, installed first: its contract, what dies under load, bulk scoring
	$(BIN)/python -m pip install --quiet --editable ".[$(DEVICE),dev,ray]" "moto[server]>=5.1,<6" "s3fs>=2024.6"
	$(BIN)/python -m pytest -m "" extensions/ray/tests
	$(BIN)/python -m pytest -m "" tests/test_contract.py

coverage: $(VENV)/.test  ## the fast tests, with a report of the lines that they run
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m "not slow"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

check: $(VENV)/.test  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.docs  ## the documentation as a site, in build/docs; a link or an anchor without a target is an error
	rm -rf build/docs # or pages that are gone would stay
	$(BIN)/python -m sphinx -E -W --keep-going -q docs build/docs

docs-serve: docs  ## the same at http://127.0.0.1:8000
	@exec $(BIN)/python -m http.server --bind 127.0.0.1 --directory build/docs 8000

fit: given $(VENV)/.fit  ## train, export and calibrate a model of a folder of images: make fit DATA=DIR BUDGET=1h
	$(BIN)/ade fit "$(DATA)" --budget "$(or $(BUDGET),1h)" $(if $(OUT),--out "$(OUT)")

given:  # before hundreds of megabytes are installed
	@test -n "$(DATA)" || { echo "make fit needs DATA=DIR, a folder of images" >&2; exit 2; }

bench: $(VENV)/.bench  ## throughput and latency: the engine, the service, other servers with the same engine
	$(BIN)/python -m benchmarks.serving $(BUNDLE)

bench-faults: $(VENV)/.bench  ## faults under load, and how the service recovers
	$(BIN)/python -m benchmarks.faults $(BUNDLE)

bench-soak: $(VENV)/.bench  ## half an hour of load: memory and errors
	$(BIN)/python -m benchmarks.soak $(BUNDLE)

bench-bulk: $(VENV)/.bench  ## ade score of a folder of many files: make bench-bulk DATA=FOLDER
	$(BIN)/python -m benchmarks.bulk $(BUNDLE) "$(DATA)"

bench-training: $(VENV)/.test  ## training steps: images and operations per second, memory, the loader
	$(BIN)/python -m benchmarks.training

bench-ood: $(VENV)/.test  ## the verdict: cost, false alarms, drift: make bench-ood DATA=CIFAR10
	$(BIN)/python -m benchmarks.ood_cost $(BUNDLE)
	$(BIN)/python -m benchmarks.ood_false_alarms $(BUNDLE) --root "$(DATA)"
	$(BIN)/python -m benchmarks.ood_resized $(BUNDLE) --root "$(DATA)"
	$(BIN)/python -m benchmarks.drift_thresholds

bench-codec: $(VENV)/.test  ## lossless coding: size and speed beside PNG, WebP, JPEG XL, zstd: make bench-codec DATA=FOLDER
	$(BIN)/python -m pip install --quiet zstandard pillow-jxl-plugin
	$(BIN)/python -m benchmarks.codec $(BUNDLE) "$(DATA)" --into docs/explanation/codec.md

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage* *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	{ echo "$(PYTHON) must be Python 3.11, 3.12 or 3.13: make PYTHON=python3.11 … (docs/faq.md says where to get one)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# pip install --editable .[cpu,EXTRAS], or .[cuda,EXTRAS]. The files of the two ONNX Runtime wheels overlap: to replace
# one by the other, both have to be removed first.
define install
@if $(BIN)/python -m pip show --quiet $(OTHER_RUNTIME) 2>/dev/null; then \
	$(BIN)/python -m pip uninstall --yes onnxruntime onnxruntime-gpu; fi
$(BIN)/python -m pip install --editable ".[$(DEVICE),$(1)]"
@touch $@
endef

# Changes only with the device and with Python, for which packages are then installed again; a new Python needs its own pip.
$(VENV)/.device: FORCE | $(BIN)/python
	@now="$(DEVICE), $$($(BIN)/python -c 'import sys; print("Python %d.%d" % sys.version_info[:2])')"; test "$$(cat $@ 2>/dev/null)" = "$$now" || \
	{ $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV); echo "$$now" > $@; }

$(VENV)/.serve: pyproject.toml $(VENV)/.device | $(BIN)/python
	$(call install,torchserve)

$(VENV)/.fit: pyproject.toml $(VENV)/.device | $(BIN)/python
	$(call install,torchserve$(comma)fit)

$(VENV)/.docs: pyproject.toml $(VENV)/.device | $(BIN)/python
	$(call install,docs)

$(VENV)/.test: pyproject.toml $(VENV)/.device | $(BIN)/python
	$(call install,dev)
	@touch $(VENV)/.serve $(VENV)/.fit $(VENV)/.docs

$(VENV)/.bench: $(VENV)/.test
	$(call install,dev$(comma)bench)

comma := ,
