"""The corpus: many small things to compile, each under Inductor's NORMAL and in the sandbox, side by side.

python -m benchmarks.corpus --help          (also: sandbox bench --corpus --help)
"""
