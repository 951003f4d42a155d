"""Prompts and models: where they come from, whether their files are whole, and what a tokenizer makes of them.

`prompts` reads and renders questions (`questions.jsonl` are the shipped ones) from the rows of people's files (`rows`),
which hold a text or `turns`; `places` tells where a name leads,
`sources` loads models, `weights` and `limits` say what is wrong with them, `identity` by what a run knows them again,
`templates` what day it is in them.
"""
