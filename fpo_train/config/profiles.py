"""What `profile` sets before a configuration file and the command line have their say.

`sound` is every option's own default. `paper` keeps to the published run, its oddities included; each is an option
of its own, so that any one of them can be put right alone.
"""

from __future__ import annotations

from typing import Any

PROFILES: dict[str, dict[str, Any]] = {
    "sound": {},
    "paper": {
        "policy.lora_dropout": 0.05,
        "policy.gradient_checkpointing": False,  # asked for there, but inactive
        "rollout.lora_dropout": True,  # the policy stays in train mode while it generates
        "rollout.attention_mask": False,
        "rollout.skip_blank": True,
        "data.double_bos": True,
        "data.max_tokens": 128,
        "data.truncate": "right",  # cuts the assistant's header off long prompts
        "reward_model.input": "reply",
        "reward_model.max_tokens": 128,
        "reward_model.dtype": "float16",  # loses most updates of 5e-5
        "reward_model.dropout_when_scoring": True,  # for penalty none alone
        "reward_model.nan_scores": "drop",
        "reward_model.fit_pairs": 0,
        "oracle.offset": 5.0,
        "oracle.utility_range": [-15.0, 5.0],
        "oracle.mean_over": "padded",
        "penalty.gamma": 10.0,
        "penalty.gamma_units": "raw",
        "update.loss_on": "padded",
        "update.mean": "prompt",
        "update.kl_weight": 0.0,
        "update.max_grad_norm": 0.0,
        "logging.save": "policy",
    },
}
