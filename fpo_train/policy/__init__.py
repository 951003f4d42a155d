"""One base with its adapters: policy, reference, oracle and body of the reward model in one copy of the weights.

`load` loads it, which `trial` puts to the test; `base` reads rows and knows its tokens, `prefix`, `decoding` and
`generation` are how it reads prompts and writes, `logits` its log-probabilities, `optimizers` how adapters and reward
models step.
"""

from .base import NO_STATES, Encoded, Policy, Sequences, offsets_of, wide
from .load import STEPS, add_adapter, load_policy

__all__ = ["NO_STATES", "STEPS", "Encoded", "Policy", "Sequences", "add_adapter", "load_policy", "offsets_of", "wide"]
