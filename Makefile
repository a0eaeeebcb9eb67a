# make demo: set up, draw faces, train on them, validate.
# make test: set up, run the tests that are not slow; a part with ARGS=tests/test_head.py; the slow ones with MARK=slow.
# make lint: ruff and mypy.
# make fuzz: try 10,000 damaged inputs of each reader; one reader with ARGS="-k carray".

# The first Python that all pinned packages have wheels for.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
MARK ?= not slow
# Without these, glibc returns memory to the kernel after each operation of a network, and gets it back for the next.
MALLOC := MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_TOP_PAD_=100000000

.PHONY: demo test fuzz lint clean

demo: .venv/ready
	$(BIN)/python -m applications.demo --out data/demo
	$(BIN)/python train.py --config applications/demo/demo.yaml
	$(BIN)/python validation.py --data_dir data/demo --gpu_num cpu --plot log/demo_roc.png

test: .venv/ready-dev
	$(MALLOC) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -m "$(MARK)" $(ARGS)

fuzz: .venv/ready-dev
	FUZZ_INPUTS=10000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_fuzz.py -n auto --maxprocesses 4 $(ARGS)

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: requirements.txt
	@test -n "$(PYTHON)" || { echo "error: no Python from 3.11 to 3.14 found. Install one, or name it: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv
