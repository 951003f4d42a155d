"""TRL's GRPO with a reward model that sits on the policy's own base and is retrained while the policy learns.

    python examples/trl_grpo.py --steps 20 --out runs/grpo

The reward model is a score head on the base that GRPO's adapter is trained on: one copy of the weights serves both.
"""

import argparse

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import GRPOConfig, GRPOTrainer

from fpo_train import BaseReplies, FPOCallback, FPOReward, OnBase, load_model
from fpo_train.data.prompts import read_prompts

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="smollm2", help="smollm2, a local folder, a GGUF file or a hub id")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--tokens", type=int, default=32, help="longest completion")
parser.add_argument("--out", default="runs/grpo")
parser.add_argument("--resume", help="a checkpoint's folder")
asked = parser.parse_args()


def oracle(prompts, completions, **columns):
    """What a reply is truly worth; yours asks people, a judge or a verifier. Here: one sentence of about 80 letters."""
    return [-abs(len(completion[0]["content"]) - 80) / 20 for completion in completions]


ASKED = [[{"role": "user", "content": text}] for text in ("Name a bird.", "Why is it dark at night?", "What is rye?")]
GOOD = [
    "The wren is a small brown bird that sings far louder than anybody would expect.",
    "The Earth turns us away from the Sun each evening, so that no light reaches us.",
    "Rye is a hardy kind of grain that people bake into dark bread and brew into beer.",
]
BAD = ["Bird bird bird.", "Night.", "I am a language model and I cannot say, I cannot say, I cannot say, I cannot say."]

base, tokenizer = load_model(asked.model)
policy = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
data = Dataset.from_list([{"prompt": [{"role": "user", "content": talk}]} for _, talk in read_prompts("questions")])

# the three lines
reference = BaseReplies(policy, tokenizer, max_new_tokens=asked.tokens)
reward = FPOReward(OnBase(policy), tokenizer, "relaxed", oracle=oracle, reference=reference)
callback = FPOCallback(reward, every=1)

reward.fit(ASKED, GOOD, BAD)  # a score head on a base begins at zero

trainer = GRPOTrainer(
    model=policy,
    reward_funcs=reward,
    args=GRPOConfig(
        output_dir=asked.out,
        max_steps=asked.steps,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=asked.tokens,
        learning_rate=1e-4,
        logging_steps=1,
        save_steps=max(1, asked.steps // 2),
        report_to="none",
        bf16=False,
    ),
    train_dataset=data,
    processing_class=tokenizer,
    callbacks=[callback],
)
trainer.train(resume_from_checkpoint=asked.resume)
print(f"{reward.pairs} labelled pairs; the policy is in {asked.out}/checkpoint-{asked.steps}, the reward model in")
print(f"{asked.out}/reward_model. fpo/reward and fpo/penalty above are the two parts of the reward that was maximised.")
