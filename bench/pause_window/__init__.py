"""The phases of the pause window: forkpoint, the floor and `sequential-disk` in one run.

`python -m bench.pause_window --help` lists the phases and what each takes. `cells` says what is
measured, `subjects` how each role takes a window, `rows` keeps every trial in a CSV, and
`RESULTS.md` is written from these CSVs and nothing else.
"""
