"""The steering term: what each candidate's reward is reduced by, from per-example gradients that are never formed.

`base` is every kind of penalty, `gradients` asks the kernels, `residual` foretells overconfidence from bought labels.
Nothing is imported here: the controlled environments use `residual` without a language model.
"""
