"""`python -m sandbox`: the same as the command `sandbox`."""

from sandbox.cli import main

# `SystemExit` is looked up before `main` runs: `sandbox run` gives this module's name space to the user's script.
raise SystemExit(main())
