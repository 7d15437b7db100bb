# Each target makes .venv and installs into it on its own, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Other libraries to compare with. In a folder of their own, without what they pin: torchattacks wants requests of 2020.
PEERS := .peers
RUNTIMES := .peers-runtimes
RUNTIME_PACKAGES := onnx onnx_ir onnxscript onnxruntime openvino openvino-telemetry ml_dtypes flatbuffers protobuf
PEER_PACKAGES := torchattacks==3.5.1 foolbox==3.3.4 eagerpy==0.30.0 GitPython gitdb smmap \
	adversarial-robustness-toolbox==1.20.1 six
# nncf.strip imports torchao, which NNCF does not ask for; openvino-telemetry, which it asks for, is what it sends with.
PRUNING_PEERS := .peers-pruning
PRUNING_PEER_PACKAGES := nncf==3.4.0 torchao==0.18.0 pydot==4.0.1 tabulate==0.10.0 torch-pruning==1.6.1
# An environment of its own: it wants numpy below 2, and Python below 3.12.
DEEPSPARSE := .peers-deepsparse

# The oldest versions that pyproject.toml allows, in a folder of their own. Python 3.11 and 3.12 have wheels of them.
OLDEST := .venv-oldest
# Two processes, each with whole files: what the tests of a file share is made once. The longest come first (tests/conftest.py).
PYTEST := -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
# Nothing that pushes to a Hub, nothing of several processes, no rows of other libraries' architectures.
FAST := tests/method tests/data tests/artifact --ignore tests/artifact/repository --ignore-glob '*shard*' \
	--ignore-glob '*/test_slim*' --ignore tests/artifact/models/test_loading_models.py

.PHONY: demo shelf shelf-digits docs test test-launched test-fast test-oldest test-faults test-peers test-runtimes test-sanitizers lint bench bench-constraints bench-slimming \
	bench-adversary bench-peers bench-packing bench-pruning bench-training bench-inputs bench-inference bench-deepsparse bench-sweep clean

demo: $(STAMP)
	rm -rf outputs/vit-digits-demo outputs/vit-digits-demo-dense-twin  # of a demo before
	$(BIN)/python recipes/vit_cifar10.py --config recipes/configs/vit_digits_demo.yaml

# What is published of the folder FROM, packed, as recipes/models/NAME, with a card of what lies there; PACK: `tscnc pack --help`.
shelf: $(STAMP)
	test -n "$(FROM)" && test -n "$(NAME)"
	rm -rf "recipes/models/$(NAME)"
	$(BIN)/tscnc pack "$(FROM)" --output "recipes/models/$(NAME)" --compression zstd $(PACK)
	$(BIN)/tscnc card "recipes/models/$(NAME)"

shelf-digits: $(STAMP)
	rm -rf outputs/vit-digits-90 outputs/vit-digits-90-dense-twin
	$(BIN)/python recipes/vit_cifar10.py --config recipes/configs/vit_digits_demo.yaml \
		--test_attacks clean pgd-20 autoattack --output_dir outputs/vit-digits-90
	$(MAKE) shelf FROM=outputs/vit-digits-90 NAME=vit-digits-90

test: $(STAMP)
	$(BIN)/python $(PYTEST)

# Whole runs, as users start them: recipes and their configurations, the examples of README and docs, accelerate's
# configurations, shared weights, workers, kills and time limits.
test-launched: $(STAMP)
	$(BIN)/python $(PYTEST) -m launched

test-fast: $(STAMP)
	$(BIN)/python $(PYTEST) $(FAST)

# The fast tests, and a training that accumulates gradients.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python $(PYTEST) -m "not faults" $(FAST) tests/training/test_layouts.py

test-faults: $(STAMP)
	$(BIN)/python -m pytest -m faults

# Kernels under AddressSanitizer and UndefinedBehaviorSanitizer, 1,000 calls with arguments drawn at random.
test-sanitizers: $(STAMP)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/python -m tests.inference.fuzz 1000

test-peers: $(STAMP) $(PEERS)/.installed $(PRUNING_PEERS)/.installed
	PYTHONPATH=$(PEERS):$(PRUNING_PEERS) $(BIN)/python -m pytest tests/peers

test-runtimes: $(STAMP) $(RUNTIMES)/.installed
	PYTHONPATH=$(RUNTIMES) $(BIN)/python -m pytest tests/inference

# All figures of speed, memory and size that the README states, one after the other, on an idle machine.
bench: bench-constraints bench-training bench-adversary bench-pruning bench-packing bench-slimming bench-inputs bench-inference

bench-adversary: $(STAMP) $(PEERS)/.installed
	PYTHONPATH=$(PEERS) $(BIN)/python tests/benchmarks/adversary.py

bench-pruning: $(STAMP)
	$(BIN)/python tests/benchmarks/pruning.py

# Trains for most of an hour, and needs CIFAR-10: no part of `make bench`.
bench-peers: $(STAMP) $(PRUNING_PEERS)/.installed
	PYTHONPATH=$(PRUNING_PEERS) $(BIN)/python tests/benchmarks/pruning_peers.py

# Beside other runtimes, in a folder of their own.
bench-inference: $(STAMP) $(RUNTIMES)/.installed
	PYTHONPATH=$(RUNTIMES) $(BIN)/python tests/benchmarks/inference.py
	PYTHONPATH=$(RUNTIMES) $(BIN)/python tests/benchmarks/inference.py --models half_resnet18 half_vit_small \
		--zeros 0 0.9 --threads 2 --folders $(wildcard recipes/models/*)

bench-deepsparse: $(STAMP) $(RUNTIMES)/.installed $(DEEPSPARSE)/.installed
	PYTHONPATH=$(RUNTIMES):$(CURDIR) $(BIN)/python tests/benchmarks/inference_deepsparse.py --python $(DEEPSPARSE)/bin/python

# Whether a compiled model is ever slower than what it was made from: about half an hour.
bench-sweep: $(STAMP)
	$(BIN)/python tests/benchmarks/inference_sweep.py

bench-constraints: $(STAMP)
	$(BIN)/python tests/benchmarks/constraints.py

bench-slimming: $(STAMP)
	$(BIN)/python tests/benchmarks/slimming.py

bench-packing: $(STAMP)
	$(BIN)/python tests/benchmarks/packing.py

bench-training: $(STAMP)
	$(BIN)/python tests/benchmarks/training.py

bench-inputs: $(STAMP)
	$(BIN)/python tests/benchmarks/large_inputs.py

# The site, into build/site. Anew from the beginning: what is kept of a build before is not warned of again.
docs: $(VENV)/.docs-installed
	$(BIN)/sphinx-build --fail-on-warning --keep-going --fresh-env --quiet -d build/doctrees docs build/site

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(STAMP): pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.docs-installed: pyproject.toml | $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

$(OLDEST)/.installed: pyproject.toml
	test -d $(OLDEST) || $(PYTHON) -m venv $(OLDEST)
	grep -oE '"[A-Za-z0-9_-]+>=[0-9.]+"' pyproject.toml | grep -v setuptools | tr -d '"' | sed 's/>=/==/' \
		> $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt --editable '.[test]'
	touch $@

$(PEERS)/.installed: Makefile | $(STAMP)
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(PEERS) $(PEER_PACKAGES)
	touch $@

$(PRUNING_PEERS)/.installed: Makefile | $(STAMP)
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(PRUNING_PEERS) $(PRUNING_PEER_PACKAGES)
	touch $@

$(RUNTIMES)/.installed: Makefile | $(STAMP)
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(RUNTIMES) $(RUNTIME_PACKAGES)
	touch $@

$(DEEPSPARSE)/.installed: Makefile
	$(PYTHON) -m venv $(DEEPSPARSE)
	$(DEEPSPARSE)/bin/python -m pip install --quiet deepsparse==1.8.0
	touch $@

clean:
	rm -rf $(DEEPSPARSE) $(VENV) $(OLDEST) $(PEERS) $(PRUNING_PEERS) $(RUNTIMES) outputs build *.egg-info
