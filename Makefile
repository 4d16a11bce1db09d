# make install | demo | test — each works in a fresh clone; see README.md.
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
	@echo; echo "A function that it makes up, from '    def':"; echo
	@$(BIN)/bardling sample $(DEMO) --prompt '    def' --max_new_tokens 160 --seed 1
	@echo; echo "How well it predicts files that it has never seen, beside what compressors make of them:"; echo
	@$(BIN)/bardling eval $(DEMO)
	@echo; echo "Try next:"
	@echo "  $(BIN)/bardling resume $(DEMO) --train.steps 900     # train it further, from where it stands"
	@echo "  $(BIN)/bardling sample $(DEMO) --prompt 'import ' --num_samples 3"
	@echo "  $(BIN)/bardling train quickstart --data.source FOLDER_OR_FILE --out runs/mine   # your own text"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread a process: the tests' tensors are tiny, and as many tests run at once as there are cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) build src/*.egg-info
