"""FPO in other people's trainers: one object that scores a batch of texts and trains its reward model.

`reward` is that object, made over a classifier or, by `made`, on a trainer's own base; `texts` reads the prompts and
completions of other trainers and finds what each completion is compared with, `groups` tells which of them belong
together over all processes. `trl` has TRL's callbacks.

`monitor` looks on without a penalty; `server` puts the reward behind HTTP (`fpo-train serve`), with a client for those
who ask it there, and `verl`, `openrlhf`, `slime` and `skyrl` are what these trainers call.
"""
