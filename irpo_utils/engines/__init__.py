"""How a run computes: `plain` is here, and each module is a faster way with the same results."""

from irpo_utils import models, sampling


class Engine:
    """The plain way to load, sample and train; the modules of this folder have subclasses."""

    def load(self, p, revision: str | None = None, **options):
        """The model and the tokenizer of a profile: M_0. options: others of `models.load`."""
        names = ("quantize", "lora_r", "lora_alpha", "pad_token", "dtype")
        settings = {name: getattr(p, name) for name in names}
        return models.load(p.model, revision=revision, **settings | options)

    def use(self, model, adapter) -> None:
        """Turn the model into the M_t of the folder `adapter` (None: M_0)."""
        models.set_adapter(model, adapter)

    def decode(self, model, request: sampling.Request, batch_size: int):
        """Yield (prompt, sample, tokens, finished, logprob) of every completion, in any order."""
        return sampling.decode(model, request, batch_size)

    def trainer(self, model):
        """The class that trains this model, or None for `training.IterativeRPOTrainer`."""
        return None
