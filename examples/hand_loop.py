"""A loop of your own: sample, score, learn the best reply, retrain the reward model. `python examples/hand_loop.py`"""

import sys

import torch
from peft import LoraConfig, get_peft_model

from fpo_train import BaseReplies, FPOReward, OnBase, load_model

base, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
policy = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
brief = lambda prompts, completions: [-abs(len(text) - 60) / 20 for text in completions]  # noqa: E731 (your oracle)
reward = FPOReward(OnBase(policy), tokenizer, "relaxed", oracle=brief, reference=BaseReplies(policy, tokenizer))
reward.fit(["Name a fish: "], ["the cod, which lives in cold seas and is eaten fried."], ["fish fish"])
optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-4)
for step in range(6):
    asked = [prompt for prompt in ("Name a bird: ", "The sea is ", "Bread is made of ") for _ in range(4)]
    inputs = tokenizer(asked, return_tensors="pt", padding=True, padding_side="left").to(policy.device)
    rows = policy.generate(**inputs, do_sample=True, max_new_tokens=24, pad_token_id=tokenizer.pad_token_id)
    said = tokenizer.batch_decode(rows[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    worth = torch.tensor(reward(asked, said)).view(-1, 4)
    best = torch.arange(len(worth)) * 4 + worth.argmax(1)
    ids = tokenizer([asked[n] + said[n] for n in best], return_tensors="pt", padding=True).to(policy.device)
    labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    for row, n in zip(labels, best, strict=True):
        row[: len(tokenizer(asked[n])["input_ids"])] = -100  # what was asked is not learnt
    policy(**ids, labels=labels).loss.backward()
    optimizer.step(), optimizer.zero_grad()
    print(f"step {step + 1}: reward {worth.mean():.3f}, reward model's loss {reward.update():.3f}")
torch.save(reward.state_dict(), "fpo.pt")  # and reward.load_state_dict to go on
