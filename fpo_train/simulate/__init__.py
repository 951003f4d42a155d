"""The controlled environments of the paper (arXiv 2605.04266).

`linear` and `neural` play the games, `mlp` holds the neural one's reward models, `results` writes what came out and
`drawing` draws it.
"""
