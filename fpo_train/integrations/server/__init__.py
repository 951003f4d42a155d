"""`fpo-train serve`: one reward model behind HTTP.

`owner` has the reward, `batching` the one thread that asks it, `formats` what goes over the wire and `reading` what is
made of it, `limits` what is refused before any route, `metrics` what is counted, `app` the routes, `run` the command.
`client` is for the other end, and imports none of them.
"""
