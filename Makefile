# make demo | test | coverage | check | docs | bench: each makes .venv when it is missing and reuses it when not.
# make lowest | newest: the tests in an environment of their own, on other versions than those of constraints.txt.
# JOBS=1 runs the tests in one process instead of two.
PYTHON ?= python3
BIN := .venv/bin
RUNS := runs/demo
TASK ?= textbias_probe
JOBS ?= 2
# One thread: the models here are so small that threads wait for each other.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 0
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test coverage lowest newest check docs bench clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The main job on the bundled model: base, MaLoRA and its two controls through lmms-eval, then the joined report.
# lmms-eval's own tables go to log files; it exits 0 on failure, and then `compare` names the run that is missing.
ADAPTER = $$($(BIN)/python -c "from lmms_keyspace import embedded; print(embedded.adapter_path('$(1)'))")
EVALUATE = $(BIN)/lmms-eval --tasks $(TASK) --batch_size 8 --log_samples --verbosity WARNING \
	--model $(2) --output_path $(RUNS)/$(1) $(3) > $(RUNS)/$(1).log
ARMS := $(addprefix $(RUNS)/,base malora lora malora_no_mmd)
demo: .venv/installed
	rm -rf $(RUNS) && mkdir -p $(RUNS)
	$(call EVALUATE,base,keyspace_llava)
	$(call EVALUATE,malora,malora_llava)
	$(call EVALUATE,lora,keyspace_llava,--model_args peft=$(call ADAPTER,lora))
	$(call EVALUATE,malora_no_mmd,malora_llava,--model_args peft=$(call ADAPTER,malora_no_mmd))
	$(BIN)/lmms-keyspace compare $(ARMS)
	$(BIN)/lmms-keyspace report $(ARMS) --out $(RUNS)/report

check: .venv/installed docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: check
	$(BIN)/pytest -n $(JOBS)

coverage: .venv/installed
	$(BIN)/pytest -n $(JOBS) --cov

# First, and both: doctor tells a bad installation, the contracts tell in a sentence each what an upgrade took away.
lowest: PINS := --constraint constraints-lowest.txt
lowest newest:
	$(PYTHON) -m venv .venv-$@
	.venv-$@/bin/pip install --quiet --upgrade $(PINS) --editable '.[dev]'
	.venv-$@/bin/lmms-keyspace doctor; installed=$$?; .venv-$@/bin/pytest tests/test_contracts.py && exit $$installed
	.venv-$@/bin/pytest -n $(JOBS)

bench: .venv/installed
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf .venv .venv-lowest .venv-newest runs build dist *.egg-info
