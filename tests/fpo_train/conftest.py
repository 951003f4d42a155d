"""A Llama small enough to train in a test, in a folder as users have them."""

import pytest
import torch

from fpo_train.data.prompts import read_prompts

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a two-layer Llama with a byte-level tokenizer and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    raw.train_from_iterator([text for _, text in read_prompts("questions")], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=special[1], eos_token=special[2], pad_token=special[2]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def policy(tiny):
    """A fresh policy on the tiny model, its adapter moved off zero."""
    from fpo_train.config import PolicyConfig
    from fpo_train.policy import load_policy

    policy = load_policy(PolicyConfig(model=str(tiny)), seed=0, device=torch.device("cpu"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.normal_(std=0.1)
    return policy


@pytest.fixture
def prompts(policy):
    """The shipped prompts, rendered for the tiny model."""
    from fpo_train.data.prompts import render_prompts

    return render_prompts(read_prompts("questions"), seed=0, tokenizer=policy.tokenizer, room=200)


@pytest.fixture(scope="session")
def classifiers(tiny, tmp_path_factory):
    """Folders of tiny trained classifiers, by name, whose rewards differ by about 1."""
    from transformers import (
        AutoTokenizer,
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForSequenceClassification,
    )

    folders, tokenizer = {}, AutoTokenizer.from_pretrained(tiny)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    shape |= {"vocab_size": len(tokenizer), "num_labels": 1, "initializer_range": 0.5}
    torch.manual_seed(1)
    for name, kind, config in (
        ("bert", BertForSequenceClassification, BertConfig(**shape, max_position_embeddings=128)),
        ("llama", LlamaForSequenceClassification, LlamaConfig(**shape, pad_token_id=tokenizer.pad_token_id)),
    ):
        folders[name] = tmp_path_factory.mktemp("models") / name
        kind(config).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders
