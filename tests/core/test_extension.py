"""What a notebook cell can add without editing the package, and in how many lines."""

import inspect
import json
import math

import pytest
from datasets import Dataset, load_from_disk

from irpo_utils import iteration, methods, tasks, training
from irpo_utils.tasks import answers


def lines(*objects) -> int:
    """Source lines of functions and classes, with comments and docstrings."""
    return sum(len(inspect.getsource(thing).splitlines()) for thing in objects)


def run(profile, out):
    """A run's metrics of the last iteration, its pairs and its training log."""
    rows = iteration.run(profile, out, progress=False)
    text = (out / "iteration_1" / "adapter" / "training_log.jsonl").read_text()
    log = [json.loads(line) for line in text.splitlines()]
    return rows, load_from_disk(str(out / "iteration_0" / "pairs")), log


@pytest.fixture(autouse=True)
def _registries(monkeypatch):
    """What a test adds is gone after it."""
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    monkeypatch.setattr(training, "LOSSES", dict(training.LOSSES))


# ---------------------------------------------------------------- a loss


def ipo(pairs, alpha, beta):
    """Azar et al. 2023, arXiv 2310.12036, equation 17."""
    margin = (pairs.chosen - pairs.ref_chosen) - (pairs.rejected - pairs.ref_rejected)
    loss = (margin - 1 / (2 * beta)) ** 2
    return loss, {"loss_ipo": loss}


def add_loss():
    training.LOSSES["ipo"] = ipo


def test_a_loss_in_at_most_ten_lines(tiny, tmp_path):
    assert lines(ipo, add_loss) <= 10
    add_loss()
    _, _, log = run(tiny(loss="ipo", epochs=6.0, alpha=0.0), tmp_path / "run")
    # At the first step the margin is 0.
    assert log[0]["loss"] == log[0]["loss_ipo"] == pytest.approx((1 / (2 * 0.1)) ** 2, rel=1e-4)
    last = log[len(log) // 2 :]
    assert sum(row["loss"] for row in last) / len(last) < log[0]["loss"] - 0.1
    assert sum(row["rewards/margins"] for row in last) > 0 and math.isfinite(log[-1]["grad_norm"])


# ---------------------------------------------------------------- a reward and a method


def concise(rows):
    """A correct completion is better than an incorrect one, and a short one than a long one."""
    return [row["correct"] - len(row["completion"]) / 1000 for row in rows]


def test_a_reward_that_reads_the_text_in_at_most_six_lines(tiny, tmp_path):
    assert lines(concise) <= 6
    methods.METHODS["concise"] = methods.Method("Concise", "a notebook", reward=concise)
    rows, pairs, _ = run(tiny(method="concise"), tmp_path / "run")
    graded = load_from_disk(str(tmp_path / "run" / "iteration_0" / "graded"))
    rewards = {}
    for row in graded:
        [reward] = concise([row])
        rewards[row["id"], row["sample"]] = reward
    for row in pairs:
        chosen, rejected = row["chosen_sample"], row["rejected_sample"]
        assert rewards[row["id"], chosen] > rewards[row["id"], rejected]
    assert {row["method"] for row in rows} == {"concise"}


def add_method():
    settings = {"alpha": 0.0, "gold": True}
    methods.METHODS["gold_dpo"] = methods.Method("DPO with gold", "a notebook", settings)


def test_a_method_in_three_lines(tiny, tmp_path):
    assert lines(add_method) <= 3
    add_method()
    rows, pairs, log = run(tiny(method="gold_dpo"), tmp_path / "run")
    assert {row["method"] for row in rows} == {"gold_dpo"} and -1 in pairs["chosen_sample"][:]
    assert log[0]["loss"] == pytest.approx(log[0]["loss_dpo"])


# ---------------------------------------------------------------- a task


class Shopping(tasks.base.Task):
    """Word problems with a column of their own: the numbers of the story."""

    name = "shopping"
    story = (
        "{name} has {a} coins. {name} finds {b} more. A friend gives {name} {c} more coins. "
        "How many coins does {name} have now?"
    )

    def prompt(self, row):
        return f"Question: {row['question']}\nSolution:"

    def extract(self, completion, row=None):
        """The number after "Final answer:"."""
        text = answers.after_final_answer(completion)
        return text if text is not None and text.lstrip("-").isdigit() else None

    def is_correct(self, extracted, answer):
        return extracted == answer

    def load(self, split, data=None):
        rows = []
        for i in range(40 if split == "train" else 10):
            a, b, c = 20 + 7 * i % 50, 5 + 3 * i % 20, 11 + i % 17
            story = self.story.format(name="Mia" if i % 2 else "Tom", a=a, b=b, c=c)
            row = {"id": f"{split}-{i}", "question": story, "answer": str(a + b + c)}
            row["solution"] = f"{a}+{b}={a + b}\n{a + b}+{c}={a + b + c}\nFinal answer: {a + b + c}"
            rows.append(row | {"numbers": [a, b, c]})
        return Dataset.from_list(rows)


def knows_the_first_sum(rows):
    """A reward that reads a column of the task: the first step of the solution."""
    return [float(f"={sum(row['numbers'][:2])}" in row["completion"]) for row in rows]


@pytest.mark.xfail(
    not hasattr(tasks, "register"), reason="tasks.register is not there yet", strict=False
)
def test_a_task_with_its_own_columns_in_at_most_sixty_lines(tiny, tmp_path):
    assert lines(Shopping) + 1 <= 60
    tasks.register(Shopping())
    methods.METHODS["steps"] = methods.Method("Steps", "here", reward=knows_the_first_sum)
    profile = tiny(task="shopping", method="steps", gold=True)
    rows, pairs, _ = run(profile, tmp_path / "run")
    graded = load_from_disk(str(tmp_path / "run" / "iteration_0" / "graded"))
    for row in graded:
        assert row["answer"] == str(sum(row["numbers"]))
        assert row["correct"] == (row["extracted"] == row["answer"])
    assert len(pairs) and tasks.get("shopping").name == "shopping"
    assert [row["n"] for row in rows if row["metric"] == "greedy"] == [4, 4]
