"""What the helpers of several notebooks share: runs to read, or completions drawn now."""

from __future__ import annotations

from pathlib import Path

from irpo_utils import grading, sampling, tasks
from irpo_utils.ops import run as runs

ROOT = Path(__file__).resolve().parents[1]


def run_with(name: str, profile, artefact: str) -> Path | None:
    """The first run of this model and task that has the artefact: the reader's, else the shipped."""
    for run in (ROOT / "runs" / name, ROOT / "notebooks" / "shipped_run"):
        if (run / artefact / "state.json").exists():
            settings = runs.read_profile(run)
            if (settings.model, settings.task) == (profile.model, profile.task):
                return run
    return None


def new_completions(profile, n_questions: int):
    """Graded completions of M_0 for training questions, drawn now."""
    task, (model, tokenizer) = tasks.get(profile.task), runs.load_model(profile)
    questions = task.load("train", profile.data).shuffle(seed=profile.seed)
    samples = sampling.sample(
        model,
        tokenizer,
        questions.select(range(n_questions)),
        task,
        n=profile.n_samples,
        temperature=profile.temperature_of(0),
        top_p=profile.top_p,
        max_new_tokens=profile.max_new_tokens,
        batch_size=profile.sampling_batch_size,
        progress=False,
        engine=runs.engine_of(profile),
    )
    return grading.grade(samples, task)


def finished_stages(out: Path) -> dict[str, float]:
    """The finished stages of a run, in order, and the time at which each was stored."""
    files = out.glob("iteration_*/*/checksums.json")
    times = {str(file.parent.relative_to(out)): file.stat().st_mtime for file in files}
    return dict(sorted(times.items(), key=lambda item: item[1]))
