"""The loop: sample, grade, pair, train, evaluate, T times. The same call resumes a run.

    runs/NAME/
      profile.json  metrics.csv
      iteration_0/  evaluation/  samples/ graded/ pairs/  metrics.json           made with M_0
      iteration_1/  adapter/  evaluation/  samples/ graded/ pairs/  metrics.json     M_1, ...

`ops.run_directory` keeps each artefact, and survives kills and full disks.
"""

import functools
import importlib

from datasets import Dataset, concatenate_datasets

from irpo_utils import UserError, evaluation, grading, methods, pairs, sampling, tasks, training
from irpo_utils.profiles import Profile


def run(profile: Profile, out, keep=None, engine=None, progress: bool = True) -> list[dict]:
    """Iterative RPO with these settings in the run directory `out`; resumes what is there.

    keep: how artefacts are stored, by default a `RunDirectory`, which also applies `reference` and
    `report_to`. engine: how to compute, by default the profile's. Returns the rows of metrics.csv:
    `method`, `seed`, `iteration`, `split`, `metric`, `k`, `value`, `low`, `high`, `n`.
    """
    methods.check_start(profile)
    p, keep = methods.apply(profile), keep or plugin("ops.run_directory").RunDirectory(out)
    stages = Stages(p, keep, engine or plugin(f"engines.{p.engine}").Engine(), progress)
    stages.evaluate(0)
    for t in range(p.iterations):
        if stages.method.train is None:
            samples = stages.sample(t)
            graded = stages.grade(t, samples)
            stages.pair(t, graded)
        stages.train(t + 1)
        stages.evaluate(t + 1)
    return keep.table(range(p.iterations + 1))


class Stages:
    """The stages of one run; each result is computed once and then read from `keep`."""

    def __init__(self, p: Profile, keep, engine, progress: bool = True):
        self.p, self.keep, self.engine, self.progress = p, keep, engine, progress
        self.method, self.task = methods.get(p.method), tasks.get(p.task)
        self.train_questions = self.task.load("train", p.data).shuffle(seed=p.seed)
        self.eval_questions = first(self.task.load(p.eval_split, p.data), p.n_eval_questions)
        if self.method.task:
            self.task = self.method.task(self.task, p)
        self.history: list[Dataset] = []  # the pairs of all iterations so far
        keep.check(self)
        self.model, self.tokenizer = self.engine.load(p, keep.revision)
        how = {"max_new_tokens": p.max_new_tokens, "batch_size": p.sampling_batch_size}
        how |= {"task": self.task, "progress": progress, "engine": engine}
        # Draws completions of the model as it is: (questions, n, temperature, seed, ...).
        self.draw = functools.partial(sampling.sample, self.model, self.tokenizer, **how)
        keep.begin(self)

    def sample(self, t: int) -> Dataset | None:
        """N completions of M_t per training question; None if the method needs none."""
        if not self.method.samples:
            return None
        # A method that starts from another one's M_1 trains on the samples of M_0.
        adapter = None if self.method.start and t == 0 else self.keep.adapter(t)

        def make(questions) -> Dataset:
            self.engine.use(self.model, adapter)
            settings = {"temperature": self.p.temperature_of(t), "top_p": self.p.top_p}
            return self.draw(questions, n=self.p.n_samples, seed=self.seed(t, 1), **settings)

        return self.keep.dataset(t, "samples", make, over=self.questions(t))

    def grade(self, t: int, samples: Dataset | None) -> Dataset | list[dict]:
        """Reward 1 where the final answer equals the gold answer, or the method's own reward."""
        if samples is None:  # gold solutions are paired with an empty completion per question
            questions = self.questions(t)
            return pairs.empty_completions(questions, self.prompts(questions)[0], self.tokenizer)
        graded = self.keep.dataset(t, "graded", lambda: grading.grade(samples, self.task))
        return methods.reward(graded, self.method.reward)

    def pair(self, t: int, graded: Dataset | list[dict]) -> None:
        """K pairs per question, for training M_{t+1}; one per gold solution without samples."""

        def make() -> tuple[Dataset, dict]:
            p, gold, k = self.p, None, self.p.k_pairs if self.method.samples else 1
            if p.gold or not self.method.samples:
                gold = pairs.gold_completions(self.questions(t), self.tokenizer)
            limits = p.max_length, p.max_pairs, p.deduplicate, p.pairing, self.seed(t, 2)
            return pairs.build_pairs(graded, k, gold, *limits)

        preferences, counts = self.keep.dataset(t, "pairs", make)
        self.history.append(preferences)
        shared = {"n": counts["questions"]}
        self.report(t, [{"metric": f"pairs_{k}", "value": v} | shared for k, v in counts.items()])

    def train(self, t: int) -> None:
        """M_t from M_{t-1}, which is also the reference, and its pairs."""
        p, seed = self.p, self.seed(t, 3)

        def make(**extra) -> Dataset:
            self.engine.use(self.model, self.keep.adapter(t - 1))
            model = self.model, self.tokenizer
            if self.method.train:
                return self.method.train(*model, self.questions(t - 1), self.task, p, seed)
            preferences = concatenate_datasets(self.history if p.keep_pairs else self.history[-1:])
            batch = {"batch_size": p.batch_size, "micro_batch_size": p.micro_batch_size}
            length = {"num_train_epochs": p.epochs, "max_steps": p.max_steps}
            schedule = {"warmup_steps": p.warmup_ratio, "lr_scheduler_type": p.lr_scheduler}
            step = {"optim": p.optimizer, "max_grad_norm": p.max_grad_norm}
            how = {"trainer": self.engine.trainer(self.model), "loss": p.loss, "seed": seed}
            how |= {"gradient_checkpointing": p.gradient_checkpointing}
            how |= {"disable_tqdm": not self.progress} | batch | length | schedule | step | extra
            return training.train(*model, preferences, p.alpha, p.beta, p.learning_rate, **how)

        self.keep.train(t, make, self)

    def evaluate(self, t: int) -> None:
        """Accuracy of M_t: greedy, and over k samples per question."""
        p = self.p
        k = p.eval_samples_ends if t in (0, p.iterations) else p.eval_samples

        def make(questions):
            self.engine.use(self.model, self.keep.adapter(t))
            seed = self.seed(0, 4)
            greedy = self.draw(questions, n=1, temperature=0.0, seed=seed)
            sampled = self.draw(questions, n=k, temperature=p.eval_temperature, seed=seed)
            return evaluation.graded(greedy, sampled, self.task)

        answers = self.keep.dataset(t, "evaluation", make, over=self.eval_questions)
        rows = evaluation.score(answers["greedy"], answers["sampled"], k)
        self.report(t, rows + self.keep.evaluated(t, self, answers))

    def report(self, t: int, rows: list[dict]) -> None:
        """Add rows to the metrics of iteration t."""
        p = self.p
        head = {"method": p.method, "seed": p.seed, "iteration": t, "split": p.eval_split}
        columns = {"metric": None, "k": 0, "value": None, "low": None, "high": None, "n": None}
        self.keep.metrics(t, [head | columns | row for row in rows])

    def questions(self, t: int) -> Dataset:
        """The training questions of iteration t."""
        available = len(self.train_questions)
        n = min(self.p.n_questions or available, available)
        start = t * n if self.p.fresh_questions else 0
        return self.train_questions.select([i % available for i in range(start, start + n)])

    def prompts(self, questions: Dataset):
        """The rendered prompts of the questions, as text and as token ids."""
        settings = self.task, self.p.max_new_tokens
        return sampling.render_prompts(self.model, self.tokenizer, questions, *settings)

    def seed(self, t: int, purpose: int) -> int:
        """Different random numbers for every iteration and purpose, the same when resumed."""
        return ((self.p.seed * 1000 + t) * 10 + purpose) % 2**32


def plugin(name: str):
    """A module of this package by name: the core does not import engines and storage itself."""
    try:
        return importlib.import_module(f"irpo_utils.{name}")
    except ModuleNotFoundError as error:
        raise UserError(f"{error}. --engine is plain, cpu, cuda_graph or vllm.") from error


def first(data: Dataset, n: int | None) -> Dataset:
    return data if n is None else data.select(range(min(n, len(data))))
