"""Runs that begin on an adapter: a run's own, or one that PEFT saved; what is no such adapter is refused at once."""

import json
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fpo_train.cli import main
from fpo_train.config import EvalConfig, PolicyConfig, RolloutConfig, RunConfig
from fpo_train.data.adapters import adapter_at, base_model, settle, settled
from fpo_train.data.prompts import read_prompts, render_prompts
from fpo_train.errors import RunError
from fpo_train.evaluate.answers import find_speakers
from fpo_train.policy import Policy, load_policy
from fpo_train.rollout import sampler
from tests.fpo_train.conftest import TEMPLATE
from tests.fpo_train.runs import arguments, contents, rows

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PLAIN = {"r": 2, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": ["q_proj", "up_proj"]}
CPU = torch.device("cpu")


def saved(tiny, folder, prepare=lambda lm: lm, **more):
    """An adapter as plain PEFT writes it."""
    torch.manual_seed(7)
    lora = LoraConfig(**{**PLAIN, "init_lora_weights": False, "task_type": "CAUSAL_LM", **more})
    get_peft_model(prepare(AutoModelForCausalLM.from_pretrained(tiny)), lora).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    return saved(tiny, tmp_path_factory.mktemp("adapters") / "plain")


@pytest.fixture(scope="module")
def first(tiny, tmp_path_factory):
    """A run of two iterations, and a second one that goes on from its adapter for three."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(arguments(tiny, folder / "first", "--iterations", 2)) == 0
    assert main(arguments(folder / "first" / "policy", folder / "second")) == 0
    return folder


def told(folder, **changes):
    path = folder / SETTINGS
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_run_begins_on_the_adapter_of_another_to_the_bit(first, tiny, tmp_path, capfd):
    folder = first / "first" / "policy"
    still = tmp_path / "still"
    assert main(arguments(folder, still, "--iterations", 1, "--update.learning_rate", 0)) == 0
    said = capfd.readouterr().err
    assert (
        f"policy: goes on with the adapter {folder} (rank 4, alpha 32, on k_proj, o_proj, q_proj, v_proj) of {tiny}; "
        in said
    )
    assert "the reference is that base without it" in said
    before, after = load_file(folder / WEIGHTS), load_file(still / "policy" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(bool(weight.any()) for name, weight in before.items() if "lora_B" in name)

    # the replies of its first iteration are those of the adapter as PEFT loads it, the references the base's
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder)
    policy = Policy(model, AutoTokenizer.from_pretrained(tiny))
    prompts = render_prompts(read_prompts("questions"), 0, policy.tokenizer, room=200)
    rollout = sampler(policy, RolloutConfig(prompts=2, candidates=3, max_new_tokens=6), 0)(prompts.batch(0, 2), 1, 0)
    samples = [json.loads(line) for line in (first / "second" / "samples.jsonl").read_text().splitlines()][:2]
    for place, sample in enumerate(samples):
        texts = rollout.texts[4 * place : 4 * place + 4]
        assert sample["reply"] in texts[:3]
        assert sample["reference"] == texts[3]
    assert rows(first / "second")[0]["kl"] > 0


def test_what_such_a_run_says_of_itself(first, tiny):
    folder, out = first / "first" / "policy", first / "second"
    asked = json.loads((out / "policy" / SETTINGS).read_text())
    assert (asked["base_model_name_or_path"], asked["r"], asked["lora_alpha"]) == (str(tiny), 4, 32)
    config = yaml.safe_load((out / "config.yaml").read_text())["policy"]
    assert (config["model"], config["lora_rank"]) == (str(folder), 4)
    facts = json.loads((out / "environment.json").read_text())
    assert facts["models"]["policy.model"].keys() == {"weights", "tokenizer", "adapter"}
    assert facts["begins_on"].startswith(f"the adapter {folder} (rank 4")
    assert json.loads((out / "reward_model" / "config.json").read_text())["base"] == str(tiny)
    assert base_model(str(out / "policy")) == str(tiny)
    assert find_speakers(EvalConfig(left=str(out), right="base"))["left"].model == str(tiny)


def test_it_resumes_to_the_bit_and_knows_its_adapter_again(first, tmp_path, capfd):
    folder, out = shutil.copytree(first / "first" / "policy", tmp_path / "policy"), tmp_path / "run"
    assert main(arguments(folder, out, "--iterations", 2)) == 0
    assert main(arguments(folder, out, "--resume", "true")) == 0
    assert rows(out) == rows(first / "second")
    for part in ("policy/" + WEIGHTS, "reward_model/head.safetensors", "samples.jsonl"):
        assert (out / part).read_bytes() == (first / "second" / part).read_bytes()
    save_file({n: 2 * w for n, w in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS, {"format": "pt"})
    before = contents(out)
    capfd.readouterr()
    assert main(arguments(folder, out, "--resume", "true", "--iterations", 4)) == 1
    said = f"resume: policy.model {folder} has other weights in its adapter than when {out} began"
    assert said in capfd.readouterr().err
    shutil.copy(first / "first" / "policy" / WEIGHTS, folder)
    told(folder, use_rslora=True)
    assert main(arguments(folder, out, "--resume", "true", "--iterations", 4)) == 1
    assert said in capfd.readouterr().err
    told(folder, use_rslora=False, lora_alpha=30)
    assert main(arguments(folder, out, "--resume", "true", "--iterations", 4)) == 1
    assert "policy.lora_alpha was 32 when" in capfd.readouterr().err
    assert contents(out) == before


def test_runs_of_a_comparison_all_begin_on_it_and_a_head_of_its_base_judges(first, tmp_path):
    out, head = tmp_path / "both", first / "first" / "reward_model"
    more = "--oracle.kind", "gold", "--oracle.model", head, "--iterations", 1, "--memory.runs_at_once", 1
    assert main(arguments(first / "first" / "policy", out, "--compare", "none,practical", *more)) == 0
    none, practical = rows(out / "none")[0], rows(out / "practical")[0]
    assert min(none["kl"], practical["kl"]) > 0
    assert none["reward"] == practical["reward"]


PATTERNS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"up_proj": 9}},
    "a regular expression": {"target_modules": r".*layers\.1\.(self_attn\.q|mlp\.up)_proj"},
    "one layer": {"layers_to_transform": [1]},
    "the output projection": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("case", PATTERNS)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_folder_of_plain_peft_says_what_peft_says(case, tiny, tmp_path):
    folder = saved(tiny, tmp_path / "adapter", **PATTERNS[case])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder).eval()
    ours = load_policy(PolicyConfig(model=str(folder)), seed=0, device=CPU)
    ids = torch.arange(12)[None] + 20
    with torch.no_grad():
        assert torch.equal(ours.model(input_ids=ids).logits, theirs(input_ids=ids).logits)
        with ours.base(), theirs.disable_adapter():
            assert torch.equal(ours.model(input_ids=ids).logits, theirs(input_ids=ids).logits)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in ours.trainable.values())
    dropout = [m.p for n, m in ours.model.named_modules() if n.endswith(".lora_dropout.default")]
    assert set(dropout) == {0.1}
    ours.model.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    again, given = load_file(tmp_path / "again" / WEIGHTS), load_file(folder / WEIGHTS)
    assert all(torch.equal(again[name], given[name]) for name in again)


def test_settings_are_the_adapter_s_unless_they_say_otherwise(plain):
    own = settled(PolicyConfig(model=str(plain)))
    assert (own.lora_rank, own.lora_alpha, own.lora_dropout, own.lora_targets) == (2, 6, 0.1, ("q_proj", "up_proj"))
    assert settled(own) == own
    paper = RunConfig(profile="paper", policy=PolicyConfig(model=str(plain), lora_dropout=0.05))
    assert settle(paper).policy == own  # the profile's default
    settled(PolicyConfig(model=str(plain), lora_targets=("up_proj", "q_proj")))
    for given, says in (
        ({"lora_rank": 8}, "policy.lora_rank: it is 8, but the adapter in policy.model .* has 2"),
        ({"lora_alpha": 8}, "policy.lora_alpha: it is 8, but .* has 6"),
        ({"lora_dropout": 0.5}, r"policy.lora_dropout: it is 0\.5, but .* has 0\.1"),
        ({"lora_targets": ("q_proj",)}, r"policy.lora_targets: it is \['q_proj'\], but .* has \['q_proj', 'up_proj'\]"),
    ):
        with pytest.raises(RunError, match=says):
            settled(PolicyConfig(model=str(plain), **given))


def test_a_base_beside_the_adapter_and_words_of_its_own(tiny, tmp_path, monkeypatch):
    folder = saved(tiny, tmp_path / "moved" / "adapter")
    shutil.copytree(tiny, tmp_path / "moved" / "base")
    told(folder, base_model_name_or_path="../base")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert adapter_at(str(folder)).base == str(folder / "../base")
    assert load_policy(PolicyConfig(model=str(folder)), 0, CPU).tokenizer.chat_template == TEMPLATE
    (folder / "chat_template.jinja").write_text("Q: " + TEMPLATE)
    assert load_policy(PolicyConfig(model=str(folder)), 0, CPU).tokenizer.chat_template == "Q: " + TEMPLATE
    (folder / "chat_template.jinja").unlink()
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    tokenizer.save_pretrained(folder)
    own = load_policy(PolicyConfig(model=str(folder)), 0, CPU)
    assert (own.tokenizer.eos_token, own.tokenizer.chat_template) == ("<|endoftext|>", TEMPLATE)
    monkeypatch.chdir(tmp_path)
    more = "--iterations", 1, "--reward_model.fit_pairs", 0
    assert (
        main([word for word in arguments("moved/adapter", "out", *more) if word not in ("--policy.lora_rank", "4")])
        == 0
    )
    assert (tmp_path / "out" / "policy" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "out" / "policy" / SETTINGS).read_text())["base_model_name_or_path"] == (
        "moved/adapter/../base"
    )


def test_a_plan_counts_the_adapter_s_factors(plain, tiny, capsys):
    assert main(["plan", "--policy.model", str(plain), "--rollout.max_new_tokens", "8"]) == 0
    with_it = capsys.readouterr().out
    assert f"the policy begins on the adapter {plain}, of rank 2" in with_it
    fresh = ["--policy.lora_rank", "2", "--policy.lora_alpha", "6", "--policy.lora_dropout", "0.1"]
    fresh += ["--policy.lora_targets", "q_proj,up_proj"]
    assert main(["plan", "--policy.model", str(tiny), "--rollout.max_new_tokens", "8", *fresh]) == 0
    assert capsys.readouterr().out.splitlines() == [line for line in with_it.splitlines() if "begins on" not in line]


def weights(change):
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})


def settings(**changes):
    return lambda folder: told(folder, **changes)


EMBEDDING = "base_model.model.model.embed_tokens.weight"
WRONG = {
    "no LoRA": (settings(peft_type="IA3"), "it is an adapter of the kind IA3; wanted LORA"),
    "another task": (settings(task_type="SEQ_CLS"), "it is an adapter for SEQ_CLS; wanted one for CAUSAL_LM"),
    "DoRA": (settings(use_dora=True), "its use_dora True is more than a plain LoRA has"),
    "modules saved whole": (settings(modules_to_save=["lm_head"]), "its modules_to_save ['lm_head'] is more than"),
    "trained biases": (settings(bias="lora_only"), "its bias 'lora_only' is more than"),
    "trained tokens": (settings(trainable_token_indices=[3]), "its trainable_token_indices [3] is more than"),
    "a base that was changed": (settings(init_lora_weights="pissa"), "its init_lora_weights 'pissa' changed the base"),
    "something new": (settings(use_foo=True), "its use_foo True is more than a plain LoRA has"),
    "a base that is nowhere": (
        settings(base_model_name_or_path="./nowhere"),
        "its base, model ./nowhere: no such file",
    ),
    "no base": (settings(base_model_name_or_path=None), "does not name the adapter's base"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "the adapter's weights are not there; wanted "),
    "torn weights": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]),
        f"{WEIGHTS} is damaged or cut short",
    ),
    "torn settings": (lambda folder: (folder / SETTINGS).write_text('{"peft_type"'), f"{SETTINGS} is damaged or cut"),
    "a whole model beside it": (
        lambda folder: (folder / "model.safetensors").touch(),
        "holds an adapter and a whole model (model.safetensors)",
    ),
    "a factor that is missing": (
        weights(lambda found: {n: w for n, w in found.items() if "layers.1.self_attn.q_proj.lora_B" not in n}),
        "does not fit its base {tiny}: 1 of 8 weights are missing from it: ",
    ),
    "layers that the base lacks": (
        weights(lambda found: found | {n.replace("layers.1", "layers.9"): w.clone() for n, w in found.items()}),
        "4 of its weights have no place there",
    ),
    "another width": (
        weights(lambda found: {n: w[:, :-1].contiguous() if "lora_A" in n else w for n, w in found.items()}),
        "4 of its weights have another shape: ",
    ),
    "trained embeddings": (
        weights(lambda found: found | {EMBEDDING: torch.ones(400, 32)}),
        f"it brings weights of the base that are not the base's: {EMBEDDING}",
    ),
    "no numbers": (
        weights(lambda found: {n: w * float("nan") if "lora_B" in n else w for n, w in found.items()}),
        "holds numbers that are not finite",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_no_policy_can_begin_on_is_one_sentence_and_leaves_nothing(case, plain, tiny, tmp_path, capfd):
    folder, out = shutil.copytree(plain, tmp_path / "adapter"), tmp_path / "out"
    spoil, says = WRONG[case]
    spoil(folder)
    capfd.readouterr()
    words = ["run", "--policy.model", str(folder), "--out", str(out)]
    assert main(words) == 1
    message = capfd.readouterr().err.strip()
    assert message.startswith(f"fpo-train run: error: policy.model {folder}: ")
    assert says.format(tiny=tiny) in message
    assert "\n" not in message
    assert not out.exists()


def test_adapters_elsewhere_and_folders_of_runs_are_told(plain, first, tmp_path, capfd):
    out = tmp_path / "out"
    for words, says in (
        (["--policy.model", first / "first"], f"the folder is a run's; the adapter that it trained is {first}"),
        (
            ["--reward_model.kind", "classifier", "--reward_model.model", plain],
            "holds an adapter; wanted a whole model",
        ),
        (["--policy.model", first / "second" / "policy", "--policy.lora_rank", 8], "policy.lora_rank: it is 8"),
    ):
        capfd.readouterr()
        model = [] if "--policy.model" in words else ["--policy.model", plain]
        assert main(["run", *map(str, [*model, *words]), "--out", str(out)]) == 1
        assert says in capfd.readouterr().err
        assert not out.exists()
