"""A finished run evaluated again, perhaps on another task."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pandas
from tqdm.auto import tqdm

from irpo_utils import UserError, evaluation, iteration, tasks
from irpo_utils.ops import checksums, contamination, export, hub, statistics, trial
from irpo_utils.ops.run import engine_of, learnt_before
from irpo_utils.ops.storage import Folder, check_path, read_inputs, read_profile
from irpo_utils.profiles import Profile
from irpo_utils.scale import processes
from studies import baselines, few_shot, grpo, significance  # noqa: F401 (three add methods)


def evaluate_run(
    run: str | Path,
    task: str | None = None,
    data: str | None = None,
    split: str | None = None,
    iterations: list[int | str] | None = None,
    k: int = 32,
    out: str | Path | None = None,
    allow_overlap: bool = False,
) -> str:
    """Evaluate M_t of a run again, perhaps on another task; writes a table and returns it as text.

    iterations: which M_t, by default the first and the last; the text ends with their paired
    comparison. "best" is the one that `best_iteration` chooses. Raises `UserError` if these are
    questions that the run was trained on, or those that chose the best iteration.
    """
    hub.limit_waiting()
    p = read_profile(run)
    wanted = list(dict.fromkeys(iterations if iterations is not None else (0, p.iterations)))
    if "best" in wanted:
        best, reason = best_iteration(run, p, split or p.eval_split)
        wanted = list(dict.fromkeys(best if t == "best" else t for t in wanted))
        if processes.is_first():
            tqdm.write(reason)
    if k < 1 or not wanted or min(wanted) < 0 or max(wanted) > p.iterations:
        raise UserError(
            f"--k must be at least 1, and --iterations from 0 to {p.iterations}, the last of {run}."
        )
    for t in wanted:
        adapter = Path(run) / f"iteration_{t}" / "adapter"
        if (t > 0 or p.start) and checksums.read(adapter) is None:
            raise UserError(f"{adapter} is missing or damaged. Run the command of {run} again.")
    folder = Path(out) if out else Path(run) / "evaluations"
    check_path(folder, "out")
    now = dataclasses.replace(
        p,
        task=task or p.task,
        data=data or (p.data if task in (None, p.task) else None),
        eval_split=split or p.eval_split,
        n_eval_questions=None,
        eval_samples=k,
        eval_samples_ends=k,
        allow_overlap=allow_overlap or p.allow_overlap,
        shard=False,
    )
    keep = _Evaluation(run, p, folder / f"{now.task}_{now.eval_split}.csv")
    with contextlib.closing(engine_of(now)) as engine:
        stages = iteration.Stages(now, keep, engine, processes.is_first())
        for t in wanted:
            stages.evaluate(t)
    text = pandas.DataFrame(keep.rows).to_string(index=False)
    if len(wanted) > 1:
        ends = keep.greedy[wanted[0]], keep.greedy[wanted[-1]]
        correct = [list(evaluation.correct_per_question(rows).values()) for rows in ends]
        difference = evaluation.compare(*ends)
        difference["p_mcnemar"] = significance.mcnemar(*correct)["p"]
        text += f"\n\nM_{wanted[-1]} against M_{wanted[0]}, greedy: {difference}"
    return text


def best_iteration(run: str | Path, p: Profile, split: str) -> tuple[int, str]:
    """The t of the highest greedy accuracy in the run's metrics, the earliest of a tie, and why.

    `split`: what M_t is to be evaluated on. Raises `UserError` if the run was evaluated on the same
    split or on test questions: the highest of several accuracies overestimates this M_t's.
    """
    if p.eval_split in ("test", "math500", split):
        raise UserError(
            f"--iterations best would choose M_t by its accuracy on the {p.eval_split} split, and "
            f"evaluate it on {split}. Choose on questions that are not used again: make the run "
            "with --eval-split validation, and add --split test here."
        )
    try:
        rows = pandas.read_csv(Path(run) / "metrics.csv")
        rows = rows[rows.metric == "greedy"].sort_values("iteration")
        complete = list(rows.iteration) == list(range(p.iterations + 1))
    except (OSError, ValueError, AttributeError):
        complete = False
    if not complete:
        raise UserError(
            f"{run}/metrics.csv lacks the greedy accuracy of some iterations. Run the command of "
            f"{run} again to finish it."
        )
    best = int(rows.loc[rows.value.idxmax(), "iteration"])  # the first of a tie
    each = ", ".join(f"M_{row.iteration} {row.value:.1%}" for row in rows.itertuples())
    return best, (
        f"best: M_{best}, by greedy accuracy on {rows.n.max():.0f} {p.eval_split} questions ({each})"
    )


class _Evaluation(Folder):
    """The adapters of a finished run `out`; the metrics of new questions go into `table_path`."""

    def __init__(self, out: str | Path, p: Profile, table_path: Path):
        super().__init__(out)
        self.p, self.table_path, self.rows, self.greedy = p, table_path, [], {}
        self.known = read_inputs(self.out)
        self.start = self.folder(0) / "adapter" if p.start else None
        self.revision = export.commit_of(self.known.get("model"))

    def check(self, stages: iteration.Stages) -> None:
        learnt, allowed = tasks.get(self.p.task).load("train", self.p.data), stages.p.allow_overlap
        if (
            self.known.get("training questions") not in (None, checksums.of_questions(learnt))
            and not allowed
        ):
            raise UserError(
                f"The training questions of {self.out} have changed since it was trained, so they "
                "cannot be compared with these. Restore the data, or add --allow-overlap true."
            )
        train = [*learnt, *learnt_before(self.p)]
        overlap = contamination.check(train, stages.eval_questions, allowed)
        if processes.is_first():
            tqdm.write(contamination.describe(overlap))

    def begin(self, stages: iteration.Stages) -> None:
        known = self.known.get("model")
        if known and export.fingerprint(stages.model) not in (None, known):
            raise UserError(
                f"The model {self.p.model} is no longer the one that {self.out} was made with. "
                "Restore it."
            )
        trial.check(stages.model, stages.tokenizer, stages.p, stages.engine)

    def dataset(self, t: int, name: str, make, over=None):
        answers = make(over)
        self.greedy[t] = answers["greedy"]
        return answers

    def evaluated(self, t: int, stages: iteration.Stages, answers) -> list[dict]:
        return statistics.further_rows(answers, stages.eval_questions)

    def metrics(self, t: int, rows: list[dict]) -> None:
        """Written after each iteration: an interrupt keeps what is there."""
        self.rows += rows
        self.write(self.table_path, pandas.DataFrame(self.rows).to_csv(index=False))
