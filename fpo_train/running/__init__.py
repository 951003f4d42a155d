"""A run around the loop: its folder, checkpoints, the signals that stop it, and its rehearsal.

`run` is `fpo-train run`, `side_by_side` the runs of a comparison at the same time; `folder` says when a
folder may be gone on with, `checkpoint` what is kept of an iteration; `watched` asks the same questions over time.
"""
