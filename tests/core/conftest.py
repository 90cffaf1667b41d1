"""The seed model, questions and pairs that the tests of the core share."""

import pytest
import torch
from core_settings import TINY
from datasets import Dataset

from irpo_utils import iteration, models, profiles, tasks, training
from irpo_utils.engines import cpu


@pytest.fixture(scope="session")
def loaded():
    return models.load("seed")


@pytest.fixture(scope="session")
def fast():
    """The model and tokenizer as the engine of a CPU loads them."""
    return cpu.Engine().load(profiles.get("smoke"))


@pytest.fixture()
def model(loaded):
    """The seed model with a zero adapter, whatever an earlier test did to it."""
    models.set_adapter(loaded[0], None)
    training.draw_adapter(loaded[0], 0)
    return loaded[0]


@pytest.fixture(scope="session")
def tokenizer(loaded):
    return loaded[1]


@pytest.fixture(scope="session")
def task():
    return tasks.get("word_problems")


@pytest.fixture(scope="session")
def questions(task):
    return task.load("validation").select(range(16))


@pytest.fixture(scope="session")
def preferences(tokenizer):
    """Eleven pairs of unequal lengths: no micro-batch but one divides their number."""

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    rows = []
    for i in range(11):
        story = f"Mia has {i + 12} shells. {'Mia finds 5 more. ' * (i % 4)}How many?"
        steps = "".join(f"{i + 12 + 5 * j}+5={i + 17 + 5 * j}\n" for j in range(i % 4))
        end = [tokenizer.eos_token_id]
        rows.append(
            {
                "prompt_ids": encode(
                    models.render_prompt(tokenizer, f"Question: {story}\nSolution:")
                ),
                "chosen_ids": encode(f"{steps}Final answer: {i + 12 + 5 * (i % 4)}") + end,
                "rejected_ids": encode(f"Final answer: {i}") + (end if i % 2 else []),
            }
        )
    return Dataset.from_list(rows)


@pytest.fixture()
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["plain", "cpu"])
def engine(request):
    return iteration.plugin(f"engines.{request.param}").Engine()


@pytest.fixture()
def tiny():
    """`tiny(method=..., ...)`: the profile of a run of a few seconds."""
    return lambda **changes: profiles.get("smoke", **TINY | changes)
