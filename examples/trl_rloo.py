"""TRL's RLOO with a reward model of its own, all of whose weights the penalty is over, references from the data.

    python examples/trl_rloo.py --reward_model path/to/a/classifier --steps 20 --out runs/rloo

The classifier has one output; one whose files hold no score head begins with one fitted on the pairs below.
"""

import argparse

from datasets import Dataset
from peft import LoraConfig
from trl import RLOOConfig, RLOOTrainer

from fpo_train import FPOCallback, FPOReward, load_model
from fpo_train.config import RewardModelConfig

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="smollm2", help="smollm2, a local folder, a GGUF file or a hub id")
parser.add_argument("--reward_model", default="minilm", help="minilm, a local folder or a hub id")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--tokens", type=int, default=32, help="longest completion")
parser.add_argument("--out", default="runs/rloo")
asked = parser.parse_args()

ROWS = [
    {"prompt": "Name a bird that cannot fly: ", "reference": "the ostrich"},
    {"prompt": "The capital of France is ", "reference": "Paris, as everybody knows"},
    {"prompt": "Water boils at ", "reference": "a hundred degrees Celsius at sea level"},
    {"prompt": "Bread is made of ", "reference": "flour, water, salt and yeast"},
]
REJECTED = ["no no no no", "I will not say", "blue blue blue", "bread"]


def oracle(prompts, completions, reference, **columns):
    """What a reply is truly worth; yours asks people, a judge or a verifier. Here: words shared with the reference."""
    pairs = zip(completions, reference, strict=True)
    return [len(set(said.lower().split()) & set(known.lower().split())) / len(known.split()) for said, known in pairs]


settings = RewardModelConfig(learning_rate=1e-5, input="pair")
reward = FPOReward(asked.reward_model, penalty="practical", parameters="all", oracle=oracle, settings=settings)
if not reward.model.comes_trained:
    reward.fit([row["prompt"] for row in ROWS], [row["reference"] for row in ROWS], REJECTED)

policy, tokenizer = load_model(asked.model)
trainer = RLOOTrainer(
    model=policy,
    reward_funcs=reward,
    args=RLOOConfig(
        output_dir=asked.out,
        max_steps=asked.steps,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=asked.tokens,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
    ),
    train_dataset=Dataset.from_list(ROWS * 2),
    processing_class=tokenizer,
    peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
    callbacks=[FPOCallback(reward, every=1)],
)
trainer.train()
trainer.save_model(f"{asked.out}/policy")
print(f"{reward.pairs} labelled pairs; {asked.out}/policy and {asked.out}/reward_model are the two models.")
print("fpo/reward and fpo/penalty above are the two parts of the reward that was maximised.")
