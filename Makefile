# `make train` and `make test` do all the set-up on a fresh machine; installing is skipped when nothing changed.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
CONFIG ?= configs/quickstart.yaml
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_CONSTRAINT := constraints.txt

.PHONY: train test test-faults install clean

train: $(INSTALLED)
	$(VENV)/bin/polyclinic train $(CONFIG) $(ARGS)

test: $(INSTALLED)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

# All that tests/faults does to a run; FAULT_TABLE names a file for rows of fault, lost updates, seconds to recover.
test-faults: $(INSTALLED)
	POLYCLINIC_FAULT_TABLE=$(FAULT_TABLE) $(VENV)/bin/python -m pytest tests/faults -m '' -v $(ARGS)

install: $(INSTALLED)

# Without an NVIDIA driver the CPU build of torch is taken: from the configured package index where it has one, else
# from PyTorch's own.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@if nvidia-smi -L >/dev/null 2>&1; then \
		echo "NVIDIA driver found: installing the CUDA build of torch $(TORCH)"; \
		$(VENV)/bin/pip install --quiet torch==$(TORCH); \
	else \
		echo "no NVIDIA driver: installing the CPU build of torch $(TORCH)"; \
		$(VENV)/bin/pip install --quiet --no-deps torch==$(TORCH)+cpu 2>/dev/null || \
		$(VENV)/bin/pip install --quiet --no-deps --index-url https://download.pytorch.org/whl/cpu torch==$(TORCH); \
	fi
	$(VENV)/bin/pip install --quiet --editable '.[data,curate,gguf,dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) runs
