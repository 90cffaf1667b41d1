"""What only a CUDA GPU can show: QLoRA in bf16 and fp16, the paged optimiser, memory that runs out.

`make gpu-test`; skipped without a GPU.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
from datasets import Dataset

from irpo_utils import logprobs, models, profiles, sampling, tasks, training
from irpo_utils.engines import cpu, cuda_graph, shared_prompt
from irpo_utils.ops import plan as planning
from irpo_utils.ops import run as runs
from irpo_utils.ops import trainer
from studies import gpu_phases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
DEVICE = "cuda"
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def exact_products():
    """A run with a base in 16 bits switches on TF32, which tests in fp32 would feel."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="module")
def task():
    return tasks.get("word_problems")


@pytest.fixture(scope="module")
def questions(task):
    return task.load("validation").select(range(48))


@pytest.fixture(scope="module")
def loaded():
    return models.load("seed", device=DEVICE, dtype="float32")


@pytest.fixture()
def in_fp32(loaded):
    """The seed model as M_0."""
    models.set_adapter(loaded[0], None)
    return loaded


@pytest.fixture()
def preferences(loaded, task, questions):
    """Pairs of gold solutions and bare numbers."""
    tokenizer, rows = loaded[1], []

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    for i, row in enumerate(questions):
        prompt = models.render_prompt(tokenizer, task.prompt(row))
        responses = {
            "chosen_ids": encode(row["solution"]) + [tokenizer.eos_token_id],
            "rejected_ids": encode(f"Final answer: {i}") + [tokenizer.eos_token_id],
        }
        rows.append({"prompt_ids": encode(prompt)} | responses)
    return Dataset.from_list(rows)


def train(model, tokenizer, pairs, **settings):
    options = {"learning_rate": 1e-3, "disable_tqdm": True} | settings
    return training.train(model, tokenizer, pairs, **options)


def skip_without(dtype: str) -> None:
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bf16")


@pytest.mark.parametrize("engine", [None, cpu.Engine(), cuda_graph.Engine()])
def test_greedy_is_generate_token_for_token(in_fp32, questions, task, engine):
    model, tokenizer = in_fp32
    settings = {"max_new_tokens": 60, "progress": False, "engine": engine}
    ours = sampling.sample(model, tokenizer, questions, task, 1, 0.0, **settings)
    for row in ours:
        ids = torch.tensor([row["prompt_ids"]], device=DEVICE)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        theirs = model.generate(**inputs, do_sample=False, max_new_tokens=60)
        assert row["completion_ids"] == theirs[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 1e-3), ("bfloat16", 0.1), ("float16", 0.05)]
)
def test_log_probabilities_are_those_of_the_cpu(in_fp32, questions, task, dtype, tolerance):
    """Per token, nats; NF4 weights are the same numbers on both."""
    skip_without(dtype)
    drawn = sampling.sample(*in_fp32, questions, task, 1, max_new_tokens=60, progress=False)
    texts, scores = (list(drawn["prompt_ids"]), list(drawn["completion_ids"])), []
    for device, kind in (("cpu", "float32"), (DEVICE, dtype)):
        model, tokenizer = models.load("seed", device=device, dtype=kind)
        scores.append(logprobs.score(model, tokenizer, *texts))
    for on_cpu, on_gpu, length in zip(*scores, drawn["n_tokens"], strict=True):
        assert abs(on_cpu - on_gpu) / length < tolerance


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "adamw_torch"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_qlora_learns_in_half_precision(preferences, dtype, optimizer):
    """Starts with margin 0, loses nothing to underflow, and ends lower."""
    skip_without(dtype)
    model, tokenizer = models.load("seed", device=DEVICE, dtype=dtype)
    settings = {"micro_batch_size": 4, "gradient_checkpointing": True, "optim": optimizer}
    log = train(model, tokenizer, preferences, num_train_epochs=4, **settings).to_pandas()
    assert log.loss_dpo[0] == pytest.approx(0.6931, abs=0.02)
    assert log.loss.iloc[-1] < 0.7 * log.loss[0] and log.loss.notna().all()
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert all(p.dtype == torch.float32 for p in trained) and any(p.any() for p in trained)


def test_the_paged_optimiser_takes_the_steps_of_adamw(in_fp32, preferences):
    model, tokenizer, ends = *in_fp32, {}
    for optimizer in ("adamw_torch", "paged_adamw_8bit"):
        models.set_adapter(model, None)
        log = train(model, tokenizer, preferences, num_train_epochs=4, optim=optimizer)
        ends[optimizer] = log["loss"][-1]
    assert ends["paged_adamw_8bit"] == pytest.approx(ends["adamw_torch"], rel=0.1)


@pytest.mark.parametrize("base", [training.IterativeRPOTrainer, shared_prompt.SharedPromptTrainer])
def test_memory_that_runs_out_costs_a_smaller_micro_batch_and_no_step(
    in_fp32, preferences, tmp_path, capsys, base
):
    """A true out-of-memory error: the process may use little more than the loaded model takes."""
    model, tokenizer = in_fp32
    rows = [row | {"prompt_ids": row["prompt_ids"] * 8} for row in preferences]
    many = Dataset.from_list(rows * 4)
    engine = SimpleNamespace(trainer=lambda model: base)

    def in_a_run(micro: int):
        """The log of `trainer.train` as a run calls it, from M_0."""
        given = {"micro_batch_size": micro, "gradient_checkpointing": False}
        p = profiles.get("smoke", batch_size=64, **given)
        stages = SimpleNamespace(p=p, engine=engine, model=model, tokenizer=tokenizer)

        def make(**options):
            models.set_adapter(model, None)
            return train(model, tokenizer, many, batch_size=64, **options)

        return trainer.train(make, stages, tmp_path / f"from_{micro}", print)[0]

    expected = in_a_run(2)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    in_a_run(8)
    allowed = torch.cuda.max_memory_reserved()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    # The reference is scored in the same micro-batches, without gradients, before training.
    try:
        torch.cuda.set_per_process_memory_fraction(1.3 * allowed / total)
        found = in_a_run(64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Out of memory: continuing with --micro-batch-size" in "".join(capsys.readouterr())
    assert found["loss"][:] == pytest.approx(expected["loss"][:], rel=1e-2)


def test_the_base_stays_loaded_between_the_stages(in_fp32, preferences, questions, task):
    model, tokenizer = in_fp32

    def places():
        return {n: p.data_ptr() for n, p in model.named_parameters() if "lora_" not in n}

    before = places()
    train(model, tokenizer, preferences)
    sampling.sample(model, tokenizer, questions, task, 2, max_new_tokens=20, progress=False)
    assert places() == before


def test_a_whole_run_on_the_gpu(tmp_path):
    settings = {"optimizer": "paged_adamw_8bit", "gradient_checkpointing": True}
    runs.run(profiles.get("smoke", **settings), tmp_path / "run", progress=False)
    table = pandas.read_csv(tmp_path / "run" / "metrics.csv")
    assert set(table[table.metric == "greedy"].iteration) == {0, 1, 2}
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert record["gpus"] and record["dtype"] in ("bfloat16", "float16")


def test_the_estimate_of_memory_holds_on_the_gpu(tmp_path):
    changes = {"sampling_batch_size": 2048, "n_samples": 32, "n_questions": 64}
    profile = profiles.get("smoke", **changes)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    runs.run(profile, tmp_path / "run", progress=False)
    measured = torch.cuda.max_memory_reserved() / 1e9
    assert planning.plan(profile).total.memory / 1e9 == pytest.approx(measured, rel=0.5, abs=1.0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("words", [(), ("split",)])
def test_two_gpus_take_the_same_steps_as_one(tmp_path, words):
    """Over NCCL: whole copies of the model, and every layer split."""
    import shared_program
    import test_processes

    logs = []
    for n in (1, 2):
        out = tmp_path / str(n)
        split = words if n == 2 else ()
        test_processes.launch(shared_program.__file__, test_processes.PAIRS, out, *split, n=n)
        logs.append(json.loads((out / "0.json").read_text())["log"])
    for one, two in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=0.02, abs=0.01)


@pytest.fixture(scope="module")
def vllm_url(tmp_path_factory):
    """A vLLM server with SmolLM2-135M on this GPU; other tests keep what it leaves free."""
    if shutil.which("vllm") is None:
        pytest.skip("vLLM is not on the PATH (pip install vllm, in a separate environment)")
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with gpu_phases.vllm_server(models.find("smollm2-135m"), log) as url:
        yield url


def test_vllm_completes_as_the_loaded_model_with_and_without_an_adapter(
    vllm_url, questions, task, tmp_path, monkeypatch
):
    """Greedy completions agree for most questions; bf16 breaks ties otherwise."""
    from irpo_utils.engines import vllm

    monkeypatch.setenv("VLLM_URL", vllm_url)
    engine = vllm.Engine()
    profile = profiles.get("smoke", model="smollm2-135m", quantize=False, dtype="bfloat16")
    model, tokenizer = engine.load(profile)
    adapters, texts = [None, tmp_path / "adapter"], []
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.02)
    model.save_pretrained(adapters[1], save_embedding_layers=False)
    settings = {"max_new_tokens": 40, "progress": False}
    for adapter in adapters:
        engine.use(model, adapter)
        parts = model, tokenizer, questions, task, 1, 0.0
        theirs = sampling.sample(*parts, engine=engine, **settings)  # compares log-probabilities
        ours = sampling.sample(*parts, **settings)
        ids = ours["completion_ids"][:], theirs["completion_ids"][:]
        assert sum(a == b for a, b in zip(*ids, strict=True)) > 0.5 * len(ours)
        texts.append(theirs["completion"][:])
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    "notebook", sorted(path.name for path in (ROOT / "notebooks" / "solutions").glob("*.ipynb"))
)
def test_the_notebooks_run_unchanged_on_the_gpu(notebook, tmp_path):
    gpu_phases.execute(ROOT / "notebooks" / "solutions" / notebook, tmp_path, seconds=900)


# ---- CUDA graphs


@pytest.fixture()
def graphs():
    """An engine whose memory is free again after the test."""
    engine = cuda_graph.Engine()
    yield engine
    engine.close()


def draw(loaded, questions, task, engine=None, **settings):
    defaults = {"n": 8, "max_new_tokens": 100, "progress": False, "seed": 5}
    return sampling.sample(*loaded, questions, task, engine=engine, **defaults | settings)


def randomised(seed: int, **options):
    """The seed model with an adapter that is not zero."""
    model, tokenizer = models.load("seed", device=DEVICE, **options)
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.02)
    return model, tokenizer


def assert_agree(ours, theirs, share: float, tolerance: float):
    """So many tokens are equal; where a whole completion is, its log-probability (nats) is close."""
    pairs = list(zip(ours["completion_ids"], theirs["completion_ids"], strict=True))
    equal = sum(sum(a == b for a, b in zip(*pair)) for pair in pairs)
    assert equal >= share * sum(max(map(len, pair)) for pair in pairs)
    rows = [i for i, (a, b) in enumerate(pairs) if a == b]
    differences = [abs(ours["logprob"][i] - theirs["logprob"][i]) for i in rows]
    assert max(differences) < tolerance


def assert_recorded(engine):
    """Several buckets have a graph; those of a single step have none."""
    assert not engine.refused
    assert sum(graph is not None for graph in engine.static.graphs.values()) >= 2


@pytest.mark.parametrize(
    "dtype, quantize, settings",
    [
        ("bfloat16", True, {}),
        ("bfloat16", True, {"temperature": 0.0}),
        ("bfloat16", False, {"temperature": 1.3, "top_p": 0.9}),
        ("float16", True, {}),
        ("float32", False, {}),
    ],
)
def test_a_graph_is_the_step_called_directly(
    questions, task, graphs, dtype, quantize, settings, monkeypatch
):
    skip_without(dtype)
    loaded = randomised(1, dtype=dtype, quantize=quantize)
    ours = [draw(loaded, questions, task, graphs, **settings) for _ in range(2)]
    assert_recorded(graphs)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    direct = cuda_graph.Engine()
    theirs = draw(loaded, questions, task, direct, **settings)
    assert not any(direct.static.graphs.values())
    for found in ours:
        assert_agree(found, theirs, 0.99, 0.05)


@pytest.mark.parametrize("quantize", [True, False])
def test_graphs_draw_the_completions_of_the_plain_decoder(questions, task, graphs, quantize):
    loaded = randomised(1, dtype="float32", quantize=quantize)
    assert_agree(draw(loaded, questions, task, graphs), draw(loaded, questions, task), 0.97, 1e-2)
    assert_recorded(graphs)


def test_log_probabilities_of_graphs_in_bf16_are_those_of_the_scorer(questions, task, graphs):
    skip_without("bfloat16")
    loaded = randomised(1, dtype="bfloat16")
    rows = draw(loaded, questions, task, graphs)
    scores = logprobs.score(*loaded, list(rows["prompt_ids"]), list(rows["completion_ids"]))
    per_token = [abs(a - b) / n for a, b, n in zip(rows["logprob"], scores, rows["n_tokens"])]
    assert sum(per_token) / len(per_token) < 0.05


def test_a_completion_of_a_graph_does_not_depend_on_its_batch(questions, task, graphs):
    loaded = randomised(1, dtype="float32", quantize=False)
    whole = draw(loaded, questions, task, graphs)
    few = draw(loaded, questions.select([7, 2]), task, graphs)
    alone = draw(loaded, questions.select([7, 2]), task, cuda_graph.Engine())
    expected = whole.select([*range(56, 64), *range(16, 24)])
    for found in (few, alone):
        assert_agree(found, expected, 0.97, 1e-2)


def test_graphs_compute_with_the_adapter_in_use(questions, task, graphs, tmp_path):
    loaded = randomised(1, dtype="float32")
    loaded[0].save_pretrained(tmp_path)
    first = draw(loaded, questions, task, graphs)
    kept = dict(graphs.static.graphs)
    found = {}
    for adapter in (None, tmp_path):
        graphs.use(loaded[0], adapter)
        found[adapter] = draw(loaded, questions, task, graphs)
        assert_agree(found[adapter], draw(loaded, questions, task), 0.97, 1e-2)
    assert all(graphs.static.graphs[bucket] is graph for bucket, graph in kept.items() if graph)
    assert_agree(found[tmp_path], first, 0.99, 1e-2)
    assert found[None]["completion_ids"][:] != first["completion_ids"][:]


def test_training_gets_the_memory_of_the_graphs(preferences, questions, task, graphs):
    loaded = randomised(1, dtype="float32")
    draw(loaded, questions.select([0]), task)  # workspaces of the libraries
    torch.cuda.empty_cache()
    before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    draw(loaded, questions, task, graphs)
    held = torch.cuda.memory_allocated() - before
    assert held > 10e6
    graphs.close()
    assert torch.cuda.memory_allocated() - before < 0.1 * held + 64e6
    assert free - torch.cuda.mem_get_info()[0] < 0.1 * held + 512e6  # CUDA keeps some for graphs
    train(*loaded, preferences, num_train_epochs=1)
    assert_agree(draw(loaded, questions, task, graphs), draw(loaded, questions, task), 0.97, 1e-2)


def test_graphs_with_little_memory_take_fewer_rows(questions, task, graphs, capsys):
    """The process may use less than the GPU says is free, so the first attempts fail."""
    loaded = randomised(1, dtype="float32")
    expected = draw(loaded, questions, task, n=32, batch_size=256)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 1.5e9) / total)
    try:
        ours = draw(loaded, questions, task, graphs, n=32, batch_size=2**14)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Out of memory: continuing with" in "".join(capsys.readouterr())
    assert_agree(ours, expected, 0.97, 1e-2)
