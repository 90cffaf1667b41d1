"""What a task is: a prompt, reading an answer, comparing it with gold, and questions."""

SPLITS = ("train", "validation", "test")


class Task:
    """A kind of question: a name and these four methods. `tasks.register` gives it to a run.

    A row has `id`, `question` and `answer` (text), perhaps `solution` (gold chain of thought) and
    `choices`. Any other column travels with the row, unless `sample` or `grade` adds its name.
    """

    name: str

    def prompt(self, row: dict) -> str:
        """The text of the user's turn; `sampling` puts the model's chat template around it."""
        raise NotImplementedError

    def extract(self, completion: str, row: dict | None = None) -> str | None:
        """The final answer, or None. Equal answers must be returned as equal text, for the vote."""
        raise NotImplementedError

    def is_correct(self, extracted: str | None, answer: str, row: dict | None = None) -> bool:
        """Whether it equals the gold answer (section 2). `row`, the question, may be left out."""
        raise NotImplementedError

    def load(self, split: str, data: str | None = None):
        """The `Dataset` of "train", "validation" or "test"; `data` is a local folder or file."""
        raise NotImplementedError
