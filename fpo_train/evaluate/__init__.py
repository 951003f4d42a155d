"""Two policies' answers to the same questions, and what a judge's verdicts on them say.

`evaluation` is `fpo-train eval`, `questions` and `answers` its two sides; `judgements` the statistics, without torch.
"""
