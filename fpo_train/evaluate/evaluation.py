"""`fpo-train eval`: policies answer a set of questions, a judge compares the answers; both go on where they stopped.

The folder holds `config.yaml` and `environment.json`, `answers.jsonl` (a row per policy and question), `judge.jsonl`
(the judge's own answers), `judgements.csv` (a row per judged pair) and `report.json` (`judgements.summarize`).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fpo_train.config import EvalConfig
from fpo_train.data import templates
from fpo_train.errors import RunError
from fpo_train.oracle.judge import Judge, Verdict
from fpo_train.oracle.lines import Lines
from fpo_train.report.progress import Steps, stage
from fpo_train.report.records import CONFIG, ENVIRONMENT
from fpo_train.running.folder import environment
from fpo_train.whole import write_text

from .answers import Answerer, Speaker, find_speakers
from .judgements import COLUMNS, ORDERS, read_judgements, summarize, write_report
from .questions import Question, read_questions

ANSWERS, JUDGEMENTS, CACHE = "answers.jsonl", "judgements.csv", "judge.jsonl"
PAIRS_AT_ONCE = 32  # pairs put to the judge before progress is shown and a silent judge is noticed
SILENCE = 16  # so many pairs without a verdict in a row are an endpoint that is gone, not a few bad questions

Answers = dict[tuple[str, str], str]  # (side, question's name) → answer


@dataclass(frozen=True)
class Pair:
    """A question with the answers of both sides and the verdict on them."""

    question: Question
    left: str
    right: str
    verdict: Verdict

    @property
    def winner(self) -> str:
        """`left`, `right` or `tie`, by the mean over both orders: a win and a tie are a win, two contraries a tie."""
        score = self.verdict.score
        return "left" if score > 0.5 else "right" if score < 0.5 else "tie"

    @property
    def judged(self) -> bool:
        """Whether there is a verdict."""
        return self.verdict.score == self.verdict.score


def evaluate(config: EvalConfig) -> None:
    """Answer what has not been answered, judge what has not been judged, and print what came of it.

    Raises:
        RunError: questions, a policy, the judge or a folder that cannot be used, answers of other policies or to other
            questions in the folder, or a judge that does not answer.
    """
    out = Path(config.out).expanduser()
    questions = read_questions(config.questions, config.limit)
    speakers = find_speakers(config)
    _check(out, config, speakers)
    lines = Lines(out / ANSWERS, "out")
    answers = _given(lines, questions)
    judge, counts = _judge(config, out)
    missing = _missing(config, questions, answers)
    began = _began(out)
    began["date"] = templates.known(began.get("date")) or templates.now()  # one day in all questions
    answerer = _answerer(out, config, speakers, began) if missing else None
    prompts = {question.name: answerer.render(question) for question in questions} if answerer else {}
    _describe(out, config, speakers, began)  # nothing is written before all that can be refused has been read
    if answerer:
        _answer(answerer, missing, prompts, answers, lines)
    for side, name in config.sides.items():
        print(f"{side} ({name}): {len(questions)} answers in {out / ANSWERS}")
    if judge is None:
        told = "no judge is configured (judge.url, judge.model)" if config.right else "there is nobody to compare with"
        print(f"{told}: done with the answers")
        return
    pairs = _compare(judge, counts, questions, answers)
    write_text(out / JUDGEMENTS, _table([pair for pair in pairs if pair.judged]))
    print(f"judged by {config.judge.model}: {_counted(counts)}")
    if failed := sum(not pair.judged for pair in pairs):
        told = f"{failed} of {len(pairs)} pairs have no verdict and are left out; the same command asks for them again"
        print(f"fpo-train eval: warning: {told}", file=sys.stderr)
    print(write_report(summarize(read_judgements(out / JUDGEMENTS)), out))


def _check(out: Path, config: EvalConfig, speakers: dict[str, Speaker]) -> None:
    """See that `out` is new or empty, or holds answers of these very policies."""
    if out.exists() and not out.is_dir():
        raise RunError(f"out: {out} is a file; wanted a folder")
    if not out.is_dir() or not [path for path in out.iterdir() if path.suffix != ".tmp"]:
        return
    try:
        began = json.loads((out / ENVIRONMENT).read_text(encoding="utf-8"))["answers_of"]
        before = {side: dict(facts) for side, facts in began.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"out: {out} holds something, but no evaluation to go on with; choose another folder") from error
    for side, facts in _facts(config, speakers).items():
        for key, value in facts.items() if side in before else ():
            if before[side].get(key) != value:
                raise RunError(
                    f"out: the answers of {side} in {out} are of {key} {before[side].get(key)!r}, not {value!r}; "
                    "choose another folder"
                )


def _facts(config: EvalConfig, speakers: dict[str, Speaker]) -> dict[str, dict[str, Any]]:
    return {side: {**speaker.facts(), "max_new_tokens": config.max_new_tokens} for side, speaker in speakers.items()}


def _began(out: Path) -> dict[str, Any]:
    """Beside whose answers they are, what those in `out` depend on: the moment of the templates, the base's digests."""
    path = out / ENVIRONMENT
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}  # `_check` has read it
    return {key: before[key] for key in ("answers_of", "date", "base") if key in before}


def _answerer(out: Path, config: EvalConfig, speakers: dict[str, Speaker], began: dict[str, Any]) -> Answerer:
    """Who answers, with the base that has answered so far."""
    with stage(f"loading and trying {next(iter(speakers.values())).model}"):
        answerer = Answerer(speakers, config.max_new_tokens, _device())
    templates.pin(answerer.tokenizer, began["date"])
    if began.setdefault("base", answerer.base) != answerer.base:
        model = next(iter(speakers.values())).model
        raise RunError(
            f"out: {model} has other weights or another tokenizer than when the answers in {out} began; put the former "
            "model back, or choose another folder"
        )
    return answerer


def _describe(out: Path, config: EvalConfig, speakers: dict[str, Speaker], began: dict[str, Any]) -> None:
    """Write whose answers these are, and what was asked for, ready to be asked for again."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / ENVIRONMENT
    facts = {**environment(), **began, "answers_of": began.get("answers_of", {}) | _facts(config, speakers)}
    write_text(path, json.dumps(facts, indent=2) + "\n")
    asked = dataclasses.asdict(config)
    write_text(out / CONFIG, yaml.safe_dump(asked, sort_keys=False, allow_unicode=True))


def _given(lines: Lines, questions: list[Question]) -> Answers:
    """The answers that are on disk."""
    texts = {question.name: question.text for question in questions}
    answers: Answers = {}
    for number, row in enumerate(lines.read(), start=1):
        kinds = [isinstance(row, dict) and row.get(key) for key in ("policy", "id", "prompt", "answer")]
        if not all(isinstance(value, str) for value in kinds):
            raise RunError(f"out: {lines.path} row {number} is no answer")
        if texts.get(row["id"], row["prompt"]) != row["prompt"]:
            raise RunError(f"out: {lines.path} answers another question {row['id']}; choose another folder")
        answers[row["policy"], row["id"]] = row["answer"]
    return answers


def _missing(config: EvalConfig, questions: list[Question], answers: Answers) -> list[tuple[str, list[Question]]]:
    """The batches, and whose turn it is, that have an answer missing.

    The questions are dealt into batches once for all, and a batch that was cut off is answered again as a whole: what
    is said depends, by rounding, on what shares its batch, and must not depend on where the work was cut off.
    """
    batches = [questions[n : n + config.rows_at_once] for n in range(0, len(questions), config.rows_at_once)]
    return [
        (side, batch)
        for batch in batches
        for side in config.sides
        if any((side, question.name) not in answers for question in batch)
    ]


def _answer(
    answerer: Answerer,
    missing: list[tuple[str, list[Question]]],
    prompts: dict[str, list[int]],
    answers: Answers,
    lines: Lines,
) -> None:
    """Add the answers that are missing, in memory and on disk."""
    with Steps("answers", len(missing), "batches") as steps:
        for side, batch in missing:
            replies = answerer.answer(side, [prompts[question.name] for question in batch])
            for question, reply in zip(batch, replies, strict=True):
                if (side, question.name) in answers:
                    continue
                text = answerer.decode(reply)
                known = {"id": question.name, "category": question.category, "prompt": question.text}
                lines.append({"policy": side, **known, "answer": text, "tokens": len(reply)})
                answers[side, question.name] = text
            steps()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _judge(config: EvalConfig, out: Path) -> tuple[Judge | None, Counter[str]]:
    counts: Counter[str] = Counter()
    if not config.judge.url:
        return None, counts
    cache = Path(config.judge.cache).expanduser() if config.judge.cache else out / CACHE
    return Judge(config.judge, cache, counts, section="judge"), counts


def _compare(judge: Judge, counts: Counter[str], questions: list[Question], answers: Answers) -> list[Pair]:
    """All pairs with their verdicts; the judge's answers are on disk as they come.

    Raises:
        RunError: the judge does not answer, or not so that it can be read, from the start or any more.
    """
    pairs: list[Pair] = []
    with Steps("judgements", len(questions), "pairs") as steps:
        for start in range(0, len(questions), PAIRS_AT_ONCE):
            some = questions[start : start + PAIRS_AT_ONCE]
            told = [(one.text, answers["left", one.name], answers["right", one.name]) for one in some]
            for question, (_, left, right), verdict in zip(some, told, judge.compare(told), strict=True):
                pairs.append(Pair(question, left, right, verdict))
            steps(len(some))
            asked = [pair for pair in pairs if pair.left != pair.right]
            silent = not any(pair.judged for pair in asked[-SILENCE:])
            if silent and (len(asked) >= SILENCE or (asked and len(pairs) == len(questions))):
                why = f"{_counted(counts)}{'; the first answer of no use: ' * bool(judge.unread)}{judge.unread}"
                raise RunError(f"judge: not one of the last {len(asked[-SILENCE:])} pairs could be judged ({why})")
    return pairs


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _table(pairs: list[Pair]) -> str:
    """`judgements.csv`; the orders are empty where equal answers were not put to the judge."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("id", "category", "prompt", *COLUMNS, *ORDERS))
    for pair in pairs:
        question = pair.question
        orders = pair.verdict.orders or ("", "")
        writer.writerow((question.name, question.category, question.text, pair.left, pair.right, pair.winner, *orders))
    return file.getvalue()
