"""One command per file, loaded when it is called: `run_method.py` holds the click command `command` of `run-method`.

A command parses, calls one function and prints its noun.  It imports what is heavy inside its function, because
`testbed --help` loads them all.  What it returns, if it is a number, is the exit code.
"""
