"""What a run will hold in memory, phase by phase, and keeping it under its budget.

`plan` is the table, `peaks` and `footprint` the arithmetic over an `architecture`; `guard` obeys it in a run.
"""
