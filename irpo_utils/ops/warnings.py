"""Messages of a run: unread answers, signs of a collapse, and which model to keep."""

from __future__ import annotations

from tqdm.auto import tqdm
from transformers import TrainerCallback

from irpo_utils import UserError, grading, methods
from irpo_utils.scale import processes

KL_WARNING = 4.0  # nats per completion; no run in figures/stability.csv that kept rising had more
STEPS = 10  # the last steps that are averaged


def of_training(rows: list[dict], steps: int, beta: float) -> list[str]:
    """What the last rows of a training log say, once warm-up is over; `steps` is the total."""
    last = rows[-STEPS:]
    if len(rows) < max(20, steps // 5) or "rewards/accuracies" not in last[0]:
        return []
    accuracy = sum(row["rewards/accuracies"] for row in last) / len(last)
    ratio = sum(row["rewards/chosen"] for row in last) / len(last) / beta
    found = []
    if accuracy < 0.5:
        found.append(f"rejected gain on chosen: reward accuracy {accuracy:.2f} in {STEPS} steps")
    if ratio < -1:
        found.append(
            f"chosen completions lose probability: {ratio:.1f} nats against the reference over "
            f"{STEPS} steps. Lower --learning-rate, or raise --alpha"
        )
    return found


def report_unread(t: int, graded, p) -> None:
    """Print how many completions of M_t have no readable answer, and their commonest endings.

    Raises `UserError` if every completion was cut off and profile `p` takes its chosen ones from
    correct answers alone: there are none.
    """
    by_answer = not p.gold and methods.get(p.method).reward is None
    if by_answer and set(graded["reason"]) == {"truncated"}:
        raise UserError(
            f"None of the {len(graded)} completions of M_{t} ended: the model wrote no end token "
            f"within {max(graded['n_tokens'])} tokens. Raise --max-new-tokens, or check that the "
            "model's chat template ends a turn with a token that the model has learnt to write."
        )
    count, endings = grading.unread(graded)
    if count and processes.is_first():
        commonest = ", ".join(f"{ending!r} ({n})" for ending, n in endings)
        unread = f"{count} of {len(graded)} completions have no readable answer"
        tqdm.write(f"     M_{t}: {unread}; their commonest endings: {commonest}")


def of_evaluation(t: int, before: dict, now: dict) -> list[str]:
    """What the metrics of M_t say next to those of M_{t-1}; both map metric to value."""
    found, cut = [], before["truncated_rate"]
    if now["truncated_rate"] > min(max(2 * cut, 0.1), (1 + cut) / 2):
        shares = f"{now['truncated_rate']:.0%} of those of M_{t} do not end, of M_{t - 1} {cut:.0%}"
        found.append(f"completions get too long: {shares}")
    if now["sampled"] < before["sampled"] - 0.05:
        found.append(
            f"accuracy fell: sampled {before['sampled']:.1%} to {now['sampled']:.1%}. Return to "
            f"M_{t - 1}, and lower --learning-rate or raise --alpha"
        )
    if now.get("kl_to_previous", 0) > KL_WARNING:
        found.append(f"a long step: KL to M_{t - 1} is {now['kl_to_previous']:.1f} nats")
    return found


def of_validation(accuracy: list[float]) -> str:
    """What patience 2 says of the greedy accuracies of M_0 to M_t on validation questions.

    `scripts/studies/stopping.py` scores this rule among others on finished runs.
    """
    t = len(accuracy) - 1
    best = accuracy.index(max(accuracy))
    if best == t:
        return f"M_{t} is the best model so far on validation ({accuracy[t]:.1%}): continue"
    if t - best == 1:
        return (
            f"M_{t} does not exceed M_{best} on validation ({accuracy[t]:.1%}, "
            f"{accuracy[best]:.1%}): one more iteration decides whether to stop"
        )
    return f"M_{best + 1} to M_{t} do not exceed M_{best} on validation: stop and keep M_{best}"


class CollapseWarning(TrainerCallback):
    """Calls `warn` once for each sign of a collapse, with the step that shows it."""

    def __init__(self, warn):
        self.warn, self.known = warn, set()

    def on_log(self, args, state, control, **kwargs):
        rows = [row for row in state.log_history if "tokens" in row]
        for sign in of_training(rows, state.max_steps, args.beta):
            kind = sign.partition(":")[0]
            if kind not in self.known:
                self.known.add(kind)
                text = f"{sign} (step {state.global_step})"
                tqdm.write(f"warning: {text}")
                self.warn(text)
