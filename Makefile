# Everything a newcomer needs: `make demo`, then `make test`. Each target installs what it uses into .venv.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs
FLAGS ?=
# What other packages' versions matter to: graphs, run-time, files, server. The rest is ours.
OLDEST := $(patsubst %,tests/test_%.py,affine backend_ort bundle cast doctor inferring plan qdq runtime serve signing sites \
  to_onnx trust)

.PHONY: demo test pytest test-oldest gpu lint bench bench-peers bench-serving accuracy simulated ablation spdfq steps \
  generators float-body int4 large latency scaling coverage docs clean

demo: .venv/export.stamp
	$(BIN)/dfq-deploy export --model demo --calib synthetic --backend ort --out $(OUT)/demo

test: lint pytest

pytest: .venv/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

# The oldest versions that pyproject.toml lets in, in an environment of their own.
test-oldest: .venv-oldest/test.stamp
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest -n auto --dist worksteal $(OLDEST)

gpu: .venv/test.stamp
	$(BIN)/pytest tests/gpu -rs

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: .venv/test.stamp
	$(BIN)/python benchmarks/speed.py --out $(OUT)/speed.json
	$(BIN)/python benchmarks/memory.py --out $(OUT)/memory.json

bench-peers: .venv/test.stamp
	$(BIN)/python -m benchmarks.peers.run --out $(OUT)/peers

bench-serving: .venv/test.stamp
	$(BIN)/python benchmarks/serving.py --out $(OUT)/serving.json

coverage: .venv/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.coverage --out $(OUT)/coverage $(FLAGS)

accuracy: .venv/test.stamp
	$(BIN)/python benchmarks/accuracy.py --out $(OUT)/accuracy $(FLAGS)

simulated: .venv/test.stamp
	$(BIN)/python benchmarks/simulated.py --out $(OUT)/simulated $(FLAGS)

ablation: .venv/test.stamp
	$(BIN)/python benchmarks/ablation.py --out $(OUT)/ablation $(FLAGS)

spdfq: .venv/test.stamp
	$(BIN)/python benchmarks/spdfq.py --out $(OUT)/spdfq

steps: .venv/test.stamp
	$(BIN)/python benchmarks/steps.py --out $(OUT)/steps

generators: .venv/test.stamp
	$(BIN)/python examples/compare_generators.py --out $(OUT)/generators $(FLAGS)

float-body: .venv/test.stamp
	$(BIN)/python benchmarks/float_body.py --out $(OUT)/float-body

int4: .venv/test.stamp
	$(BIN)/python benchmarks/int4.py --out $(OUT)/int4 $(FLAGS)

large: .venv/test.stamp
	$(BIN)/python benchmarks/large.py --out $(OUT)/large $(FLAGS)

latency: .venv/test.stamp
	$(BIN)/python benchmarks/latency.py --out $(OUT)/latency.json

scaling: .venv/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/scaling.py --random-weights --out $(OUT)/scaling.json

docs: .venv/docs.stamp
	$(BIN)/mkdocs build --strict --quiet --site-dir $(OUT)/site

clean:
	rm -rf .venv .venv-oldest .venv-peers $(OUT)

.venv/%.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --no-compile --editable '.[$*]'
	touch $@

.venv-oldest/test.stamp: pyproject.toml
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/pip install --quiet uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct \
	  --only-binary onnxsim --editable '.[test]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv
