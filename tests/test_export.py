"""Models and adapters as files: what is loaded, told apart and merged."""

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from irpo_utils import UserError, models, profiles
from irpo_utils.ops import export, run
from merge import merge


@pytest.fixture()
def folder(tmp_path):
    """A copy of the seed model."""
    return shutil.copytree(models.FOLDERS["seed"], tmp_path / "model")


def load(folder, **changes):
    """As a run loads it."""
    return run.load_model(profiles.get("smoke", model=str(folder), **changes))


def test_a_folder_without_tokenizer_says_how_to_write_one(folder):
    for file in folder.glob("tokenizer*.json"):
        file.unlink()
    with pytest.raises(UserError, match="could not be loaded.*tokenizer.*save_pretrained"):
        load(folder)


def test_truncated_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(UserError, match="could not be loaded"):
        load(folder)


CHANGES = {
    "prefix": lambda weights: {f"_orig_mod.{name}": w for name, w in weights.items()},
    "no layer 1": lambda weights: {n: w for n, w in weights.items() if "layers.1.mlp" not in n},
    "shape": lambda weights: {
        n: w[:-8].contiguous() if "embed" in n else w for n, w in weights.items()
    },
}


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_do_not_belong_to_the_model(folder, quantize, change):
    """The library would fill them with random numbers."""
    weights = CHANGES[change](load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="could not be loaded|lacks .* of its weights"):
        load(folder, quantize=quantize)


def test_pickled_weights_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        load(folder)


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "No CUDA GPUs are available"])
def test_what_a_gpu_reports_is_not_said_of_the_model(folder, monkeypatch, text):
    def fail(*arguments, **options):
        raise RuntimeError(text)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(RuntimeError, match=text[:12]):
        load(folder)


def test_a_hub_model_is_known_by_its_commit_also_if_a_copy_is_in_the_cache(
    folder, tmp_path, monkeypatch
):
    """A copy is loaded by its short name only, so its files say nothing about the hub's model."""
    monkeypatch.setattr(models, "CACHE", tmp_path)
    folder.rename(tmp_path / "smollm2-135m")
    local, _ = models.load("smollm2-135m")
    assert len(export.fingerprint(local)) == 64
    config = local.get_base_model().config
    config._name_or_path, config._commit_hash = models.HUB_NAMES["smollm2-135m"], "ab" * 20
    assert export.fingerprint(local) == "ab" * 20


def test_a_fingerprint_depends_on_the_files_and_not_on_the_adapter(folder):
    model, _ = load(folder)
    first = export.fingerprint(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter.data)
    assert export.fingerprint(model) == first and export.commit_of(first) is None
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 0xFF
    weights.write_bytes(content)
    assert export.fingerprint(model) != first
    assert export.commit_of("a" * 40) == "a" * 40 and export.commit_of(None) is None


def test_a_merged_model_is_the_unquantised_base_plus_the_adapter(tmp_path):
    """W + (alpha / r) B A written out by hand, read by plain transformers and by this package."""
    model, _ = models.load("seed", quantize=False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.02, generator=generator)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    folder = tmp_path / "merged"
    merge("seed", tmp_path / "adapter", folder)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    by_hand = layer.base_layer.weight + 2.0 * change
    assert torch.allclose(plain.model.layers[0].mlp.up_proj.weight, by_hand, atol=1e-6)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template
    again, _ = models.load(str(folder), quantize=False)
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-4)
    for taken in (folder, folder / "config.json"):
        with pytest.raises(UserError, match="is a file or not empty.*new folder"):
            merge("seed", tmp_path / "adapter", taken)
    with pytest.raises(UserError, match="nothing has no adapter_config.json"):
        merge("seed", tmp_path / "nothing", tmp_path / "new")
    with pytest.raises(UserError, match="not/here could not be loaded"):
        merge("not/here", tmp_path / "adapter", tmp_path / "new")
    with pytest.raises(UserError, match="was trained on seed, not on seed-misconceptions"):
        merge("seed-misconceptions", tmp_path / "adapter", tmp_path / "new")


def test_the_packaged_smollm2_ends_its_turns_with_every_version_of_the_library():
    """transformers 5.17 reads <|im_start|> as the end of a turn, and no pad token, from the file."""
    if not (models.CACHE / "smollm2-135m" / "config.json").is_file():
        pytest.skip("SmolLM2-135M is not on this computer (python scripts/smollm2.py)")
    tokenizer = models.load_tokenizer(models.find("smollm2-135m"))
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.decode(tokenizer("3 * 4 = 12\n").input_ids) == "3 * 4 = 12\n"
