.PHONY: demo test bench ci format clean

demo:  ## train the small model within a small budget, from nothing
	scripts/demo

test:  ## run the tests
	scripts/test

bench:  ## the short set of benchmarks, peers included; rewrites README's figures
	scripts/bench

ci:  ## tests, lint, format, types
	.ci/run

format:  ## let ruff mend what it can
	.venv-test/bin/ruff check --fix .
	.venv-test/bin/ruff format .

clean:  ## remove environments, runs and caches
	rm -rf .venv .venv-test .venv-peers bench-spill runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
