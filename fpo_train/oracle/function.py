"""Your own Python as the oracle."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpo_train.config import OracleConfig
from fpo_train.data.turns import messages_of
from fpo_train.errors import RunError
from fpo_train.rollout import Readings, Said

from .base import UtilityOracle


class FunctionOracle(UtilityOracle):
    """U by `module:function`, called as function(prompts=[text, …], completions=[text, …]).

    One that takes no arguments of these names is called by place, function([text, …], [text, …]):

        def score(prompts, replies):
            return [-abs(len(reply) - 80) for reply in replies]

    A prompt that is a user's one turn comes as its text, one of several turns, or with a system prompt, as messages:
    [{"role": …, "content": …}, …].
    It returns one number a completion, in a list, tuple, array or tensor: the completion's utility, finite, or NaN
    or None where it cannot say.
    """

    setting = "oracle.function"  # what its complaints begin with

    def __init__(self, config: OracleConfig, function: Callable[..., Any] | None = None) -> None:
        """The function that the configuration names, or one that is at hand.

        Raises:
            RunError: there is no such module or function.
        """
        super().__init__(config.temperature)
        self._name = config.function or getattr(function, "__name__", type(function).__name__)
        self._function = import_function(config.function) if function is None else function
        self._by_name = takes_names(self._function)

    def utility(self, rollout: Said, readings: Readings, rows: Tensor) -> Tensor:
        """U of rows (n,), fp32 (n,).

        Raises:
            RunError: the function raises, or returns something else than one finite number, NaN or None a reply.
        """
        values = self.ask(*self._asked(rollout, rows.tolist()))
        return self._count(torch.tensor(values, dtype=torch.float32, device=rows.device), silent="no_answer")

    def report(self) -> str:
        """See `Oracle`."""
        silent = self.counts["no_answer"]
        return super().report() + (f"; {self._name} said None or NaN of {silent} completions" if silent else "")

    def ask(self, prompts: list[Any], completions: list[Any], columns: Mapping[str, list[Any]]) -> list[float]:
        """What the function says of completions, NaN where it cannot.

        Raises:
            RunError: see `utility`.
        """
        try:
            if self._by_name:
                returned = self._function(prompts=prompts, completions=completions, **columns)
            else:
                returned = self._function(prompts, completions)
        except Exception as error:
            raise RunError(f"{self.setting}: {self._name} raised {_first_line(error)}{_place(error)}") from error
        return self._values(returned, len(completions))

    def _asked(self, rollout: Said, rows: list[int]) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
        """Prompts, completions and what else the function is given of some rows."""
        talks = [rollout.talk(row) for row in rows]
        prompts = [talk if isinstance(talk, str) else messages_of(talk) for talk in talks]
        return prompts, [rollout.texts[row] for row in rows], {}

    def _values(self, returned: Any, wanted: int) -> list[float]:
        name = f"{self.setting}: {self._name}"
        listed = returned.tolist() if hasattr(returned, "tolist") else returned  # tensors and arrays
        if not isinstance(listed, list | tuple):
            raise RunError(f"{name} returned a {type(returned).__name__}; wanted a list of {wanted} numbers")
        if len(listed) != wanted:
            raise RunError(f"{name} returned {len(listed)} numbers for {wanted} completions")
        values = []
        for place, one in enumerate(listed):
            try:
                value = math.nan if one is None else float(one.item() if hasattr(one, "item") else one)
            except (TypeError, ValueError, RuntimeError) as error:
                raise RunError(f"{name} returned {one!r:.80} for completion {place}; wanted a number") from error
            if isinstance(one, str) or math.isinf(value):
                raise RunError(f"{name} returned {one!r:.80} for completion {place}; wanted a finite number")
            values.append(value)
        return values


def takes_names(function: Callable[..., Any]) -> bool:
    """Whether a function has arguments prompts and completions, whatever else it takes; yes where it does not tell."""
    try:
        inspect.signature(function).bind_partial(prompts=[], completions=[])
    except TypeError:
        return False
    except ValueError:  # of compiled code
        return True
    return True


def import_function(name: str, columns: bool = False) -> Callable[..., Any]:
    """The function that `module:function` names; modules in the working directory are found first, as by `python`.

    `columns`: whether it may need more than prompts and completions, by name.

    Raises:
        RunError: another form of name, a module that cannot be imported, or nothing callable of that name in it.
    """
    module_name, colon, attribute = name.partition(":")
    module_name = module_name.removesuffix(".py")
    if not (module_name and colon and attribute):
        raise RunError(f"oracle.function: wanted module:function, got {name!r}")
    here = str(Path.cwd())
    if here not in sys.path:  # and it stays there: the function may import its neighbours when it is called
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise RunError(f"oracle.function: {name} cannot be imported: {_first_line(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise RunError(f"oracle.function: module {module_name} has no function {attribute!r}")
    refuse_signature(function, f"oracle.function: {name}", columns)
    return function


def refuse_signature(function: Callable[..., Any], name: str, columns: bool = False) -> None:
    """See that a function can be called with prompts and completions, by name or by place.

    `columns`: whether it may need more, by name.

    Raises:
        RunError: it cannot.
    """
    try:
        takes = inspect.signature(function)
    except (TypeError, ValueError):  # of compiled code
        return
    named = takes_names(function)
    if named and columns:
        return
    try:
        _ = takes.bind(prompts=[], completions=[]) if named else takes.bind([], [])
    except TypeError as error:
        wanted = "wanted two lists, prompts and completions, by these names or by place"
        raise RunError(f"{name} takes {takes}; {wanted}") from error


def _place(error: Exception) -> str:
    """Where it was raised, unless that is here."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return "" if last.filename == __file__ else f" ({Path(last.filename).name}, line {last.lineno})"


def _first_line(error: Exception) -> str:
    return (f"{type(error).__name__}: {error}".strip().splitlines())[0]
