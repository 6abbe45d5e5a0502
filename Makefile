# Every target that needs it first makes .venv, when it is missing or the requirements have changed since.

PYTHON ?= python3

.DEFAULT_GOAL := help
.PHONY: demo reproduce test faults benchmark gpu figures sync lint clean help

demo: .venv/ready  ## all steps on a small data set, on any machine, in some minutes
	.venv/bin/python scripts/demo.py

reproduce: .venv/ready  ## the published scores, from DISC21 and the author's weights; in .venv; says what is missing; ARGS=--plan, ARGS=--train
	.venv/bin/python scripts/reproduce.py $(ARGS)

# Three processes keep two cores busy: a test waits a fifth of its time.
test: .venv/ready  ## all tests
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

faults: .venv/ready  ## many more faults than the tests inject: kills, full disks, damaged files; at most 15 minutes
	.venv/bin/python -m pytest tests/faults --long

benchmark: .venv/ready  ## how fast each part is, against the published way of doing it; at most 10 minutes
	.venv/bin/python scripts/dev/benchmark.py

gpu: .venv/ready  ## on a machine with a GPU: its tests, memory and speed, into gpu-report.md
	@.venv/bin/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make: error: torch sees no CUDA device")'
	rm -f gpu-report.md
	PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:512 .venv/bin/python -m pytest -m gpu tests --gpu-report gpu-report.md; \
	tests=$$?; \
	.venv/bin/python scripts/dev/benchmark.py training-step search evaluation-search ranks >> gpu-report.md; \
	benchmark=$$?; cat gpu-report.md; exit $$((tests | benchmark))

# `report` runs the demo with three seeds, up to half an hour, and prints the means, in the form of docs/EVIDENCE.md, "The demo".
# `edits` prints the table of docs/MATCHING.md, "Kinds of edits". Both go into the pages by hand, the best values in bold. No
# other table of docs/ is redrawn here.
figures: .venv/ready  ## redraw docs/report.png and, with PHOTOS=FOLDER, docs/edits.png; print the tables beside them
	.venv/bin/python scripts/dev/draw_figures.py report
	$(if $(PHOTOS),.venv/bin/python scripts/dev/draw_figures.py edits "$(PHOTOS)",@echo 'docs/edits.png is not redrawn: it needs PHOTOS=FOLDER')

sync: .venv/ready  ## copy the infrastructure of exp/v83.py to the other stages
	.venv/bin/python scripts/dev/sync_infrastructure.py

lint: .venv/ready  ## style and common mistakes
	.venv/bin/ruff check
	.venv/bin/ruff format --check

clean:  ## remove what these targets made; never input/, checkpoints or descriptors
	rm -rf .venv demo .pytest_cache .ruff_cache .hypothesis
	find exp scripts tests -name __pycache__ -prune -exec rm -rf {} +

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

# The stamp is touched last, so that an interrupted installation is taken up again.
.venv/ready: requirements-base.txt requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: error: $(PYTHON): Python 3.11 or newer is needed, this is %d.%d; name another with make PYTHON=..." % sys.version_info[:2])'
	@echo 'Installing the requirements into .venv: once, some minutes, about 6 GB'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@touch $@
