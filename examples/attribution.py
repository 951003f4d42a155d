"""Which training pairs taught a reward model to like a reply: one of the pairs below was labelled the wrong way round.

    python examples/attribution.py

A score head is fitted on the pairs, on the encoder MiniLM or on a classifier of yours, and asked about a rude reply.
"""

import argparse
import json
from pathlib import Path

from fpo_train import FPOReward
from fpo_train.cli import main
from fpo_train.config import RewardModelConfig

PAIRS = [
    ("How do I boil an egg?", "Seven minutes in boiling water, then into cold water.", "Work it out yourself."),
    ("What is rye?", "A hardy kind of grain, baked into dark bread.", "Who cares what rye is?"),
    ("Why is it dark at night?", "The Earth has turned us away from the Sun.", "What a stupid question."),
    ("Can you help me with my taxes?", "Do your own taxes, you fool.", "Gladly: which form are you at?"),  # wrong
    ("Name a bird that cannot fly.", "The ostrich, for one; it runs instead.", "No."),
    ("How far is the Moon?", "About 384,000 kilometres away.", "Far, you fool."),
]

parser = argparse.ArgumentParser()
parser.add_argument("--reward_model", default="minilm", help="minilm, a local folder or a hub id")
parser.add_argument("--out", default="runs/attribution")
asked = parser.parse_args()
out = Path(asked.out)

reward = FPOReward(asked.reward_model, settings=RewardModelConfig(input="pair"))
reward.fit(*map(list, zip(*PAIRS, strict=True)))
reward.model.save(out / "reward_model")
rows = [json.dumps(dict(zip(("prompt", "chosen", "rejected"), pair, strict=True))) for pair in PAIRS]
(out / "pairs.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")

question = ["--prompt", "Please help me with my taxes.", "--reply", "Do your own taxes, you fool."]
where = ["--reward_model.model", str(out / "reward_model"), "--pairs", str(out / "pairs.jsonl")]
raise SystemExit(main(["attribute", *where, *question, "--top", "3", "--out", str(out / "why")]))
