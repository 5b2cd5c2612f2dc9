# What people and CI type. `make install`, then `make demo` or `make test`.
#
# Everything that is made lies below this folder (.venv, .aiida, build): `make clean` removes it.
# System packages are the exception; see .ci/system-packages.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# The extras that a checkout gets: everything, with the tools of `make test`.
EXTRAS := all,mace,tests,lint
# Python compiles the modules that are used when they are: pip would compile all, for a minute more.
# Where this is set, as in many containers, it keeps nothing: each job would compile torch again, in
# ten seconds instead of two.
unexport PYTHONDONTWRITEBYTECODE
PIP_OPTIONS := --quiet --quiet --no-compile --disable-pip-version-check
TORCH := torch==2.13.0
KIMPY := kimpy==2.1.4
INSTALLED := $(VENV)/.installed
KIMPY_LOG := build/kimpy.log

# The demo's own profile. Never the profile of the user.
export AIIDA_PATH := $(CURDIR)/.aiida
# `verdi`, `pw.x` and the rest, also for the daemon and the jobs it starts.
export PATH := $(BIN):$(PATH)

.PHONY: help install system demo setup test lint bench-label bench-label-bulk bench-training \
  bench-injection bench-injection-full bench-committee bench-device \
  test-cluster bench-active-learning bench-active-learning-full bench-workchain bench-scale bench-scale-full bench-kill \
  bench-overhead bench-overhead-full bench-memory \
  clean

help:
	@echo 'make install   system packages where that is possible, then .venv with everything'
	@echo 'make demo      install, set up a profile, run a small active-learning loop, write its report'
	@echo 'make test      install, then every check and test; the same as CI'
	@echo 'make test-cluster  a loop on Slurm over ssh, with accidents; see tests/cluster/run'
	@echo 'make lint      install, then the checks without the tests'
	@echo 'make bench-label, make bench-label-bulk   how fast EIPs label; see benchmarks/'
	@echo 'make bench-training   how well a network learns from scratch in four minutes'
	@echo 'make bench-committee  what a committee costs, against one member'
	@echo 'make bench-device     how fast networks learn and predict here, on a GPU too, against mace-torch'
	@echo 'make bench-active-learning, make bench-active-learning-full   DFT points that are worth asking for'
	@echo 'make bench-workchain  whether a loop on AiiDA asks for what the same loop without it asks for'
	@echo 'make bench-scale, make bench-scale-full   large pools and a long loop: time, memory, nodes, disk'
	@echo 'make bench-overhead, make bench-overhead-full   what AiiDA costs for each DFT point and iteration'
	@echo 'make bench-memory     memory of a batch by neighbours, which batch_edges bounds'
	@echo 'make bench-kill       what a loop loses when its daemon is killed ten times'
	@echo 'make bench-injection, make bench-injection-full   what EIPs are worth to a network'
	@echo 'make clean     remove what was made here, the demo and its data too'

install: $(INSTALLED)

system:
	@PYTHON='$(PYTHON)' .ci/system-packages

# A stamp, so that a second call takes a second; anew when the dependencies change.
$(INSTALLED): pyproject.toml Makefile | system
	@echo '== Python environment: $(VENV)'
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"aiida-eipnn needs Python 3.11 or newer, but $(PYTHON) is {v.major}.{v.minor}; say which to use: make install PYTHON=python3.12")'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python .ci/install-kimpy '$(KIMPY)' $(KIMPY_LOG)
	@echo '== aiida-eipnn with its dependencies (the largest is torch)'
	@$(BIN)/python -m pip install $(PIP_OPTIONS) '$(TORCH)' '$(KIMPY)' --editable '.[$(EXTRAS)]'
	@touch $@
	@echo '== installed; the commands are in $(VENV)/bin'

setup: install
	@aiida-eipnn setup

demo: setup
	@echo '== active learning with the demo protocol'
	@verdi run workflows/active_learning.py --protocol demo \
	  --pw-code pw@localhost --job-code eipnn-job@localhost --report demo-report.html
	@echo '== the report: $(CURDIR)/demo-report.html'

lint: install
	ruff check
	ruff format --check
	mypy
	lint-imports

# The tests make profiles of their own; this keeps AiiDA from making a folder in the user's home.
test: export AIIDA_PATH := $(CURDIR)/build/test/.aiida
# Three processes of one thread each, which now and then wait for jobs; the tests of a file stay
# together, as they share whole loops.
test: export OMP_NUM_THREADS := 1
test: lint
	@mkdir -p $(AIIDA_PATH)
	pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# Slurm, ssh, PostgreSQL and RabbitMQ on this machine: as root on Debian 12, with these scripts.
CLUSTER ?= ../shared/cluster
test-cluster: install
	tests/cluster/run $(CLUSTER)

# One thread: the tables compare CPU time.
bench-label: export OMP_NUM_THREADS := 1
bench-label: install
	python benchmarks/label.py

bench-label-bulk: setup
	python benchmarks/label_bulk.py

bench-training: export OMP_NUM_THREADS := 1
bench-training: install
	python benchmarks/training.py

# Two processes of one thread each; CPU times are part of the results.
bench-injection bench-injection-full: export OMP_NUM_THREADS := 1
bench-injection: install
	python benchmarks/injection.py --quick --output build/bench-injection/quick.json

bench-active-learning bench-active-learning-full: export OMP_NUM_THREADS := 1
bench-active-learning: install
	python benchmarks/active_learning.py --quick --output build/bench-injection/active-quick.json

bench-active-learning-full: install
	python benchmarks/active_learning.py

bench-workchain: export OMP_NUM_THREADS := 1
bench-workchain: install
	python benchmarks/workchain_arm.py

bench-kill: export OMP_NUM_THREADS := 1
bench-kill: install
	python benchmarks/kill.py

bench-committee: export OMP_NUM_THREADS := 1
bench-committee: install
	python benchmarks/committee.py

bench-device: install
	python benchmarks/device.py

bench-memory: install
	python benchmarks/memory.py

bench-scale bench-scale-full: export OMP_NUM_THREADS := 1
bench-scale: install
	python benchmarks/scale.py --quick --output build/bench-scale/quick.json

bench-scale-full: install
	python benchmarks/scale.py

bench-overhead bench-overhead-full: export OMP_NUM_THREADS := 1
bench-overhead: install
	python benchmarks/overhead.py --quick --output build/bench-overhead/quick.json

bench-overhead-full: install
	python benchmarks/overhead.py

bench-injection-full: install
	python benchmarks/injection.py
	python benchmarks/injection_report.py

clean:
	@if [ -x $(BIN)/verdi ] && [ -d .aiida ]; then verdi daemon stop --all >/dev/null 2>&1 || true; fi
	rm -rf $(VENV) .aiida build demo-report.html
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
