"""What is seen of a run: its metrics, warnings and progress, and the page and figures made of its files.

`metrics` measures an iteration, `records` is what lies in a run's folder, `watch` warns of collapse; `page` is
`report.html`, from `panels` in the one style of `figures`.
"""
