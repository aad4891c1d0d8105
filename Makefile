# Everything is a script; these are their short names.
export MODEL PYTHON
# as it was typed: make would take $HOME in a question for a variable of its own
export PROMPT := $(value PROMPT)

.PHONY: chat test check bench clean

chat: ## talk to the demo model; PROMPT="..." asks once, MODEL=... talks to another one
	@sh scripts/install
	@sh scripts/chat

test: ## set up and run all tests
	@sh scripts/test

check: ## style, lint, types
	@sh scripts/check

bench: ## the tables of benchmarks/README.md
	@sh scripts/bench

clean: ## remove what scripts/install made
	rm -rf .venv dist build
