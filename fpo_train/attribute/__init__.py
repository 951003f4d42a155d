"""Which training pairs taught a reward model to like, or to dislike, a reply: `fpo-train attribute`.

`attribution` is the command; `inputs` the pairs and replies as people have them, `model` the reward model and its
earlier states, `gradients` what is read and kept of texts, `influence` the mathematics, on tensors alone; `baselines`
what words and embeddings say of the same question, `table` what is printed and written.
"""
