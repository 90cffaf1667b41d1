"""What notebooks 01 and 01b need and do not teach: generation under a rule, timing, and the figures.

Each figure is a `plots.TextFigure`, whose alt text has its numbers.
"""

from __future__ import annotations

import time

import pandas as pd
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from irpo_utils import grading, models, plots
from irpo_utils.plots import BLUE


class Ban(LogitsProcessor):
    """Sets the logit of `token` to -inf in every row whose text so far satisfies `rule(text, row)`."""

    def __init__(self, token: int, rule, tokenizer, prompt_length: int):
        self.token, self.rule = token, rule
        self.tokenizer, self.prompt_length = tokenizer, prompt_length

    def __call__(self, input_ids, scores):
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :])
        for row, text in enumerate(texts):
            if self.rule(text, row):
                scores[row, self.token] = -torch.inf
        return scores


def greedy_under_rule(model, tokenizer, prompts: list[str], rule, token: str, limit: int):
    """Greedy completions in which `token` is banned wherever `rule(text so far, row)` holds."""
    batch = tokenizer(
        prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    ).to(model.device)
    length = batch["input_ids"].shape[1]
    [token_id] = tokenizer(token, add_special_tokens=False).input_ids
    made = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=False,
        max_new_tokens=limit,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(models.end_tokens(model, tokenizer)),
        logits_processor=LogitsProcessorList([Ban(token_id, rule, tokenizer, length)]),
    )
    return tokenizer.batch_decode(made[:, length:], skip_special_tokens=True)


def greedy(model, tokenizer, prompts: list[str], limit: int) -> list[str]:
    """Greedy completions of prompts, exactly as they are."""
    return greedy_under_rule(model, tokenizer, prompts, lambda text, row: False, "\n", limit)


def count_correct(completions: list[str], questions, task) -> int:
    """How many of the completions, one per question, are correct."""
    rows = [
        {**question, "completion": completion, "finished": True}
        for question, completion in zip(questions, completions, strict=True)
    ]
    return sum(grading.grade_one(row, task)["correct"] for row in rows)


def seconds(function, *arguments, repeats: int = 3) -> float:
    """The shortest of several times: other work on the machine disturbs it least."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - started)
    return min(times)


# ------------------------------------------------------------------------------ figures


def next_tokens(probabilities: pd.DataFrame) -> plots.TextFigure:
    """Probabilities of the next token as bars: a row per token, a column (panel) per setting."""
    tokens, settings = probabilities.shape
    figure, _ = plots.new_figure(2.4 * settings + 0.9, 1.1 + 0.3 * tokens, panels=settings)
    descriptions = []
    for panel, (name, column) in zip(figure.axes, probabilities.items(), strict=True):
        panel.bar_label(panel.barh(range(tokens), 100 * column, color=BLUE), fmt="%.1f", padding=4)
        labels = probabilities.index if panel is figure.axes[0] else [""] * tokens
        panel.set_yticks(range(tokens), labels)
        panel.set(title=name, xlabel="Probability (%)", xlim=(0, 118))
        panel.invert_yaxis()
        values = ", ".join(f"{token} {100 * value:.1f}" for token, value in column.items())
        descriptions.append(f"{name}: {values}.")
    figure.axes[0].set_ylabel("Next token")
    figure.alt_text = f"Probability of the next token (%). {' '.join(descriptions)}"
    return figure


def correct_under_rules(counts: dict[str, int], n: int):
    """Correct greedy completions of M_0, as it is and under each rule."""
    figure, axes = plots.new_figure(7, 2.6)
    names = list(counts)[::-1]
    axes.barh(names, [counts[name] for name in names], color=BLUE, height=0.6)
    for i, name in enumerate(names):
        axes.text(counts[name], i, f" {counts[name]}", va="center")
    axes.set(xlabel=f"correct of {n} questions", xlim=(0, n))
    figure.alt_text = f"Correct greedy completions of {n}: " + "; ".join(
        f"{name}: {count}" for name, count in counts.items()
    )
    return figure


def answer_logps(tokens: list[str], logps: list[float]):
    """The log-probability of every token of one completion."""
    figure, axes = plots.new_figure(9, 2.8)
    shown, values = tokens[:40], logps[:40]
    axes.bar(range(len(shown)), values, color=BLUE)
    axes.set_xticks(
        range(len(shown)),
        [token.replace("\n", "\\n").replace(" ", "␣") for token in shown],
        rotation=90,
    )
    axes.set(xlabel="token of the completion (␣: space)", ylabel="log-probability (nats)")
    lowest = sorted(zip(values, shown, strict=True))[:3]
    figure.alt_text = f"Log-probabilities of {len(shown)} tokens; the lowest: " + ", ".join(
        f"{token!r} {value:.2f}" for value, token in lowest
    )
    return figure


def gantt(lengths: list[int], n_rows: int):
    """Which row of a batch computes which completion: all rows wait, and rows refilled."""
    waiting, refilled = schedule_waiting(lengths, n_rows), schedule_refilled(lengths, n_rows)
    figure, panels = plots.new_figure(9, 3.4, panels=2)
    end = max(start + length for _, start, length in waiting)
    for axes, schedule, name in (
        (panels[0], waiting, "all rows wait for the longest"),
        (panels[1], refilled, "a free row takes the next completion"),
    ):
        for i, (row, start, length) in enumerate(schedule):
            colour = ("#0072B2", "#5AA5CF", "#A6CDE4")[i % 3]  # shades without a meaning
            axes.barh(row, length, left=start, color=colour, edgecolor="white", height=0.85)
        axes.set(xlabel="step", ylabel="row of the batch", xlim=(0, end), title=name)
        axes.invert_yaxis()
    needed = [
        sum(lengths) / (n_rows * max(start + length for _, start, length in schedule))
        for schedule in (waiting, refilled)
    ]
    figure.alt_text = (
        f"{len(lengths)} completions in {n_rows} rows: {needed[0]:.0%} of the computed rows are "
        f"needed if all rows wait, {needed[1]:.0%} if free rows are refilled."
    )
    return figure


def schedule_waiting(lengths: list[int], n_rows: int) -> list[tuple[int, int, int]]:
    """(row, first step, length) of every completion if each batch waits for its longest."""
    schedule, start = [], 0
    for i in range(0, len(lengths), n_rows):
        batch = lengths[i : i + n_rows]
        schedule += [(row, start, length) for row, length in enumerate(batch)]
        start += max(batch)
    return schedule


def schedule_refilled(lengths: list[int], n_rows: int) -> list[tuple[int, int, int]]:
    """The same if the next completion starts in the row that is free first."""
    schedule, free_at = [], [0] * n_rows
    for length in lengths:
        row = free_at.index(min(free_at))
        schedule.append((row, free_at[row], length))
        free_at[row] += length
    return schedule
