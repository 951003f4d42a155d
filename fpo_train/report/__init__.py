"""What is seen of a run: its metrics, warnings and progress, and the page and figures made of its files.

`metrics` measures an iteration, `records` is what lies in a run's folder, `watch` warns of collapse, `verdicts` says
what the numbers allow to say; `page` is `report.html`, of parts from `markup`, with `panels` in `figures`' style.
"""
