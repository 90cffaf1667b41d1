"""Loading M_t, the checks of its tokenizer, swapping adapters on one base, and scoring."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from irpo_utils import UserError, logprobs, models, pairs

SEED = models.FOLDERS["seed"]


@pytest.fixture()
def folder(tmp_path):
    """A copy of the seed model that a test may damage."""
    return shutil.copytree(SEED, tmp_path / "model")


def edit(path, **changes):
    """Change a JSON file; None removes a key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# ---------------------------------------------------------------- the seed model


def test_seed_model_is_a_llama_of_one_to_three_million_parameters_in_at_most_8_mb():
    model = AutoModelForCausalLM.from_pretrained(SEED)
    assert model.config.model_type == "llama" and 0.9e6 < model.num_parameters() < 3e6
    assert sum(file.stat().st_size for file in SEED.rglob("*")) <= 8e6
    assert list(SEED.glob("*.safetensors")) and not list(SEED.glob("*.bin"))


def test_tokenizer_has_single_digits_and_reads_any_text(tokenizer):
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    for text in ("naïve 東京 🙂", "\x00\x1b[0m", "<|end|", "tab\there"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


# ---------------------------------------------------------------- base and adapter


def test_base_is_nf4_with_double_quantisation_and_only_the_adapter_is_trainable(model):
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in trainable} == {"lora_A", "lora_B"}
    assert {p.dtype for p in trainable.values()} == {torch.float32}


def test_eval_mode_computes_what_train_mode_computes(model):
    """The bf16 kernel of bitsandbytes for CPUs in eval mode would differ in the third digit."""
    ids = torch.randint(5, 1000, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        evaluated, trained = model.eval()(ids).logits, model.train()(ids).logits
    model.eval()
    assert torch.allclose(evaluated, trained, atol=1e-6)


def test_zero_adapter_is_the_base(model):
    ids = torch.arange(5, 40)[None]
    with torch.no_grad(), model.disable_adapter():
        base = model(ids).logits
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base)


def test_set_adapter_turns_one_model_into_another_and_back(model, tmp_path):
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        zero = model(ids).logits
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        trained = model(ids).logits
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        models.set_adapter(model, None)
        assert torch.equal(model(ids).logits, zero)
        models.set_adapter(model, tmp_path)
        assert torch.equal(model(ids).logits, trained)
        loaded, _ = models.load("seed", adapter=tmp_path)
        assert torch.allclose(loaded(ids).logits, trained, atol=1e-6)
    assert not torch.allclose(zero, trained, atol=1e-3)


@pytest.mark.parametrize("setting", [{"lora_r": 4}, {"lora_alpha": 64}])
def test_an_adapter_of_another_rank_or_scale_is_refused(model, tmp_path, setting):
    other, _ = models.load("seed", **setting)
    other.save_pretrained(tmp_path, save_embedding_layers=False)
    [(name, value)] = setting.items()
    with pytest.raises(UserError, match=f"needs a model loaded with .*{name}={value}"):
        models.set_adapter(model, tmp_path)


def test_an_adapter_of_other_layers_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    file = tmp_path / "adapter_model.safetensors"
    first, *others = load_file(file).items()
    save_file(dict(others), file)
    with pytest.raises(UserError, match="other layers or shapes"):
        models.set_adapter(model, tmp_path)


def test_a_folder_without_an_adapter_and_an_unknown_dtype_are_named(model, tmp_path):
    with pytest.raises(UserError, match=f"no adapter in {tmp_path}"):
        models.set_adapter(model, tmp_path)
    with pytest.raises(UserError, match="'bf16': it must be float32, bfloat16 or float16"):
        models.load("seed", dtype="bf16")


def test_adapter_config_names_the_hub_id_of_the_base(folder, tmp_path, monkeypatch):
    """Other programs, such as vLLM, load the base by this name."""
    monkeypatch.setattr(models, "CACHE", tmp_path)
    folder.rename(tmp_path / "qwen2.5-0.5b")
    model, _ = models.load("qwen2.5-0.5b")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Qwen/Qwen2.5-0.5B-Instruct"


def test_an_adapter_of_the_seed_model_names_no_folder_of_this_computer(model, tmp_path):
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "seed"


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2"])
def test_bfloat16_on_a_cpu_without_its_instructions_becomes_float32_with_a_warning(
    monkeypatch, caplog, capability
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with caplog.at_level(logging.WARNING):
        model, _ = models.load("seed", quantize=False, device="cpu", dtype="bfloat16")
    assert model.dtype == torch.float32
    assert "bf16" in caplog.text and "float32 is used" in caplog.text


def test_dtypes_that_a_cpu_can_compute_in_give_no_warning(monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with caplog.at_level(logging.WARNING):
        assert models.default_dtype("cpu", "bfloat16") == torch.bfloat16
        assert models.default_dtype("cpu", "float16") == torch.float16
        assert models.default_dtype("cpu") == torch.float32
    assert not caplog.text


# ---------------------------------------------------------------- the end of a turn


GEMMA = (
    "{% for message in messages %}<start_of_turn>{{ message['role'] }}\n{{ message['content'] }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def test_gold_solutions_end_in_the_token_that_the_chat_template_writes(folder):
    """In Gemma's template it is not the EOS token, and the model would never write EOS."""
    tokenizer = models.load_tokenizer(str(folder))
    tokens = ["<start_of_turn>", "<end_of_turn>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = GEMMA
    tokenizer.save_pretrained(folder)
    tokenizer = models.load_tokenizer(str(folder))
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert models.turn_end(tokenizer) == end != tokenizer.eos_token_id
    rows = [{"id": "a", "question": "?", "solution": "1+1=2\nFinal answer: 2"}]
    [gold] = pairs.gold_completions(rows, tokenizer)
    assert gold["completion_ids"].count(end) == 1 and gold["completion_ids"][-1] == end
    assert tokenizer.decode(gold["completion_ids"][:-1]) == rows[0]["solution"]
    [empty] = pairs.empty_completions(rows, [models.render_prompt(tokenizer, "?")], tokenizer)
    assert empty["completion_ids"] == [end]


def test_turns_of_the_seed_model_end_in_its_eos_token(tokenizer):
    assert models.turn_end(tokenizer) == tokenizer.eos_token_id


def test_end_tokens_are_those_of_tokenizer_and_generation_config(folder):
    edit(folder / "generation_config.json", eos_token_id=[9, 11])
    model, tokenizer = models.load(str(folder))
    assert models.end_tokens(model, tokenizer) == sorted({9, 11, tokenizer.eos_token_id})


# ---------------------------------------------------------------- what is refused


def test_a_tokenizer_without_pad_token_names_the_option(folder):
    edit(folder / "tokenizer_config.json", pad_token=None)
    with pytest.raises(UserError, match="no pad token.*--pad-token"):
        models.load(str(folder))
    assert models.load_tokenizer(str(folder), "<|pad|>").pad_token_id == 0
    with pytest.raises(UserError, match="not in the vocabulary"):
        models.load(str(folder), pad_token="<nonsense>")


def test_a_tokenizer_without_chat_template(folder):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        models.load(str(folder))


def test_a_tokenizer_without_eos(folder):
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match="no eos token"):
        models.load(str(folder))


def test_a_folder_that_is_not_a_model(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        models.load(str(tmp_path))


def test_an_unknown_short_name():
    with pytest.raises(UserError, match="no model 'qwen9'.*qwen2.5-0.5b"):
        models.load("qwen9")


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("part", ["layers.1.mlp", "norm"])
def test_weights_that_are_not_all_there(folder, quantize, part):
    """The library would fill them with random numbers."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if part not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    # With NF4 the library itself fails for some layers; it must not go unnoticed.
    with pytest.raises(Exception, match=rf"lacks \d+ of its weights.*{part}|quant|meta"):
        models.load(str(folder), quantize=quantize)


def test_pickled_weights_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(Exception, match="safetensors"):
        models.load(str(folder))


def test_code_that_comes_with_a_model_does_not_run(folder):
    edit(
        folder / "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    )
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(Exception):  # noqa: B017 - SystemExit is not an Exception
        models.load(str(folder))


# ---------------------------------------------------------------- padding and scores


def test_pad_batch_aligns_all_responses():
    batch = logprobs.pad_batch([[1, 2, 3], [4]], [[5], [6, 7]], pad_id=0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 5, 0], [0, 0, 4, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert batch["position_ids"].tolist()[1] == [0, 0, 0, 1, 2]
    assert batch["response_mask"].tolist() == [[1, 0], [1, 1]]


def test_scores_do_not_depend_on_padding(model, tokenizer):
    prompts, responses = [[7] * n for n in (3, 20, 41)], [[9, 8] * n for n in (10, 1, 4)]
    together = logprobs.score(model, tokenizer, prompts, responses)
    single = logprobs.score(model, tokenizer, prompts, responses, batch_size=1)
    for prompt, response, a, b in zip(prompts, responses, together, single, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0].double()
        logps = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
        expected = logps.gather(1, torch.tensor(response)[:, None]).sum().item()
        assert [a, b] == pytest.approx([expected] * 2, abs=1e-4)
    assert logprobs.score(model, tokenizer, [], []) == []


def test_scores_survive_running_out_of_memory(model, tokenizer, monkeypatch):
    prompts, responses = [[5, 6, 7]] * 9, [[8 + i] * (1 + i) for i in range(9)]
    expected = logprobs.score(model, tokenizer, prompts, responses)
    real = logprobs.response_logps

    def response_logps(model, batch):
        if len(batch["input_ids"]) > 7:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(model, batch)

    monkeypatch.setattr(logprobs, "response_logps", response_logps)
    found = logprobs.score(model, tokenizer, prompts, responses)
    assert found == pytest.approx(expected, abs=1e-4)


def test_the_date_of_a_prompt_is_fixed(tokenizer, monkeypatch):
    """Templates such as that of Llama 3.2 write today's date, so a run would differ tomorrow."""
    template = "{{ date_string or 'today' }} {{ messages[0]['content'] }}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert models.render_prompt(tokenizer, "5 < 6") == "26 Jul 2024 5 < 6"
