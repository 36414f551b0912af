# Everything a newcomer needs: `make demo`, then `make test`. Each target installs what it uses into .venv.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs
FLAGS ?=

.PHONY: demo test gpu lint bench bench-peers bench-serving accuracy simulated spdfq generators float-body int4 latency scaling \
  docs clean

demo: .venv/export.stamp
	$(BIN)/dfq-deploy export --model demo --calib synthetic --backend ort --out $(OUT)/demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

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

accuracy: .venv/test.stamp
	$(BIN)/python benchmarks/accuracy.py --out $(OUT)/accuracy

simulated: .venv/test.stamp
	$(BIN)/python benchmarks/simulated.py --out $(OUT)/simulated

spdfq: .venv/test.stamp
	$(BIN)/python benchmarks/spdfq.py --out $(OUT)/spdfq

generators: .venv/test.stamp
	$(BIN)/python examples/compare_generators.py --out $(OUT)/generators $(FLAGS)

float-body: .venv/test.stamp
	$(BIN)/python benchmarks/float_body.py --out $(OUT)/float-body

int4: .venv/test.stamp
	$(BIN)/python benchmarks/int4.py --out $(OUT)/int4

latency: .venv/test.stamp
	$(BIN)/python benchmarks/latency.py --out $(OUT)/latency.json

scaling: .venv/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/scaling.py --random-weights --out $(OUT)/scaling.json

docs: .venv/docs.stamp
	$(BIN)/mkdocs build --strict --quiet --site-dir $(OUT)/site

clean:
	rm -rf .venv .venv-peers $(OUT)

.venv/%.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[$*]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv
