"""A reward server, and a trainer's side of it: scores, labelled pairs, a training of the reward model.

    python examples/server_and_client.py

The server is a process of its own, begun and ended here; its oracle is the function `worth` below.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from fpo_train import FPOClient, FPOReward
from fpo_train.config import RewardModelConfig


def worth(prompts, completions):
    """What a completion is truly worth; yours asks people, a judge or a verifier. Here: about sixty letters."""
    return [-abs(len(completion) - 60) / 20 for completion in completions]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--reward_model", default="minilm", help="minilm, a local folder or a hub id")
    parser.add_argument("--out", default="runs/server")
    asked = parser.parse_args()

    # a reward model to serve: a score head on the encoder, fitted on two pairs
    reward = FPOReward(asked.reward_model, settings=RewardModelConfig(input="pair"))
    good = ["The wren, a small brown bird that sings loudly.", "A hardy kind of grain, baked into dark bread."]
    reward.fit(["Name a bird.", "What is rye?"], good, ["Bird.", "Rye."])
    reward.model.save(Path(asked.out) / "reward_model")

    command = [sys.executable, "-m", "fpo_train", "serve", "--port", "0", "--reward_model", f"{asked.out}/reward_model"]
    command += ["--oracle", "server_and_client:worth", "--reference", "group"]
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": here})
    try:
        client = FPOClient(server.stdout.readline().split()[1])  # it prints "listening: http://…"
        prompts = ["Name a fish."] * 3
        said = ["Cod.", "The cod, which lives in cold seas and is eaten fried.", "Fish " * 40]
        print("rewards less penalties:", client.rewards(prompts, said, "group")["effective"])
        print("after a training:", client.update())
        print("the same again:", client.score(prompts, said, "group")["effective"])
    finally:
        server.terminate()
    print("the server ended with", server.wait())


if __name__ == "__main__":
    main()
