"""The engine of a GPU on a CPU, where its steps are called directly or recorded by a stand-in."""

import types

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoConfig, AutoModelForCausalLM

from irpo_utils import UserError, models, profiles, sampling, tasks
from irpo_utils.engines import cuda_graph

N_QUESTIONS = 10
TOO_LARGE = "CUDA out of memory. Tried to allocate 2.00 GiB."
NO_GRAPH = "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the documentation."
NO_CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.fixture(scope="module")
def task():
    return tasks.get("word_problems")


@pytest.fixture(scope="module")
def questions(task):
    return task.load("validation").select(range(N_QUESTIONS))


@pytest.fixture(scope="module")
def loaded():
    """The seed model with an adapter that is not zero."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, tokenizer = models.load("seed")
    randomise(model, 1)
    yield model, tokenizer
    torch.set_num_threads(threads)


@pytest.fixture()
def small_buckets(monkeypatch):
    """Buckets so small that a few short completions need many."""
    for name, value in {"CHUNK": 8, "CHECK": 4, "FEWEST_ROWS": 2}.items():
        monkeypatch.setattr(cuda_graph, name, value)


def randomise(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.02 * torch.randn(weight.shape, generator=generator)


def draw(loaded, questions, task, engine=None, **settings):
    defaults = {"max_new_tokens": 30, "progress": False, "n": 4, "batch_size": 24}
    return sampling.sample(*loaded, questions, task, engine=engine, **defaults | settings)


def assert_equal(ours, plain):
    assert ours["completion_ids"][:] == plain["completion_ids"][:]
    assert ours["finished"][:] == plain["finished"][:]
    assert np.allclose(ours["logprob"][:], plain["logprob"][:], atol=1e-4)


# ---------------------------------------------------------------- completions


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n": 1, "temperature": 0.0},
        {"n": 3, "temperature": 0.7, "top_p": 0.9, "batch_size": 7},
        {
            "n": 8,
            "temperature": 1.5,
            "batch_size": 1,
            "max_new_tokens": 20,
        },  # a batch is at least one prompt
        {"n": 5, "batch_size": 500, "max_new_tokens": 17},  # many are cut off
        {"n": 2, "max_new_tokens": 1},
    ],
    ids=str,
)
def test_completions_are_those_of_the_plain_decoder(loaded, questions, task, settings):
    few = questions.select(range(6))
    plain = draw(loaded, few, task, **settings)
    assert len({len(ids) for ids in plain["prompt_ids"]}) > 3
    assert_equal(draw(loaded, few, task, cuda_graph.Engine(), **settings), plain)


def test_rows_leave_and_columns_are_added_bucket_by_bucket(
    loaded, questions, task, small_buckets, monkeypatch
):
    rows, compact = [], cuda_graph.Static.compact

    def counted(self, *arguments):
        rows.append(compact(self, *arguments))
        return rows[-1]

    monkeypatch.setattr(cuda_graph.Static, "compact", counted)
    engine = cuda_graph.Engine()
    settings = {"batch_size": 40, "max_new_tokens": 50}
    ours = draw(loaded, questions, task, engine, **settings)
    assert_equal(ours, draw(loaded, questions, task, **settings))
    buckets = {bucket[:2] for bucket in engine.static.graphs}
    assert {rows for rows, _ in buckets} >= {40, 20, 10}
    assert len({columns for _, columns in buckets}) >= 3
    assert rows == sorted(rows, reverse=True) and rows[-1] == 0
    longest = max(ours["n_tokens"])
    assert longest < 50 and 4 * len(rows) <= longest + 4  # it stops when all have ended


def test_a_smaller_batch_and_another_adapter_use_the_same_tensors(
    loaded, questions, task, small_buckets, tmp_path
):
    """The last batch has rows without a completion, and columns that an earlier one has left."""
    engine, (model, _) = cuda_graph.Engine(), loaded
    model.save_pretrained(tmp_path)
    draw(loaded, questions, task, engine, n=6, batch_size=60)
    static = engine.static
    for adapter in (None, tmp_path):
        engine.use(model, adapter)
        few = questions.select(range(3))
        ours = draw(loaded, few, task, engine, seed=2)
        assert_equal(ours, draw(loaded, few, task, seed=2))
        assert engine.static is static


def test_a_completion_does_not_depend_on_its_batch(loaded, questions, task):
    engine = cuda_graph.Engine()
    whole = draw(loaded, questions, task, engine, seed=3)
    part = draw(loaded, questions.select([7, 2]), task, engine, seed=3)
    assert part["completion_ids"][:4] == whole["completion_ids"][28:32]
    assert part["completion_ids"][4:] == whole["completion_ids"][8:12]


def test_longer_texts_and_another_model_get_new_tensors(loaded, questions, task):
    engine, seen = cuda_graph.Engine(), []
    other = models.load("seed")
    for parts, new in ((loaded, 20), (loaded, 100), (loaded, 20), (other, 20)):
        ours = draw(parts, questions.select([0]), task, engine, max_new_tokens=new)
        assert_equal(ours, draw(parts, questions.select([0]), task, max_new_tokens=new))
        seen.append(engine.static)
    assert seen[0] is not seen[1] and seen[1] is seen[2] and seen[2] is not seen[3]


def test_long_prompts_are_computed_in_parts(loaded, questions, task, monkeypatch):
    plain = draw(loaded, questions, task)
    calls, prefill = [], cuda_graph.prefill
    monkeypatch.setattr(
        cuda_graph, "prefill", lambda *given: calls.append(len(given[2])) or prefill(*given)
    )
    monkeypatch.setattr(cuda_graph, "PREFILL", 200)
    assert_equal(draw(loaded, questions, task, cuda_graph.Engine(), batch_size=40), plain)
    assert max(calls) < N_QUESTIONS / 2 and sum(calls) == N_QUESTIONS + 1  # one for its shapes


# ---------------------------------------------------------------- graphs


class Tape(TorchDispatchMode):
    """Stands in for a CUDA graph: the operations of PyTorch on the tensors that they were given."""

    def __init__(self):
        super().__init__()
        self.calls, self.bucket = [], None

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        new = {}  # id of a result of the recording -> the result now

        def today(value):
            return new.get(id(value), value)

        for operation, *given, out in self.calls:
            args, kwargs = tree_map(today, given)
            results = tree_leaves(operation(*args, **kwargs))
            new.update({id(old): now for old, now in zip(tree_leaves(out), results)})


class Recorder:
    """Lets `record` write tapes; a recording changes no tensor, and may fail once with `error`."""

    def __init__(self, monkeypatch):
        self.log, self.error, self.static, self.ended = [], None, None, []
        self.ends_itself = False  # whether the recording came so far that it ended the pool's use
        recorder, init, call = self, cuda_graph.Static.__init__, cuda_graph.Static.call

        class Graph(Tape):
            def replay(self):
                recorder.log.append(("replayed", *self.bucket))
                super().replay()

        class Recording:
            def __init__(self, graph, pool):
                assert pool == "pool"
                self.graph = graph

            def __enter__(self):
                static, recorder.graph = recorder.static, self.graph
                tensors = [x for x in vars(static).values() if isinstance(x, torch.Tensor)]
                self.before = [(x, x.clone()) for x in [*tensors, *static.cache]]
                self.graph.__enter__()

            def __exit__(self, *error):
                self.graph.__exit__(*error)
                recorder.graph = None
                for tensor, value in self.before:
                    tensor.copy_(value)
                if error[0]:  # as CUDA does
                    raise RuntimeError("operation failed due to a previous error during capture")

        def step(static, *bucket):
            if recorder.graph is None:
                recorder.log.append(("called", *bucket))
            elif recorder.error:
                error, recorder.error = recorder.error, None
                raise error
            else:
                recorder.log.append(("recorded", *bucket))
                recorder.graph.bucket = bucket
            call(static, *bucket)

        def end(device, pool):
            self.ended.append(f"allocates no more to the {pool}")
            if self.ends_itself:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

        def release(device, pool):
            self.ended.append(f"released the {pool}")
            raise RuntimeError("use_count > 0")  # by the graph, if the recording came that far

        def made(static, *arguments):
            init(static, *arguments)
            static.pool, recorder.static = "pool", static

        self.graph = None
        monkeypatch.setattr(cuda_graph.Static, "__init__", made)
        monkeypatch.setattr(cuda_graph.Static, "call", step)
        for name, value in {"CUDAGraph": Graph, "graph": Recording}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        for name, function in {"endAllocateToPool": end, "releasePool": release}.items():
            monkeypatch.setattr(torch._C, f"_cuda_{name}", function, raising=False)


def test_a_bucket_is_called_once_recorded_once_and_then_replayed(
    loaded, questions, task, small_buckets, monkeypatch
):
    plain, recorder = draw(loaded, questions, task), Recorder(monkeypatch)
    engine = cuda_graph.Engine()
    assert_equal(draw(loaded, questions, task, engine), plain)
    for bucket in engine.static.graphs:
        kinds = [kind for kind, *found in recorder.log if tuple(found) == bucket]
        expected = ["called", "recorded"][: len(kinds)]
        assert kinds == expected + ["replayed"] * (len(kinds) - 2)
    n_before = len(recorder.log)
    assert_equal(draw(loaded, questions, task, engine), plain)
    again = [kind for kind, *_ in recorder.log[n_before:]]
    assert again.count("replayed") > 0.8 * len(again)


def test_a_graph_serves_other_questions_seeds_and_adapters(
    loaded, questions, task, monkeypatch, tmp_path
):
    """Nothing of the batch in which it was recorded is in it, but the addresses of tensors."""
    settings = {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": 20}
    recorder, engine, model = Recorder(monkeypatch), cuda_graph.Engine(), loaded[0]
    model.save_pretrained(tmp_path)
    draw(loaded, questions, task, engine, **settings)
    n_before = len(recorder.log)
    for adapter in (None, tmp_path):
        engine.use(model, adapter)
        others = questions.select([9, 4, 2, 7, 1, 0])
        ours = draw(loaded, others, task, engine, seed=8, **settings)
        assert_equal(ours, draw(loaded, others, task, seed=8, **settings))
    kinds = [kind for kind, *_ in recorder.log[n_before:]]
    assert kinds.count("replayed") > 0.8 * len(kinds)


class OnTheDevice(TorchDispatchMode):
    """Refuses copies from the host, for which a stream that is captured cannot wait."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if "copy" in str(operation) and any(x.device.type == "meta" for x in results):
            assert all(x.device.type == "meta" for x in tensors), operation
        return out


@pytest.mark.parametrize("how", [(1.0, 1.0), (0.0, 1.0), (0.8, 0.9)])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_a_step_neither_asks_for_the_value_of_a_tensor_nor_copies_one_from_the_host(
    kind, how, monkeypatch
):
    """On the device "meta" tensors have no values: what would wait for a GPU is an error.

    A graph cannot record `torch.tensor(number, device=...)` either, which copies from the host.
    """
    make = torch.tensor

    def on_the_host(*args, device=None, **options):
        assert device is None, "a copy from the host"
        return make(*args, **options)

    shape = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 100, "head_dim": 8}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = AutoConfig.for_model(kind, **shape)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, lora).eval()
    request = sampling.Request([[5, 6, 7], [5, 6]], ["a", "b"], 4, *how, 40, 0, [3], 0)
    with torch.inference_mode(), cuda_graph.cpu.grouped(base):
        static = cuda_graph.Static(model, request, 8)
        with OnTheDevice(), monkeypatch.context() as patch:
            patch.setattr(torch, "tensor", on_the_host)
            static.call(8, 128, *how)
    with pytest.raises(RuntimeError, match="meta"), torch.inference_mode():
        static.compact(8, 1, [3])  # which does ask


NOT_PERMITTED = RuntimeError("operation not permitted when stream is capturing\nsecond line")


@pytest.mark.parametrize(
    "where, error, message",
    [
        ("record", NOT_PERMITTED, "(RuntimeError: operation not permitted when stream is"),
        ("late record", NOT_PERMITTED, "(RuntimeError: operation not permitted when stream is"),
        ("call", RuntimeError("CUDA error: invalid argument"), "invalid argument).\n"),
        ("call", KeyError("layer_types"), "(KeyError: 'layer_types')"),
        ("begin", TypeError("the model has a cache without keys"), "a cache without keys).\n"),
        ("__init__", AttributeError("no attribute 'layers'"), "no attribute 'layers'"),
    ],
)
def test_after_any_error_but_full_memory_the_plain_decoder_takes_over(
    loaded, questions, task, where, error, message, monkeypatch, capsys
):
    def broken(*arguments):
        raise error

    few, settings = questions.select(range(4)), {"max_new_tokens": 20, "batch_size": 8}
    plain = draw(loaded, few, task, **settings)
    recorder = Recorder(monkeypatch) if "record" in where else None
    if recorder:
        recorder.error, recorder.ends_itself = error, where == "late record"
    else:
        monkeypatch.setattr(cuda_graph.Static, where, broken)
    engine = cuda_graph.Engine()
    for _ in range(2):
        assert_equal(draw(loaded, few, task, engine, **settings), plain)
        assert engine.static is None
    text = "".join(capsys.readouterr())
    assert text.count("The plain decoder is used") == 1 and message in text
    assert "second line" not in text
    if recorder:  # a second release would raise another error
        ended = ["allocates no more to the pool", "released the pool"]
        assert recorder.ended == ended[: 1 if recorder.ends_itself else 2]


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "where, error",
    [
        ("allocation", torch.OutOfMemoryError(TOO_LARGE)),
        ("step", RuntimeError(NO_CUBLAS)),
        ("recording", torch.OutOfMemoryError(TOO_LARGE)),
        ("recording", torch.AcceleratorError(NO_GRAPH)),
    ],
    ids=str,
)
def test_out_of_memory_halves_the_rows_and_keeps_the_completions(
    loaded, questions, task, where, error, monkeypatch, capsys
):
    plain, asked = draw(loaded, questions, task, max_new_tokens=12), []
    if where == "recording":
        Recorder(monkeypatch).error = error
    names = {"allocation": "__init__", "step": "call", "recording": "complete"}
    name = names[where]
    real, complete = getattr(cuda_graph.Static, name), cuda_graph.Static.complete
    failed = where == "recording"

    def once(static, *arguments):
        nonlocal failed
        if not failed and (asked or where == "allocation"):
            failed = True
            raise error
        return real(static, *arguments)

    def listed(static, request, part):
        found = complete(static, request, part)
        asked.append([request.ids[i] for i in part])
        return found

    monkeypatch.setattr(cuda_graph.Static, name, once)
    monkeypatch.setattr(cuda_graph.Static, "complete", listed)
    engine = cuda_graph.Engine()
    assert_equal(draw(loaded, questions, task, engine, max_new_tokens=12), plain)
    assert "continuing with --sampling-batch-size 10" in "".join(capsys.readouterr())
    assert engine.most == 10 and engine.static.rows == 8
    drawn = [name for part in asked for name in part]
    assert sorted(drawn) == sorted(questions["id"])  # none twice
    assert len(asked[-1]) <= 2


def test_out_of_memory_with_one_question_says_what_to_lower(loaded, questions, task, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError(TOO_LARGE)

    monkeypatch.setattr(cuda_graph.Static, "__init__", full)
    with pytest.raises(UserError, match="4 completions of a single question.*--n-samples"):
        draw(loaded, questions, task, cuda_graph.Engine())


@pytest.mark.parametrize("gigabytes, rows", [(2, 41), (4, 82), (1000, cuda_graph.MOST_ROWS)])
def test_rows_follow_from_the_free_memory(gigabytes, rows, monkeypatch):
    """Of 30 layers with keys and values of 3 heads, and of 640 columns and 440,000 words."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gigabytes * 1e9, 200e9))
    config = AutoConfig.for_model(
        "llama",
        num_hidden_layers=30,
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=440_000,
    )
    on_gpu = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "config": config}
    assert 640 * 30 * 2 * 3 * 64 * 2 + 44 * 440_000 == 34_105_600  # bytes of a row
    assert cuda_graph.rows_that_fit(types.SimpleNamespace(**on_gpu), 640) == rows


def test_more_rows_than_asked_for_are_decoded_in_equal_batches(
    loaded, questions, task, monkeypatch
):
    monkeypatch.setattr(cuda_graph, "rows_that_fit", lambda *_: 35)
    sizes, complete = [], cuda_graph.Static.complete

    def listed(static, request, part):
        sizes.append(len(part))
        return complete(static, request, part)

    monkeypatch.setattr(cuda_graph.Static, "complete", listed)
    settings = {"batch_size": 4, "max_new_tokens": 12}
    ours = draw(loaded, questions, task, cuda_graph.Engine(), **settings)
    assert sizes == [5, 5]  # 8 at a time would leave 2
    assert_equal(ours, draw(loaded, questions, task, **settings))


def test_close_frees_the_memory_and_decoding_works_afterwards(loaded, questions, task):
    engine = cuda_graph.Engine()
    draw(loaded, questions.select([0]), task, engine)
    assert engine.static is not None
    engine.close()
    assert engine.static is None
    few = questions.select([0])
    assert_equal(draw(loaded, few, task, engine), draw(loaded, few, task))


def test_a_profile_of_a_gpu_has_this_engine_and_works_on_a_cpu(questions, task):
    p = profiles.get("smollm2-135m", model="seed")
    assert p.engine == "cuda_graph"
    model, tokenizer = cuda_graph.Engine().load(p)
    few = questions.select([0])
    ours = draw((model, tokenizer), few, task, cuda_graph.Engine(), max_new_tokens=5)
    assert_equal(ours, draw((model, tokenizer), few, task, max_new_tokens=5))
