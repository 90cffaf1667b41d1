"""Small random models of many types: each works in all stages, or is refused right after loading."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from irpo_utils import UserError, logprobs, models, profiles, sampling, tasks, training
from irpo_utils.engines import Engine as PlainEngine
from irpo_utils.engines import cpu, cuda_graph
from irpo_utils.ops import run, trial
from studies import evaluate_again

SEED = models.FOLDERS["seed"]
SMALL = {
    "vocab_size": 1097,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # so large that a wrong attention changes the probabilities
    "pad_token_id": 0,
    "eos_token_id": 3,
    "bos_token_id": None,
}
WINDOW = {"sliding_window": 8}  # shorter than a prompt
GEMMA = WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8}
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 8, "moe_intermediate_size": 16}
FAMILIES = {  # name: (model type, settings)
    "cohere2": ("cohere2", WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", GEMMA),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with sliding windows": ("mistral", WINDOW),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "gpt-neox": ("gpt_neox", {}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3-moe": ("qwen3_moe", EXPERTS | {"num_experts": 4}),
    "gpt-oss": ("gpt_oss", EXPERTS | WINDOW | {"num_local_experts": 4}),
    "gpt2": ("gpt2", {}),
    "bloom": ("bloom", {}),
    "falcon": ("falcon", {}),
    "falcon with alibi": ("falcon", {"alibi": True}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "llama with dropout": ("llama", {"attention_dropout": 0.5}),
    "llama": ("llama", {}),
    "mixtral with noise": ("mixtral", {"num_local_experts": 4, "router_jitter_noise": 0.3}),
    "mamba": ("mamba", {}),
    "rwkv": ("rwkv", {}),
    "jamba": ("jamba", {}),
}
REFUSED = ("mamba", "rwkv", "jamba")
WORKING = [name for name in FAMILIES if name not in REFUSED]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture()
def build(tmp_path):
    """`build("qwen2")`: the folder of a random model of this family with the seed's tokenizer."""

    def build(name: str) -> str:
        kind, settings = FAMILIES[name]
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SMALL | settings)))
        base.save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(SEED).save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return build


@pytest.fixture()
def load(build):
    """`load("qwen2")`: model, tokenizer, profile and engine, as a run has them after loading."""

    def load(name: str, engine=None, quantize: bool = False):
        engine = engine or cpu.Engine()
        kind = "cpu" if isinstance(engine, cpu.Engine) else "plain"
        p = profiles.get("smoke", model=build(name), quantize=quantize, engine=kind)
        return *engine.load(p), p, engine

    return load


@pytest.fixture()
def tokenizer():
    return models.load_tokenizer(str(SEED))


@pytest.fixture(scope="module")
def seed():
    p, engine = profiles.get("smoke"), cpu.Engine()
    return *engine.load(p), p, engine


# ---------------------------------------------------------------- what works


def sample_and_train(model, tokenizer, p, engine) -> None:
    """One completion is drawn, and one step changes every weight of the adapter's B."""
    task = tasks.get("word_problems")
    question = task.load("validation").select([0])
    settings = {"n": 1, "max_new_tokens": 4, "progress": False, "engine": engine}
    [row] = sampling.sample(model, tokenizer, question, task, **settings)
    assert 1 <= row["n_tokens"] <= 4
    pair = {"prompt_ids": row["prompt_ids"], "chosen_ids": row["completion_ids"]}
    pairs = Dataset.from_list([pair | {"rejected_ids": [7, 8]}])
    settings = {"batch_size": 1, "warmup_steps": 0, "learning_rate": 1e-3, "disable_tqdm": True}
    [log] = training.train(model, tokenizer, pairs, trainer=engine.trainer(model), **settings)
    assert log["loss_dpo"] == pytest.approx(np.log(2), abs=1e-3)
    unchanged = [n for n, w in model.named_parameters() if "lora_B" in n and not w.any()]
    assert not unchanged


@pytest.mark.parametrize("name", WORKING)
def test_a_family_passes_the_trial_is_sampled_from_and_trained(load, name):
    loaded = load(name)
    trial.check(*loaded[:2], *loaded[2:])
    sample_and_train(*loaded)


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_a_family_in_4_bits(load, name):
    loaded = load(name, quantize=True)
    trial.check(*loaded)
    sample_and_train(*loaded)


@pytest.mark.parametrize("name", ["gpt-oss", "bloom"])
def test_a_family_with_the_plain_engine(load, name):
    loaded = load(name, PlainEngine())
    trial.check(*loaded)
    sample_and_train(*loaded)


@pytest.mark.parametrize("name", WORKING)
def test_the_engine_of_a_gpu_draws_the_completions_of_the_plain_decoder(load, name, capsys):
    """With a static cache also for sliding windows and ALiBi; the plain decoder for sinks."""
    engine, task = cuda_graph.Engine(), tasks.get("word_problems")
    model, tokenizer, *_ = load(name, engine)
    questions = task.load("validation").select(range(4))
    settings = {"n": 3, "max_new_tokens": 16, "seed": 1, "batch_size": 6, "progress": False}
    plain, ours = (
        sampling.sample(model, tokenizer, questions, task, engine=given, **settings)
        for given in (None, engine)
    )
    assert ours["completion_ids"][:] == plain["completion_ids"][:]
    assert np.allclose(ours["logprob"][:], plain["logprob"][:], atol=1e-4)
    lines = [line for line in "".join(capsys.readouterr()).splitlines() if "plain decoder" in line]
    assert len(lines) == (name == "gpt-oss") and all("'s_aux'" in line for line in lines)
    assert (engine.static is None) == (name == "gpt-oss")


def test_experts_are_computed_by_one_thread_at_a_time(load, monkeypatch):
    """PEFT exchanges the weights of fused experts while a forward pass runs."""
    model, tokenizer, p, engine = load("mixtral")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(cpu, "ThreadPoolExecutor", lambda *_: pytest.fail("several threads"))
    trial.check(model, tokenizer, p, engine)


@pytest.mark.parametrize("name", ["opt", "llama with dropout", "mixtral with noise", "gpt2"])
def test_a_model_computes_in_training_what_it_computes_as_the_reference(load, name):
    model = load(name, PlainEngine())[0]
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        evaluated, trained = model.eval()(ids).logits, model.train()(ids).logits
    assert torch.allclose(evaluated, trained, atol=1e-5)


# ---------------------------------------------------------------- attention


def attend(**arguments):
    """`grouped_attention` on random numbers."""
    query, key, value = torch.randn(3, 1, 2, 4, 8)
    return cpu.grouped_attention(torch.nn.Module(), query, key, value, None, 0.3, **arguments)


def test_attention_refuses_arguments_that_it_does_not_know():
    attend(position_ids=torch.arange(4), sliding_window=2, is_causal=True, output_attentions=False)
    for name in ("s_aux", "position_bias", "something_new"):
        with pytest.raises(TypeError, match=f"no argument '{name}'"):
            attend(**{name: torch.zeros(2)})


def test_attention_in_float16_does_not_overflow_with_large_keys():
    """The product of query and key may exceed the range of float16; the scaled one does not."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 4, 8).mul(
        torch.tensor([90.0, 400, 1])[:, None, None, None, None]
    )
    arguments = (torch.nn.Module(), query, key, value, None, 0.1)
    assert (query @ key.transpose(2, 3)).abs().max() > torch.finfo(torch.float16).max
    expected, _ = cpu.grouped_attention(*arguments)
    half, _ = cpu.grouped_attention(
        arguments[0], *(x.half() for x in (query, key, value)), None, 0.1
    )
    torch.testing.assert_close(half.float(), expected, atol=0.02, rtol=0)


def test_attention_sinks_are_left_to_the_library_with_a_line_that_says_so(load, capsys):
    model, *_ = load("gpt-oss")
    text = capsys.readouterr()
    [line] = [line for line in (text.out + text.err).splitlines() if "s_aux" in line]
    assert "gpt_oss" in line and "'eager'" in line
    assert model.config._attn_implementation == "eager"


def test_an_attention_that_ignores_the_sinks_is_found_by_the_trial(load):
    def without_sinks(*arguments, s_aux=None, **options):
        return cpu.grouped_attention(*arguments, **options)

    AttentionInterface.register("grouped", without_sinks)
    try:
        loaded = load("gpt-oss")
        assert loaded[0].config._attn_implementation == "grouped"
        with pytest.raises(UserError, match="type gpt_oss cannot be sampled.*padded.*--engine"):
            trial.check(*loaded)
    finally:
        AttentionInterface.register("grouped", cpu.grouped_attention)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["rwkv", "jamba"])
def test_a_model_without_a_cache_of_attention_is_refused_by_name(load, name):
    with pytest.raises(UserError, match=f"type {name} cannot be sampled.*recurrent state"):
        trial.check(*load(name))


def test_mamba_is_refused_while_it_is_loaded(build):
    p = profiles.get("smoke", model=build("mamba"), quantize=False)
    with pytest.raises(UserError, match="cannot have a LoRA adapter.*Mamba.*another --model"):
        run.load_model(p)


def test_a_weight_of_the_adapter_without_a_gradient_is_named(load):
    model, tokenizer, p, engine = load("llama")
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    layer._disable_adapters = True  # as in a model that goes around this layer
    with pytest.raises(
        UserError, match="2 weights of the adapter get no gradient, such as .*up_proj"
    ):
        trial.check(model, tokenizer, p, engine)


@pytest.mark.parametrize("role", ["pad", "eos"])
def test_a_token_outside_the_vocabulary_is_refused(load, role):
    model, tokenizer, p, engine = load("llama")
    tokenizer.add_special_tokens({f"{role}_token": "<|new|>"})
    name = {"pad": "pad", "eos": "end"}[role]
    with pytest.raises(UserError, match=rf"{name} token '<\|new\|>'.*id 1097.* 1097 tokens"):
        trial.check(model, tokenizer, p, engine)


@pytest.mark.parametrize("command", ["run", "evaluate"])
def test_a_refused_model_is_not_sampled_from(build, tmp_path, monkeypatch, command):
    out = tmp_path / "run"
    settings = {"iterations": 0, "n_eval_questions": 1, "eval_samples_ends": 1, "max_new_tokens": 4}
    p = profiles.get("smoke", model=build("llama"), quantize=False, **settings)
    if command == "evaluate":
        run.run(p, out, progress=False)
    template = "{{ '<|user|>' }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    real = models.load

    def load(*arguments, **options):
        model, tokenizer = real(*arguments, **options)
        tokenizer.chat_template = template
        return model, tokenizer

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(sampling, "sample", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(UserError, match="leaves out the question"):
        if command == "run":
            run.run(p, out, progress=False)
        else:
            evaluate_again.evaluate_run(out, k=1)
    assert command == "evaluate" or not list(out.glob("iteration_*"))


# ---------------------------------------------------------------- chat templates


PARTS = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_template_of_parts_gets_the_question_as_a_part(seed, tokenizer):
    tokenizer.chat_template = PARTS
    assert models.render_prompt(tokenizer, "5 < 6?\n") == "<|user|>5 < 6?\n<|end|><|assistant|>"
    assert models.turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>")
    trial.check_tokenizer(seed[0], tokenizer, "mine")


def test_a_template_of_plain_texts_gets_a_plain_text(seed, tokenizer):
    tokenizer.chat_template = PLAIN
    assert models.render_prompt(tokenizer, " 5 < 6?\n") == "<|user|>5 < 6?<|end|><|assistant|>"
    trial.check_tokenizer(seed[0], tokenizer, "mine")


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{% for message in messages %}{{ message['content'] }}", "Unexpected end of template"),
        ("{{ raise_exception('a system turn is missing') }}", "a system turn is missing"),
        ("{{ messages[0]['content'] + 5 }}", "can only concatenate str"),
        ({"tool_use": PLAIN, "rag": PLAIN}, "no default"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_one_error(seed, tokenizer, template, reason):
    tokenizer.chat_template = template
    expected = f"chat template of mine cannot be rendered: .*{reason}.*tokenizer's files"
    with pytest.raises(UserError, match=expected):
        trial.check_tokenizer(seed[0], tokenizer, "mine")


def test_a_template_without_the_question(seed, tokenizer):
    tokenizer.chat_template = "<|user|>Hello<|end|><|assistant|>"
    with pytest.raises(UserError, match="template of mine leaves out the question"):
        trial.check_tokenizer(seed[0], tokenizer, "mine")


def test_named_templates_with_a_default_are_rendered(seed, tokenizer):
    tokenizer.chat_template = {"default": PLAIN, "tool_use": "none"}
    assert "5 < 6?" in models.render_prompt(tokenizer, "5 < 6?")
    trial.check_tokenizer(seed[0], tokenizer, "mine")


@pytest.mark.parametrize(
    "call, date",
    [
        ('strftime_now("%d %B %Y")', "26 July 2024"),
        ("strftime_now( '%Y-%m-%d' )", "2024-07-26"),
        ("(date_string or strftime_now('%d %b %Y'))", "26 Jul 2024"),
    ],
)
def test_the_date_that_a_template_asks_for_is_always_the_same(seed, tokenizer, call, date):
    tokenizer.chat_template = (
        f"{{% if strftime_now is defined %}}{{% set now = {call} %}}{{% endif %}}"
        f"{{{{ 'Today is ' ~ now }}}}{PLAIN}"
    )
    prompt = models.render_prompt(tokenizer, "5 < 6?")
    assert prompt.startswith(f"Today is {date}<|user|>5 < 6?")
    trial.check_tokenizer(seed[0], tokenizer, "mine")


def test_a_date_whose_format_is_computed_is_refused(seed, tokenizer):
    tokenizer.chat_template = "{% set how = '%d' %}{{ strftime_now(how) }}" + PLAIN
    with pytest.raises(UserError, match="prints the date with a computed format"):
        trial.check_tokenizer(seed[0], tokenizer, "mine")


# ---------------------------------------------------------------- the trial itself


def test_the_trial_leaves_the_model_as_it_was(seed):
    model, tokenizer, p, engine = seed
    weights = {name: w.detach().clone() for name, w in model.named_parameters()}
    base = model.get_base_model()

    def state():
        attributes = model.training, base.__dict__.get("forward"), list(model.peft_config)
        return *attributes, base.config._attn_implementation

    before = state()
    trial.check(model, tokenizer, p, engine)
    assert state() == before
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weights[name]) and weight.grad is None
        assert weight.requires_grad == ("lora_" in name)


def test_the_trial_takes_less_than_a_second_for_the_seed_model(seed):
    seconds = []
    for _ in range(2):
        started = time.process_time()
        trial.check(*seed)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 1


@pytest.mark.parametrize("name", ["llama", "mistral with sliding windows"])
def test_a_model_that_only_scores_because_a_server_completes_is_tried(load, monkeypatch, name):
    model, tokenizer, p, engine = load(name, PlainEngine())
    p = dataclasses.replace(p, engine="vllm")
    monkeypatch.setattr(sampling, "sample", lambda *_, **__: pytest.fail("sampled"))
    trial.check(model, tokenizer, p, engine)
    real = logprobs.pad_batch

    def shifted(prompts, responses, pad_id, device="cpu"):
        """Positions that begin with the padding."""
        batch = real(prompts, responses, pad_id, device)
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None] ** 2
        return batch if len(prompts) > 1 else real(prompts, responses, pad_id, device)

    monkeypatch.setattr(logprobs, "pad_batch", shifted)
    with pytest.raises(UserError, match="cannot be sampled from.*padded batch"):
        trial.check(model, tokenizer, p, engine)


def test_logits_that_are_not_finite_are_named_as_such(load):
    model, tokenizer, p, engine = load("llama")
    model.get_output_embeddings().weight.data[:] = float("nan")
    with pytest.raises(UserError, match="logits are not finite"):
        trial.check(model, tokenizer, p, engine)


def test_an_iteration_without_training_needs_no_gradient(load):
    """M_0 of any model may be evaluated."""
    model, tokenizer, p, engine = load("llama")
    model.get_base_model().model.layers[1].mlp.up_proj._disable_adapters = True
    trial.check(model, tokenizer, profiles.get("smoke", model=p.model, iterations=0), engine)


@pytest.mark.parametrize("mask", [create_causal_mask, create_sliding_window_causal_mask])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_of_grouped_attention_is_that_of_the_library(mask, dtype):
    """With padding on the left."""
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("mistral", **shape, sliding_window=3)
    padding = torch.ones(3, 9, dtype=torch.bool)
    padding[1, :4] = False
    given = {"inputs_embeds": torch.zeros(3, 9, 32, dtype=dtype), "attention_mask": padding}
    made = []
    for config._attn_implementation in ("eager", "grouped"):
        made.append(mask(config=config, past_key_values=None, **given))
    assert made[1].dtype == dtype and torch.equal(*made)
    assert AttentionMaskInterface()["grouped"] is cpu.grouped_mask  # which copies nothing
