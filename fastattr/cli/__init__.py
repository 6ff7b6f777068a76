"""The command line: `fastattr --help` reads like a guide.

Results go to stdout, progress and warnings to stderr. Exit codes: 2 for what a user can mend (one line on stderr), 1 for
a receipt that differs, 130 for an interrupted command.

- `ask`: demo, generate, attribute, attribute-many, info.
- `living`: add, remove, update, compact, sign, verify, statement, serve, push, import.
- `stages`: build, plan, corpus, and one command for each stage.
- `main`: `main(argv)`, which runs one command; `output`: how results are printed.
"""
