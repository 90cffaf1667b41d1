"""The tasks: what they load, how they split it, what they say to broken files. Reading answers is in test_grading."""

import gzip
import hashlib
import importlib.util
import json
import random
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from irpo_utils import UserError, grading, tasks
from irpo_utils.tasks import files, gsm8k, jsonl, math, word_problems
from studies import word_choices

SPLITS = ("train", "validation", "test")
REPOSITORY = Path(__file__).parents[1]


def normalised(text: str) -> str:
    return "".join(text.split()).casefold()


def write(path: Path, *rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


# --- word problems -------------------------------------------------------------------------------------------------

FROZEN = {
    "train": "d778fea86c9f282ed785ff0bb27d1d51f39bb3bcefb69dae3ea6f7cd60089d33",
    "validation": "4df911901679d3efedb2b0d8acc84ae9b4a6c734c5973d0e4ae4ce640966f649",
    "test": "abb5664ff45b649ee81dd951855be417a85d14b1f90b42aebedd5648023f3ff7",
}


MASKS = dict.fromkeys(word_problems.NAMES, "@") | {
    item: "%"
    for theme in word_problems.THEMES
    for word in theme["items"]
    for item in (word, word.capitalize())
}


def mask(question: str) -> str:
    """The skeleton of a question found from its text alone: numbers, names and objects replaced."""
    return re.sub(
        r"\w+", lambda word: "#" if word[0].isdigit() else MASKS.get(word[0], word[0]), question
    )


@pytest.fixture(scope="module")
def splits():
    return word_problems.all_splits()


def test_word_problems_never_change(splits):
    digests = {
        name: hashlib.sha256(json.dumps(rows).encode()).hexdigest() for name, rows in splits.items()
    }
    assert digests == FROZEN, (
        "the committed M0 and every committed result belong to the frozen questions"
    )


def test_word_problems_have_the_promised_sizes_and_share_no_question(splits):
    assert [len(splits[name]) for name in SPLITS] == [2400, 500, 500]
    questions = [normalised(row["question"]) for rows in splits.values() for row in rows]
    assert len(set(questions)) == len(questions)


def test_word_problems_vary_and_the_test_split_has_unseen_skeletons(splits):
    masks = {name: [mask(row["question"]) for row in rows] for name, rows in splits.items()}
    assert len(set(masks["train"])) >= 150 and len(set(masks["test"])) >= 150
    assert {row["steps"] for row in splits["test"]} == {2, 3, 4, 5, 6}
    known = set(masks["train"])
    unseen = [
        row["new_skeleton"] for row, m in zip(splits["test"], masks["test"]) if m not in known
    ]
    assert len(unseen) >= 0.2 * len(splits["test"])
    flagged = [m for row, m in zip(splits["test"], masks["test"]) if row["new_skeleton"]]
    assert not known & set(flagged), "a question marked as new has a skeleton of the training split"


def test_word_problem_solutions_are_true_and_use_the_numbers_of_the_story(splits):
    operate = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    for row in (row for rows in splits.values() for row in rows):
        *lines, last = row["solution"].split("\n")
        known = {int(n) for n in re.findall(r"\d+", row["question"])} | {
            2,
            3,
        }  # "half", "doubles", "triples"
        for line in lines:
            a, symbol, b, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", line).groups()
            assert operate[symbol](int(a), int(b)) == int(result) and (
                symbol != "/" or int(a) % int(b) == 0
            ), line
            assert {int(a), int(b)} <= known, (row["question"], line)
            known.add(int(result))
        assert len(lines) == row["steps"] and lines[-1].endswith("=" + row["answer"])
        assert last == f"Final answer: {row['answer']}"
        assert word_problems.TASK.is_correct(
            word_problems.TASK.extract(row["solution"]), row["answer"]
        )


def test_corpus_of_the_seed_model_has_no_question_and_no_held_out_skeleton_of_a_split(splits):
    spec = importlib.util.spec_from_file_location(
        "make_seed_model", REPOSITORY / "scripts/make_seed_model.py"
    )
    script = importlib.util.module_from_spec(spec)
    sys.modules["make_seed_model"] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    questions = {normalised(row["question"]) for rows in splits.values() for row in rows}
    held_out = {
        mask(row["question"])
        for name in ("validation", "test")
        for row in splits[name]
        if row["new_skeleton"]
    }
    for phase in script.PHASES:
        for row in islice(script.corpus(phase, 0), 30_000):
            assert normalised(row["question"]) not in questions
            assert mask(row["question"]) not in held_out


def test_word_problems_prompt_is_the_one_m0_was_trained_with():
    assert word_problems.TASK.prompt({"question": "How many?"}) == "Question: How many?\nSolution:"


# --- the same with four options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_word_choices_are_the_word_problems_with_four_options_one_of_which_is_right(splits, split):
    rows = word_choices.TASK.load(split)
    assert rows["question"][:] == [row["question"] for row in splits[split]]
    for row, same in zip(rows, splits[split], strict=True):
        values = [int(choice) for choice in row["choices"]]
        assert (
            len(values) == 4
            and values == sorted(values)
            and values[0] > 0
            and len(set(values)) == 4
        )
        assert row["choices"]["ABCD".index(row["answer"])] == same["answer"]
        assert word_choices.TASK.extract(row["solution"], row) == row[
            "answer"
        ] and word_choices.TASK.solved(row["solution"], row)
        some = range(1 + int(same["answer"]) % 97, 600, 97)
        assert all(word_choices.nearest(str(value), row["choices"]) for value in some)
    assert all(0.2 < rows["answer"][:].count(letter) / len(rows) < 0.3 for letter in "ABCD")
    assert word_choices.TASK.load(split)["choices"][:] == rows["choices"][:]


def test_the_option_nearest_to_a_number_is_ticked_and_a_lucky_one_is_not_solved():
    from datasets import Dataset

    said = {
        "41": "A",
        "59": "B",
        "74": "B",
        "90": "B",
        "91": "C",
        "-5": "A",
        "9,999": "D",
        "57.5": None,
        "many": None,
        "B": None,
    }
    samples = Dataset.from_list(
        [
            {
                "completion": f"Final answer: {text}",
                "answer": "B",
                "finished": True,
                "choices": ["41", "74", "107", "140"],
            }
            for text in said
        ]
    )
    graded = grading.grade(samples, word_choices.TASK)
    assert graded["extracted"][:] == [*said.values()] and graded["correct"][:] == [
        name == "B" for name in said.values()
    ]
    assert [word_choices.TASK.solved(row["completion"], row) for row in samples] == [
        text == "74" for text in said
    ]


# --- loading -------------------------------------------------------------------------------------------------------


def test_unknown_task_and_split_are_named():
    with pytest.raises(UserError, match="no task 'gsm9k'.*gsm8k.*--task jsonl"):
        tasks.get("gsm9k")
    with pytest.raises(UserError, match="no split 'dev'.*validation"):
        tasks.get("word_problems").load("dev")
    with pytest.raises(UserError, match="no split 'dev'.*math500"):
        tasks.get("math").load("dev", "nowhere")


def test_embedded_task_refuses_data():
    with pytest.raises(UserError, match="--data"):
        word_problems.TASK.load("test", "questions.jsonl")


def test_importing_all_tasks_is_light():
    code = (
        "import sys; from irpo_utils import grading, tasks; [tasks.get(name) for name in tasks.NAMES];"
        "heavy = {'torch', 'transformers', 'datasets', 'sympy', 'math_verify'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


SIZES = {
    "gsm8k": (6473, 1000, 1319),
    "svamp": (700, 100, 200),
    "arc_challenge": (946, 166, 1172),
    "math": (4739, 836, 5000),
}


@pytest.mark.parametrize("name", SIZES)
def test_real_files_load_in_the_promised_splits_without_overlap(real_data, name):
    task = tasks.get(name)
    parts = {split: task.load(split, str(real_data / name)) for split in SPLITS}
    assert tuple(len(parts[split]) for split in SPLITS) == SIZES[name]
    questions = {split: {files.normalise(q) for q in parts[split]["question"]} for split in SPLITS}
    assert not questions["train"] & questions["validation"]
    assert not (questions["train"] | questions["validation"]) & questions["test"]
    ids = [i for split in SPLITS for i in parts[split]["id"]]
    assert len(set(ids)) == len(ids)
    for part in parts.values():
        assert all(
            type(row[key]) is str and row[key].strip()
            for row in part
            for key in ("id", "question", "answer")
        )
    again = task.load(
        "validation", str(real_data)
    )  # the folder above, and once more: the same rows
    assert again["id"] == parts["validation"]["id"]


def test_environment_variable_names_the_folder_of_all_tasks(real_data, monkeypatch):
    monkeypatch.setenv("IRPO_DATA", str(real_data))
    assert len(tasks.get("svamp").load("test")) == 200


def test_math_train_has_nothing_of_the_test_sets_and_no_example_is_in_a_split(real_data):
    raw = [json.loads(line) for line in open(real_data / "math/train_8k.jsonl", encoding="utf-8")]
    parts = {split: math.TASK.load(split, str(real_data)) for split in (*SPLITS, "math500")}
    test = {normalised(q) for q in parts["test"]["question"]}
    assert (
        sum(normalised(row["question"]) in test for row in raw) == 2937
    )  # the overlap is there in the file ...
    ours = {normalised(q) for split in ("train", "validation") for q in parts[split]["question"]}
    assert not ours & test and not ours & {
        normalised(q) for q in parts["math500"]["question"]
    }  # ... and not here
    assert len(parts["math500"]) == 500
    prompt = math.TASK.prompt(parts["test"][0])
    shown = re.findall(r"^Question: (.*)$", prompt, flags=re.MULTILINE)
    assert len(shown) == 5 and shown[-1] == parts["test"][0]["question"].split("\n")[0]
    for part in parts.values():
        assert not {normalised(q) for q in shown[:4]} & {normalised(q) for q in part["question"]}
    gold = {normalised(row["question"]): row["answer"] for row in raw}
    for block in prompt.split("Question: ")[1:-1]:
        question, rest = block.split("\nSolution: ")
        assert math.TASK.is_correct(math.TASK.extract(rest), gold[normalised(question)])
        assert math.TASK.is_correct(math.last_boxed(rest), gold[normalised(question)])


def test_prompts_are_those_of_the_paper():
    gsm = tasks.get("gsm8k").prompt({"question": "Why {x}?"})
    assert gsm == (
        "Your task is to answer the question below. Give step by step reasoning before you answer, and when "
        'you\'re ready to answer, please use the format "Final answer: ..."\nQuestion: Why {x}?\nSolution:'
    )
    assert tasks.get("svamp").prompt({"question": "Why {x}?"}) == gsm
    arc = tasks.get("arc_challenge").prompt(
        {"question": "Which?", "choices": ["red", "blue", "green"]}
    )
    assert arc == (
        "Your task is to answer the question below. Give step by step reasoning before you answer, and when "
        'you\'re ready to answer, conclude using the format "Final answer: (insert letter here)"\n\n'
        "Question: Which?\n(A) red\n(B) blue\n(C) green\nSolution:"
    )
    assert (
        tasks.get("math")
        .prompt({"question": "What is $x$?", "examples": "Question: ...\n"})
        .startswith(
            "Your task is to answer the last question below. Give step by step reasoning before you answer, and when "
            "you're ready to answer, please wrap your answer in \\boxed, and conclude using the format "
            '"Final answer: ..."\n\n'
            "Question: ...\nQuestion: What is $x$?"
        )
    )


def test_gsm8k_solutions_lose_their_marks_and_end_in_the_final_answer():
    row = gsm8k.TASK.row(
        {"question": "Q?", "answer": "She has 2*600 = <<2*600=1200>>1,200.\n#### 1,200"}
    )
    assert row == {
        "question": "Q?",
        "answer": "1200",
        "solution": "She has 2*600 = 1,200.\nFinal answer: 1200",
    }


HUB = {
    "gsm8k": [
        {"question": f"How much is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"}
        for i in range(40)
    ],
    "svamp": [
        {"ID": f"chal-{i}", "Body": f"Ann has {i} eggs", "Question": "How many?", "Answer": str(i)}
        for i in range(40)
    ],
    "arc_challenge": [
        {
            "id": f"Mercury_{i}",
            "question": f"Which {i}?",
            "answerKey": "2",
            "choices": {"text": ["red", "blue"], "label": ["1", "2"]},
        }
        for i in range(40)
    ],
}


@pytest.mark.parametrize("name", HUB)
def test_hub_rows_load_like_files(monkeypatch, name):
    import datasets

    def fake(
        hub, config=None, split=None
    ):  # any other argument, trust_remote_code above all, is an error
        offset = {"train": 0, "validation": 20, "test": 30}[split]
        return datasets.Dataset.from_list(
            HUB[name][offset : offset + (20 if split == "train" else 10)]
        )

    monkeypatch.setattr(datasets, "load_dataset", fake)
    train, test = (tasks.get(name).load(split) for split in ("train", "test"))
    assert {"id", "question", "answer"} <= set(train.column_names)
    assert not set(train["question"]) & set(test["question"])
    if name == "arc_challenge":
        assert set(test["answer"]) == {"B"}  # labels 1 to 4 become letters
    if name == "svamp":
        assert all(row["question"] == f"Ann has {row['answer']} eggs, How many?" for row in train)


def test_math_from_the_hub_reads_all_subjects_and_math500(monkeypatch, real_data):
    import datasets

    train = [json.loads(line) for line in open(real_data / "math/train_8k.jsonl", encoding="utf-8")]
    keys = {
        hashlib.sha256(files.normalise(row["question"]).encode()).hexdigest()[:16]: row
        for row in train
    }

    def fake(hub, config=None, split=None):
        rows = [
            {"problem": f"{config} {split} {i}?", "solution": f"So \\boxed{{{i}}}."}
            for i in range(5)
        ]
        if split == "train" and config == "algebra":
            rows += [
                {"problem": keys[k]["question"], "solution": f"\\boxed{{{keys[k]['answer']}}}"}
                for k in math.EXAMPLES
            ]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert len(math.TASK.load("test")) == 35 and len(math.TASK.load("math500")) == 5
    local = math.TASK.load("test", str(real_data))[0]["examples"]
    assert math.TASK.load("train")[0]["examples"] == local, (
        "the prompt must not depend on where the data come from"
    )


def test_without_a_network_the_error_offers_data(monkeypatch):
    import datasets

    def fail(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    for name in ("gsm8k", "svamp", "arc_challenge", "math"):
        with pytest.raises(UserError, match="ConnectionError.*--data FOLDER.*IRPO_DATA"):
            tasks.get(name).load("train")


# --- broken files --------------------------------------------------------------------------------------------------

GOOD = {
    "gsm8k": {"question": "Q?", "answer": "#### 3"},
    "svamp": {"ID": "chal-1", "Body": "B.", "Question": "Q?", "Answer": 3.0},
    "arc_challenge": {
        "id": "1",
        "question": "Q?",
        "choices": {"text": ["a", "b"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "math": {"problem": "Q?", "solution": "\\boxed{3}"},
    "jsonl": {"question": "Q?", "answer": 3},
}
BROKEN = {
    "not JSON": ("{'question': 3}", "Expecting"),
    "not an object": ("[1, 2]", "not a JSON object"),
    "not UTF-8": (b'{"question": "\xff"}', "utf-8"),
    "nested too deep": ("[" * 100_000, "recursion"),
    "no fields": ({}, "missing|no answer"),
    "half a surrogate pair": ('{"question": "\\ud800", "problem": "\\ud800"}', "surrogate"),
    "not a number": ('{"answer": NaN}', "NaN is not a number"),
    "infinite": ('{"answer": -Infinity}', "-Infinity is not a number"),
    "too large": ('{"answer": 1e400}', "1e400 is out of range"),
}
SPECIAL = [
    ("gsm8k", {"question": "Q?", "answer": "three"}, "does not end in ####"),
    ("gsm8k", {"question": " ", "answer": "#### 3"}, "empty"),
    ("gsm8k", {"question": "Q?", "answer": None}, "NoneType"),
    ("svamp", {**GOOD["svamp"], "ID": "x", "Answer": "many"}, "not a number"),
    ("svamp", GOOD["svamp"], "'svamp-chal-1' was there before"),
    ("arc_challenge", {**GOOD["arc_challenge"], "id": "2", "answerKey": "C"}, "none of the labels"),
    (
        "arc_challenge",
        {**GOOD["arc_challenge"], "id": "2", "choices": {"text": ["a"], "label": ["A"]}},
        "two to five",
    ),
    ("math", {"problem": "Q?", "solution": "It is 3."}, "no answer"),
    ("jsonl", {"question": "Q?"}, "'answer' is missing"),
    ("jsonl", {"question": 3, "answer": 3}, "not text"),
    ("jsonl", {"question": "Q?", "answer": ""}, "empty"),
    ("jsonl", {"question": "Q?", "answer": True}, "not text or a number"),
    ("jsonl", {"question": "Q?", "answer": "C", "choices": ["red", "blue"]}, "none of the choices"),
    ("jsonl", {"question": "Q?", "answer": "A", "choices": "red"}, "list of two to five"),
    ("jsonl", {"question": "Q?", "answer": "A", "solution": 3}, "`solution` is not text"),
    ("jsonl", {"question": "Q?", "answer": "A\nB"}, "`answer` has several lines"),
    ("jsonl", {"question": "Q?", "answer": "A" * 1001}, "`answer` is over 1000 characters"),
    ("jsonl", {"question": "Q?", "answer": "3", "id": "jsonl-test-00000"}, "was there before"),
]


def refused(name: str, line, folder: Path, reason: str) -> None:
    """The third line of test.jsonl (the second is empty) is broken: the error names file, line, reason and remedy."""
    body = (
        line
        if isinstance(line, bytes)
        else (line if isinstance(line, str) else json.dumps(line)).encode()
    )
    for split in ("train", "validation"):
        write(folder / f"{split}.jsonl", GOOD[name])
    (folder / "test.jsonl").write_bytes(json.dumps(GOOD[name]).encode() + b"\n\n" + body + b"\n")
    with pytest.raises(UserError, match=f"(?i)test.jsonl, line 3: .*(?:{reason}).*fix or delete"):
        tasks.get(name).load("test", str(folder))


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("kind", BROKEN)
def test_malformed_lines_are_named(tmp_path, name, kind):
    refused(name, *BROKEN[kind][:1], tmp_path, BROKEN[kind][1])


@pytest.mark.parametrize("name, row, reason", SPECIAL)
def test_malformed_fields_are_named(tmp_path, name, row, reason):
    refused(name, row, tmp_path, re.escape(reason) if "####" in reason else reason)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="no file or folder.*nowhere"):
        tasks.get("gsm8k").load("test", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="Cannot read.*test.jsonl"):
        tasks.get("gsm8k").load("test", str(tmp_path))
    with pytest.raises(UserError, match="is a file.*--task jsonl"):
        tasks.get("gsm8k").load("test", str(write(tmp_path / "questions.jsonl", GOOD["gsm8k"])))
    with pytest.raises(UserError, match="has no questions"):
        tasks.get("jsonl").load("test", str(write(tmp_path / "empty.jsonl", "")))
    with pytest.raises(UserError, match="--data FILE"):
        tasks.get("jsonl").load("test")
    write(tmp_path / "math/train.jsonl", GOOD["math"])
    write(tmp_path / "math/test.jsonl", {**GOOD["math"], "problem": "R?"})
    with pytest.raises(UserError, match="4 of the four examples"):
        tasks.get("math").load("test", str(tmp_path / "math"))


@pytest.mark.parametrize(
    "content, encoding",
    [
        (json.dumps(GOOD["jsonl"]).encode("utf-16"), "UTF-16"),
        (json.dumps(GOOD["jsonl"]).encode("utf-16-le"), "UTF-16"),
        (gzip.compress(json.dumps(GOOD["jsonl"]).encode()), "gzip"),
    ],
)
def test_the_encoding_of_an_unreadable_file_is_named(tmp_path, content, encoding):
    (tmp_path / "mine.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"mine.jsonl is {encoding}.*UTF-8"):
        jsonl.TASK.load("train", str(tmp_path / "mine.jsonl"))


# --- questions of one's own ----------------------------------------------------------------------------------------


def test_one_file_is_split_by_a_hash_that_ignores_order_case_and_punctuation(tmp_path):
    rows = [{"question": f"How much is {i} and one?", "answer": i + 1} for i in range(1000)]
    changed = [
        {"question": r["question"].upper().replace("?", " ?"), "answer": r["answer"]} for r in rows
    ]
    random.Random(0).shuffle(changed)
    files_ = write(tmp_path / "a.jsonl", *rows), write(tmp_path / "b.jsonl", *rows[:9], *changed)
    first, second = (
        {s: jsonl.TASK.load(s, str(path))["question"] for s in SPLITS} for path in files_
    )
    assert [round(len(first[s]), -2) for s in SPLITS] == [800, 100, 100]
    for split in SPLITS:
        assert {normalised(q) for q in first[split]} == {normalised(q) for q in second[split]}


def test_questions_that_differ_in_a_sign_or_a_blank_are_all_kept(tmp_path):
    rows = [
        {"question": f"What is {a}{sign}{b}?", "answer": a}
        for a in range(1, 21)
        for b in range(1, 21)
        for sign in "+-×÷"
    ]
    rows += [{"question": f"Sort {numbers}.", "answer": 1} for numbers in ("1 23", "12 3", "1 2 3")]
    path = write(
        tmp_path / "a.jsonl", *rows, {"question": "what is 1 + 1", "answer": 2}
    )  # the last one is a repetition
    assert sum(len(jsonl.TASK.load(split, str(path))) for split in SPLITS) == len(rows)


def test_optional_fields_travel_and_choices_become_letters(tmp_path):
    for split in SPLITS:
        write(
            tmp_path / f"{split}.jsonl",
            {"question": f"{split}, red?", "answer": "Blue", "choices": ["red", "blue"]},
            {
                "question": f"{split}, two?",
                "answer": 2.0,
                "solution": "Final answer: 2",
                "id": "mine",
            },
        )
    first, second = jsonl.TASK.load("test", str(tmp_path))
    assert (first["answer"], first["choices"], first["id"]) == (
        "B",
        ["red", "blue"],
        "jsonl-test-00000",
    )
    assert (second["solution"], second["id"], second["choices"]) == (
        "Final answer: 2",
        "mine",
        None,
    )
    assert "(B) blue" in jsonl.TASK.prompt(first) and jsonl.TASK.prompt(
        second
    ) == gsm8k.TASK.prompt(second)


@pytest.mark.parametrize(
    "number, text",
    [
        ("0.00005", "0.00005"),
        ("5e-5", "0.00005"),
        ("10000000000000000", "10000000000000000"),
        ("1e16", "10000000000000000"),
        ("1e3", "1000"),
        ("0.1", "0.1"),
        ("2.50", "2.50"),
        ("-3", "-3"),
    ],
)
def test_numbers_keep_their_digits_and_are_right_as_a_model_writes_them(tmp_path, number, text):
    for split in SPLITS:
        write(tmp_path / f"{split}.jsonl", f'{{"question": "{split}?", "answer": {number}}}')
    (row,) = jsonl.TASK.load("test", str(tmp_path))
    assert row["answer"] == text
    row = {**row, "completion": f"Final answer: {text}", "finished": True}
    assert grading.grade_one(row, jsonl.TASK)["reward"] == 1.0


def test_a_given_id_that_equals_an_automatic_one_is_refused(tmp_path):
    rows = [{"question": f"{i}?", "answer": i} for i in range(3)]
    path = write(
        tmp_path / "mine.jsonl", *rows, {"question": "R?", "answer": 1, "id": "mine-00001"}
    )
    with pytest.raises(UserError, match="line 4: the id 'mine-00001' was there before"):
        jsonl.TASK.load("train", str(path))


def test_a_file_too_small_to_split_is_refused(tmp_path):
    path = write(tmp_path / "one.jsonl", GOOD["jsonl"])
    with pytest.raises(UserError, match="is empty: too few questions"):
        [jsonl.TASK.load(split, str(path)) for split in SPLITS]


def test_a_gold_solution_of_your_own_file_ends_as_the_prompt_asks():
    task = tasks.get("jsonl")
    raw = {"question": "Legs of three spiders?", "answer": "24", "solution": "3*8=24."}
    row = task.row(raw)
    assert row["solution"] == "3*8=24.\nFinal answer: 24"
    assert task.row(raw | {"solution": row["solution"]})["solution"] == row["solution"]
    assert task.is_correct(task.extract(row["solution"], row), "24")


@pytest.mark.parametrize("bullet", ["- 36", "– 36", "- **36**", "• 36"])
def test_a_bullet_is_not_a_minus_sign(bullet):
    gsm8k = tasks.get("gsm8k")
    assert gsm8k.extract(f"Final answer:\n{bullet}") == "36"
    assert gsm8k.extract("Final answer:\n-36") == gsm8k.extract("Final answer: - 36") == "-36"


@pytest.mark.parametrize("hedge", ["or Rome", "wrong", "no, Rome", "actually Rome"])
def test_a_hedge_in_brackets_is_not_an_explanation(hedge):
    task = tasks.get("jsonl")
    row = {"answer": "Paris"}
    right, hedged = (
        task.extract(f"Final answer: Paris ({aside})", row) for aside in ("capital", hedge)
    )
    assert task.is_correct(right, "Paris", row) and not task.is_correct(hedged, "Paris", row)
    assert right == task.extract("Final answer: Paris", row)
