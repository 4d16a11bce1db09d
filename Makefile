# make install | demo | test: each works in a fresh clone; see README.md.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := runs/demo

.PHONY: install demo test lint slow clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	@rm -rf $(DEMO)
	$(BIN)/bardling train quickstart --out $(DEMO)
	@echo; echo "A function generated from the prompt '    def':"; echo
	@$(BIN)/bardling sample $(DEMO) --prompt '    def' --max_new_tokens 160 --seed 1
	@echo; echo "Evaluation on files it has never seen, compared with compressors:"; echo
	@$(BIN)/bardling eval $(DEMO)
	@echo; echo "Try next:"
	@echo "  $(BIN)/bardling resume $(DEMO) --train.steps 900     # continue training"
	@echo "  $(BIN)/bardling sample $(DEMO) --prompt 'import ' --num_samples 3"
	@echo "  $(BIN)/bardling train quickstart --data.source FOLDER_OR_FILE --out runs/mine   # your own text"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/house.py

# One thread per process: the tensors in tests are tiny, and pytest-xdist runs one process per core.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) build src/*.egg-info
