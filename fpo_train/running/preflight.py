"""What of a run can be refused before a model is loaded."""

from __future__ import annotations

from pathlib import Path

from fpo_train.config import RunConfig
from fpo_train.data import templates
from fpo_train.data.adapters import classifier_of
from fpo_train.data.sources import look_at_classifier
from fpo_train.errors import about
from fpo_train.oracle.function import import_function
from fpo_train.oracle.preferences import read_preferences


def look_ahead(config: RunConfig) -> None:
    """See that the reward model and the oracle that a run names are there, and of the kind that it can use.

    Raises:
        RunError: a chat template that cannot be read, a model that is nowhere or has several outputs, a function that
            cannot be imported or called, a file of preferences that cannot be read.
    """
    templates.read(config.data.chat_template)
    if config.reward_model.kind == "classifier":
        with about("reward_model"):
            look_at_classifier(classifier_of(config.reward_model.classifier))
    oracle = config.oracle
    if oracle.kind == "gold" and not (Path(oracle.model).expanduser() / "head.safetensors").is_file():
        with about("oracle"):
            look_at_classifier(oracle.model)
    elif oracle.kind == "function":
        import_function(oracle.function)
    elif oracle.kind == "file":
        read_preferences(Path(oracle.file).expanduser(), config.data.system)
