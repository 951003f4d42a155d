"""Runs of TRL's trainers on the tiny model with an FPOReward, for tests of one process and of two."""

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from fpo_train import FPOCallback, FPOReward
from fpo_train.config import RewardModelConfig

KINDS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


def vowels(prompts, completions, **columns):
    said = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [sum(letter in "aeiou" for letter in text) / (len(text) or 1) for text in said]


def data(chat=True):
    asked = [f"Say something about {n}" for n in range(12)]
    prompts = [[{"role": "user", "content": one}] for one in asked] if chat else asked
    return Dataset.from_list([{"prompt": prompt, "reference": f"It is {n}."} for n, prompt in enumerate(prompts)])


def reward_of(tiny, **options):
    model = LlamaForSequenceClassification.from_pretrained(tiny, num_labels=1)
    torch.manual_seed(3)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    settings = RewardModelConfig(learning_rate=1e-2)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    return FPOReward(model, tokenizer, **{"oracle": vowels, "settings": settings} | options)


def train(kind, tiny, out, reward, *, steps=6, resume=None, chat=True, model=None, callback=None, **options):
    trainer, config = KINDS[kind]
    settings = {
        "output_dir": str(out), "max_steps": steps, "per_device_train_batch_size": 8, "num_generations": 4,
        "max_completion_length": 8, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1, "report_to": "none",
        "use_cpu": True, "bf16": False, "learning_rate": 1e-3, "disable_tqdm": True, "beta": 0.0, "seed": 7,
    }  # fmt: skip
    made = trainer(
        model=model if model is not None else LlamaForCausalLM.from_pretrained(tiny),
        reward_funcs=reward,
        args=config(**settings | options),
        train_dataset=data(chat),
        eval_dataset=data(chat).select(range(2)),
        processing_class=AutoTokenizer.from_pretrained(tiny),
        callbacks=callback if isinstance(callback, list) else [callback or FPOCallback(reward)],
    )
    made.train(resume_from_checkpoint=None if resume is None else str(resume))
    return made


def one_of_two(tiny, out, chunk):
    """A process of several: three steps of GRPO, all that was scored and the reward model written to a file."""
    reward = reward_of(tiny, penalty="tracin")
    seen, call = [], FPOReward.__call__

    def noted(self, prompts, completions, **columns):
        found = call(self, prompts, completions, **columns)
        seen.extend(zip([p[0]["content"] for p in prompts], [c[0]["content"] for c in completions], found, strict=True))
        return found

    FPOReward.__call__ = noted
    train("grpo", tiny, out / "run", reward, steps=3, per_device_train_batch_size=chunk)
    rank = int(os.environ.get("RANK", "0"))
    torch.save({"seen": seen, "state": reward.state_dict()}, out / f"{rank}.pt")


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
