# make demo   the main job on the embedded default: base and fine-tuned model, compared
# make test   every test, real models included
# make check  lint, types and the tests that take less than half a second
# make docs   the site, in the folder site

PYTHON ?= python3
# Only PyTorch's own index has the CPU build of torch. Where it cannot be reached, pip warns of each try and then looks for
# the same wheel in the other places of its configuration: its warnings are shown only if there is none.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP = .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps

# Otherwise every process of the tests compiles all modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check docs clean
demo: .venv/installed
	.venv/bin/python -m sftlab

# Real models, three tests at a time: a thread more in each would only wait for the others.
test: .venv/tested
	scripts/check -m "not smoke and not gpu"
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests -m smoke -n 3 --dist loadscope --no-loadscope-reorder

check: .venv/tested
	scripts/check

docs: .venv/documented
	scripts/docs

# Two stamps, rebuilt only when a lock or pyproject.toml has changed: what the demo needs, and what the tests need on
# top of it (the launchers and Optuna, which they run).
.venv/installed: locks/torch-cpu.lock locks/cpu.lock pyproject.toml
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo "Installing the locked packages into .venv (about three minutes, once) …"
	@$(PIP) --require-hashes --retries 1 --extra-index-url $(TORCH_INDEX) -r locks/torch-cpu.lock 2>.venv/pip.log \
		|| { cat .venv/pip.log >&2; exit 1; }
	@$(PIP) --require-hashes -r locks/cpu.lock
	@$(PIP) --no-build-isolation --editable .
	@touch $@

EXTRAS = locks/optuna.lock locks/ray.lock locks/slurm.lock locks/joblib.lock
.venv/tested: .venv/installed $(EXTRAS)
	@$(PIP) --require-hashes $(addprefix -r ,$(EXTRAS))
	@touch $@

# The site needs no package of sftlab, and its lock does not contradict the others.
.venv/documented: locks/docs.lock
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@$(PIP) --require-hashes -r locks/docs.lock
	@touch $@

clean:
	rm -rf .venv
