# Everything to set up and run the project. `make` alone lists the targets.
.DEFAULT_GOAL := help
.PHONY: help setup setup-team repro check test test-team committed ci seeds soak mutate bench ladder clean

# The Python that builds .venv, 3.11 or newer; name another with `make PYTHON=python3.12 …`.
PYTHON ?= python3
export PYTHON

# Stages call `python`, so the environment comes first on the path; the path may contain spaces or quotes,
# because the shell, not make, inserts it. Many containers set PYTHONDONTWRITEBYTECODE; each process would then
# compile torch and MLflow again, which takes longer than the rest of their import.
ACTIVATE := PATH="$$PWD/.venv/bin:$$PATH" VIRTUAL_ENV="$$PWD/.venv" PYTHONDONTWRITEBYTECODE=

# Installs into .venv. uv takes seconds where pip takes minutes; the user's own is used, or one in .venv. If it
# is unavailable or fails (it does not read pip's settings, which may name a mirror), pip installs instead.
PIP_INSTALL := python -m pip install --quiet --disable-pip-version-check
INSTALL := @export $(ACTIVATE); install() { \
	    { command -v uv && uv pip install --quiet "$$@"; } >/dev/null || $(PIP_INSTALL) "$$@" || { \
	        echo "error: cannot install $$*: expected a network that reaches a package index, or a mirror" \
	            "in UV_DEFAULT_INDEX or pip's settings; with one of these, run make again" >&2; exit 1; }; }; install

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' Makefile | expand -t 18

setup: .venv/ready ## make .venv and install the locked dependencies
setup-team: .venv/team ## the same, plus what team/ needs
repro: .venv/ready ## run the pipeline: only what changed reruns
	@$(ACTIVATE) python -m fashion_cnn repro

# Tests of a file stay in one process, in order, because they share fixtures that take a minute to make. Not
# loadgroup: pytest 9.2 does not see how pytest-xdist 3.8 marks groups. Files run in their own order, because
# xdist's would start those with few tests last, and two of these take the longest.
PARALLEL := --numprocesses auto --dist loadfile --no-loadscope-reorder

check: .venv/ready ## lint, types and the fast tests, in two minutes
	$(ACTIVATE) ruff check .
	$(ACTIVATE) ruff format --check .
	$(ACTIVATE) mypy
	$(ACTIVATE) python -m pytest $(PARALLEL) -m 'not slow and not committed and not team'

test: .venv/browser check ## the same, then all other tests except those of test-team
	$(ACTIVATE) python -m pytest $(PARALLEL) -m 'slow and not committed'
	@echo 'the tests of team/ were left out: make test-team'

test-team: .venv/team .venv/servers ## the tests of team/, with servers on 127.0.0.1
	$(ACTIVATE) python -m pytest $(PARALLEL) -m team

# Only for maintainers and CI, because users' trees may hold any params and results.
committed: .venv/ready ## check that committed code, params, results and pages agree; run the pages' commands
	$(ACTIVATE) python -m pytest $(PARALLEL) -m committed

# One run instead of three, so that cores wait only once for the last test. The fast tests run before the team's
# packages are installed, because most users do not have these.
ci: .venv/browser check .venv/team .venv/servers ## all of these, as CI runs them
	$(ACTIVATE) python -m pytest $(PARALLEL) -m 'slow or team or committed'

seeds: .venv/ready ## train and evaluate with five seeds (half an hour): benchmarks/seeds.csv, the README's table
	$(ACTIVATE) python -m fashion_cnn.commands.seeds

soak: .venv/ready ## kill processes and damage files for half an hour or more, and print what was lost
	$(ACTIVATE) python tests/helpers/soak.py

# The constraint keeps mutmut's requirements from changing locked packages. MUTANTS="'fashion_cnn.lesson.toy*'"
# selects the mutants of one module, and `mutmut show NAME` prints one.
mutate: .venv/ready ## mutation testing: list small faults in fashion_cnn that no fast test notices (an hour)
	$(INSTALL) --constraint requirements.lock mutmut==3.8.1
	$(ACTIVATE) mutmut run --max-children 2 $(MUTANTS)
	$(ACTIVATE) mutmut results | grep -v 'not checked'

bench: .venv/ready ## compare speed with the lesson's own loops (one to two hours, quiet machine): benchmarks/results.md
	$(ACTIVATE) python benchmarks/run.py

ladder: .venv/ready ## measure what each idea buys (hours, quiet machine): benchmarks/ladder.csv, docs/pictures
	@$(ACTIVATE) python benchmarks/ladder.py

clean: ## remove .venv; data, models, runs and the DVC cache stay
	rm -rf .venv

# An environment holds absolute paths, so one that was moved or copied with its folder is rebuilt.
$(shell [ ! -e .venv/ready ] || [ "$$(cat .venv/ready)" = "$$(pwd -P)" ] || \
    { echo '.venv was made in another folder and will be rebuilt' >&2; rm -f .venv/ready; })

# Written last, so a set-up that was interrupted starts again.
.venv/ready: requirements.lock requirements-imgaug.lock
	@"$$PYTHON" -c 'import os, sys; sys.exit(sys.version_info < (3, 11) and \
	    "error: %s is Python %s, expected 3.11 or newer: make PYTHON=..." \
	    % (os.environ["PYTHON"], sys.version.split()[0]))'
	rm -rf .venv
	"$$PYTHON" -m venv .venv
	@command -v uv >/dev/null || $(ACTIVATE) $(PIP_INSTALL) uv==0.13.9 || \
	    echo 'uv cannot be installed: the set-up takes minutes instead of seconds'
	@echo 'installing the packages of requirements.lock into .venv'
	$(INSTALL) -r requirements.lock
	$(INSTALL) --no-deps -r requirements-imgaug.lock
	$(INSTALL) --no-deps --no-build-isolation --editable .
	@pwd -P > .venv/ready

# Separate, because a training needs none of it.
.venv/team: team/requirements.lock .venv/ready
	$(INSTALL) --constraint requirements.lock -r team/requirements.lock
	@touch .venv/team

# Separate, because only tests start a team's servers here. These tests also need Debian's postgresql and caddy,
# and are skipped without them.
.venv/servers: team/requirements-servers.lock team/deploy/requirements.lock .venv/ready
	$(INSTALL) --constraint requirements.lock -r team/requirements-servers.lock -r team/deploy/requirements.lock
	@touch .venv/servers

# Separate, because it is large and only tests of pages need it; they are skipped without Chromium.
.venv/browser: requirements-browser.lock .venv/ready
	$(INSTALL) -r requirements-browser.lock
	@touch .venv/browser
