.PHONY: demo test ci format clean

demo:  ## train the small model within a small budget, from nothing
	scripts/demo

test:  ## run the tests
	scripts/test

ci:  ## tests, lint, format, types
	.ci/run

format:  ## let ruff mend what it can
	.venv-test/bin/ruff check --fix .
	.venv-test/bin/ruff format .

clean:  ## remove environments, runs and caches
	rm -rf .venv .venv-test runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
