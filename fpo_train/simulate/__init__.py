"""The controlled environments of the paper (arXiv 2605.04266).

`linear` and `neural` play the games, `mlp` holds the neural one's reward models, `trajectories` is what comes out,
`results` writes it and `drawing` draws it.
"""
