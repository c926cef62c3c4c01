"""What an image costs: branches by layers and flat, flattens, and children, beside what the same
bytes cost by `write`, `cp` and FICLONE.

`python -m bench.images --help` lists the phases and what each takes. `cells` says what is measured,
`measures` how, `claims` what it is held against; every trial is kept in a CSV, and `RESULTS.md` is
written from these CSVs and nothing else.
"""
