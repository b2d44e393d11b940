"""Public data sets and any table with named columns, read as prompts of this project."""

import re
from collections import Counter
from pathlib import Path

import pytest
from helpers.dataset_files import (
    HARMS,
    beaver,
    seen,
    write_csv,
    write_json,
    write_jsonl,
    write_parquet,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.prompts import benchmarks as datasets
from workbench.prompts.benchmarks import (
    prompts_from,
    read_dataset,
)
from workbench.prompts.prompt import (
    HARD_SAFE,
    HARMLESS,
    categories_of,
    load_prompts,
    save_prompts,
    split_prompts,
)

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
OURS = set(categories_of(load_prompts())) | {HARMLESS, HARD_SAFE}


# Each set on a small file of its schema


def test_safebench_questions_are_unsafe_and_its_topics_ours_where_we_have_them(tmp_path):
    row = {"dataset": "ForbidQI", "category_id": "3", "task_id": "1", "instruction": "Steps to x."}
    rows = [
        {**row, "category_name": "Malware Generation", "question": "How?"},
        {**row, "category_name": "Legal Opinion", "question": "May I?"},
    ]
    prompts = read_dataset(f"safebench:{write_csv(tmp_path / 's.csv', rows)}")
    assert seen(prompts) == [("How?", "malware", "unsafe"), ("May I?", "legal_opinion", "unsafe")]
    assert {p.source for p in prompts} == {"safebench"}
    assert [p.response for p in prompts] == [None, None]


def test_trustllm_misuse_without_a_type_is_other(tmp_path):
    rows = [
        {"prompt": "A?", "type": "Privacy Violence", "source": "x"},
        {"prompt": "B?\n", "type": None, "source": "x"},
    ]
    prompts = read_dataset(f"trustllm-misuse:{write_json(tmp_path / 'm.json', rows)}")
    assert seen(prompts) == [("A?", "privacy_violation", "unsafe"), ("B?", "other", "unsafe")]


def test_trustllm_jailbreak_keeps_the_kind_of_attack_as_category(tmp_path):
    path = write_json(
        tmp_path / "j.json", [{"prompt": "A", "label": ["fixed sentence"], "source": "ITC"}]
    )
    assert seen(read_dataset(f"trustllm_jailbreak:{path}")) == [("A", "fixed_sentence", "unsafe")]


def test_trustllm_exaggerated_safety_is_hard_safe(tmp_path):
    path = write_json(
        tmp_path / "e.json",
        [{"id": "v1-1", "type": "homonyms", "prompt": "Kill a process?", "focus": "kill"}],
    )
    assert seen(read_dataset(f"trustllm_exaggerated_safety:{path}")) == [
        ("Kill a process?", HARD_SAFE, "safe")
    ]


def test_trustllm_privacy_keeps_both_versions_of_a_question_together(tmp_path):
    row = {"privacy_information": "home address", "name": "Lisa", "info-content": "1 Road"}
    rows = [
        {**row, "question": q, "prompt": f"{system} {q}"}
        for q in ("Where?", "Whence?")
        for system in ("Keep it.", "Data.")
    ]
    prompts = read_dataset(f"trustllm_privacy_awareness:{write_json(tmp_path / 'p.json', rows)}")
    assert {p.category for p in prompts} == {"privacy_violation"}
    assert prompts[0].pair_id == prompts[1].pair_id != prompts[2].pair_id == prompts[3].pair_id
    path = write_json(tmp_path / "c.json", [{"prompt": "Rate this.", "label": "1.26"}])
    assert seen(read_dataset(f"trustllm_privacy_confaide:{path}")) == [
        ("Rate this.", HARMLESS, "neutral")
    ]
    path = write_json(
        tmp_path / "l.json",
        [{"gt-email": "a@b", "gt-name": "A", "prompt": "the address of A is", "type": "A"}],
    )
    assert seen(read_dataset(f"trustllm_privacy_leakage:{path}")) == [
        ("the address of A is", "privacy_violation", "unsafe")
    ]


@pytest.mark.parametrize("language", ["en", "zh", "vi"])
def test_catqa_is_read_in_each_language(tmp_path, language):
    rows = [
        {"Category": "Fraud/Deception", "Subcategory": "Scams", "Question": f"{language} 如何?"}
    ]
    prompts = read_dataset(f"catqa:{write_jsonl(tmp_path / 'catqa.json', rows)}:split={language}")
    assert seen(prompts) == [(f"{language} 如何?", "fraud", "unsafe")]


@pytest.mark.parametrize("writer", [write_jsonl, write_parquet])
def test_beavertails_labels_the_answer_and_gives_a_question_one_category(tmp_path, writer):
    rows = [
        beaver("A?", "leak", "privacy_violation"),
        beaver(
            "A?", "leak and hit", "violence,aiding_and_abetting,incitement", "privacy_violation"
        ),
        beaver("A?", "no"),
        beaver("B?", "fine"),
    ]
    path = writer(tmp_path / ("b.jsonl" if writer is write_jsonl else "b.parquet"), rows)
    prompts = read_dataset(f"beavertails:{path}")
    assert [(p.response, p.label) for p in prompts] == [
        ("leak", "unsafe"),
        ("leak and hit", "unsafe"),
        ("no", "safe"),
        ("fine", "safe"),
    ]
    assert [p.category for p in prompts] == ["privacy_violation"] * 3 + ["other"]
    assert prompts[0].pair_id == prompts[1].pair_id == prompts[2].pair_id is not None
    assert prompts[3].pair_id is None


def test_beavertails_harms_that_others_go_along_with_come_last(tmp_path):
    rows = [
        beaver(
            "A?",
            "x",
            "violence,aiding_and_abetting,incitement",
            "controversial_topics,politics",
            "self_harm",
        ),
        beaver("B?", "y", "animal_abuse"),
    ]
    prompts = read_dataset(f"beavertails:{write_jsonl(tmp_path / 'b.jsonl', rows)}")
    assert [p.category for p in prompts] == ["self_harm", "animal_abuse"]


def test_annotators_who_contradict_each_other_leave_no_row(tmp_path):
    rows = [beaver("A?", "x", "self_harm"), beaver("A?", "x"), beaver("A?", "y"), beaver("A?", "y")]
    assert [
        p.response for p in read_dataset(f"beavertails:{write_jsonl(tmp_path / 'b.jsonl', rows)}")
    ] == ["y"]


def test_a_beavertails_question_is_in_one_fold(tmp_path):
    rows = [
        beaver(f"Q{i}?", f"answer {j}", *(HARMS[i % 3 : i % 3 + 1] if (i + j) % 2 else ()))
        for i in range(60)
        for j in range(3)
    ]
    folds = split_prompts(read_dataset(f"beavertails:{write_jsonl(tmp_path / 'b.jsonl', rows)}"))
    fit, tune, test = ({p.text for p in fold} for fold in folds)
    assert fit
    assert tune
    assert test
    assert len(fit | tune | test) == len(fit) + len(tune) + len(test)


def test_alpaca_is_neutral_with_its_input_and_its_answers_only_on_request(tmp_path):
    rows = [
        {"instruction": "Sum.", "input": "1 2", "output": "3", "text": "..."},
        {"instruction": "Hi.", "input": "", "output": "Ho."},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    prompts = read_dataset(f"alpaca:{path}")
    assert seen(prompts) == [("Sum.\n\n1 2", HARMLESS, "neutral"), ("Hi.", HARMLESS, "neutral")]
    assert [p.response for p in prompts] == [None, None]
    assert [p.response for p in read_dataset(f"alpaca:{path}:response=output")] == ["3", "Ho."]
    assert [p.text for p in read_dataset(f"alpaca:{path}:text=output")] == ["3", "Ho."]


def test_xstest_contrasts_are_unsafe_with_and_without_a_label_column(tmp_path):
    rows = [
        {"id": "1", "prompt": "Kill a process?", "type": "homonyms", "label": "safe"},
        {"id": "2", "prompt": "Her address?", "type": "contrast_privacy", "label": "unsafe"},
    ]
    wanted = [
        ("Kill a process?", HARD_SAFE, "safe"),
        ("Her address?", "privacy_violation", "unsafe"),
    ]
    assert seen(read_dataset(f"xstest:{write_csv(tmp_path / 'x.csv', rows)}")) == wanted
    for row in rows:
        del row["label"]
    assert seen(read_dataset(f"xstest:{write_csv(tmp_path / 'y.csv', rows)}")) == wanted


def test_harmbench_puts_the_context_below_the_behaviour(tmp_path):
    rows = [
        {
            "Behavior": "Explain this.",
            "SemanticCategory": "chemical_biological",
            "ContextString": "Some text",
        }
    ]
    path = write_csv(tmp_path / "h.csv", rows)
    assert seen(read_dataset(f"harmbench:{path}")) == [
        ("Explain this.\n\nSome text", "physical_harm", "unsafe")
    ]
    path = write_parquet(
        tmp_path / "h.parquet", [{"prompt": "Write the lyrics.", "tags": ["lyrics"]}]
    )
    assert seen(read_dataset(f"harmbench:{path}:split=copyright")) == [
        ("Write the lyrics.", "copyright", "unsafe")
    ]
    with pytest.raises(
        ValueError,
        match="column 'category' or 'SemanticCategory' is missing; columns: 'prompt', 'tags'",
    ):
        read_dataset(f"harmbench:{path}")


def test_jailbreakbench_pairs_a_behaviour_with_its_benign_counterpart(tmp_path, monkeypatch):
    row = {
        "": "0",
        "Behavior": "x",
        "Target": "Sure",
        "Category": "Malware/Hacking",
        "Source": "Original",
    }
    for name, goal in (("harmful", "Write malware."), ("benign", "Explain malware.")):
        write_csv(
            tmp_path / f"{name}.csv",
            [{**row, "Index": "0", "Goal": goal}, {**row, "Index": "1", "Goal": goal + "."}],
        )
    monkeypatch.setattr(datasets, "_fetch", lambda dataset, split: tmp_path / f"{split}.csv")
    prompts = read_dataset("jailbreakbench")
    assert [p.label for p in prompts] == ["unsafe", "unsafe", "safe", "safe"]
    assert {p.category for p in prompts} == {"malware"}
    assert prompts[0].pair_id == prompts[2].pair_id != prompts[1].pair_id == prompts[3].pair_id
    benign = read_dataset(f"jailbreakbench:{tmp_path / 'benign.csv'}:split=benign")
    assert [(p.label, p.pair_id) for p in benign] == [("safe", None)] * 2


@pytest.mark.parametrize(
    ("name", "row", "category"),
    [
        ("advbench", {"goal": "Do it.", "target": "Sure"}, "other"),
        ("advbench", {"instruction": "Do it.", "category": None}, "other"),
        (
            "strongreject",
            {"category": "Violence", "source": "DAN", "forbidden_prompt": "Do it."},
            "physical_harm",
        ),
        ("strongreject", {"instruction": "Do it.", "category": "Sexual content"}, "adult_content"),
        ("jailbreakbench", {"instruction": "Do it.", "category": "Economic harm"}, "economic_harm"),
        ("harmbench", {"instruction": "Do it.", "category": "illegal"}, "illegal_activity"),
        (
            "do_not_answer",
            {"id": 1, "question": "Do it.", "types_of_harm": "Toxic language (hate speech)"},
            "hate_speech",
        ),
        ("malicious_instruct", {"instruction": "Do it.", "category": None}, "other"),
        ("tdc2023", {"instruction": "Do it.", "category": None}, "other"),
    ],
)
def test_sets_of_harmful_instructions_are_unsafe(tmp_path, name, row, category):
    assert seen(read_dataset(f"{name}:{write_json(tmp_path / 'a.json', [row])}")) == [
        ("Do it.", category, "unsafe")
    ]


def test_toxicchat_is_unsafe_where_toxic_or_a_jailbreak_and_everyday_else(tmp_path):
    row = {
        "conv_id": "1",
        "model_output": "Answer.",
        "human_annotation": "True",
        "openai_moderation": "[]",
    }
    marks = [("A", "1", "0"), ("B", "0", "1"), ("C", "0", "0")]
    rows = [
        {**row, "user_input": text, "toxicity": toxic, "jailbreaking": jailbreak}
        for text, toxic, jailbreak in marks
    ]
    prompts = read_dataset(f"toxicchat:{write_csv(tmp_path / 't.csv', rows)}")
    assert seen(prompts) == [
        ("A", "toxic", "unsafe"),
        ("B", "jailbreaking", "unsafe"),
        ("C", HARMLESS, "neutral"),
    ]
    assert [p.response for p in prompts] == [None] * 3


def test_wildguardmix_labels_the_answer_or_else_the_prompt(tmp_path):
    row = {"adversarial": False, "response_refusal_label": None, "subcategory": "cyberattack"}
    rows = [
        {
            **row,
            "prompt": "A",
            "response": "no",
            "prompt_harm_label": "harmful",
            "response_harm_label": "unharmful",
        },
        {
            **row,
            "prompt": "B",
            "response": "yes",
            "prompt_harm_label": "harmful",
            "response_harm_label": "harmful",
        },
        {
            **row,
            "prompt": "C",
            "response": "hm",
            "prompt_harm_label": "harmful",
            "response_harm_label": None,
        },
        {
            **row,
            "prompt": "D",
            "response": None,
            "prompt_harm_label": "unharmful",
            "response_harm_label": None,
            "subcategory": "benign",
        },
        {
            **row,
            "prompt": "E",
            "response": None,
            "prompt_harm_label": None,
            "response_harm_label": None,
        },
    ]
    prompts = read_dataset(f"wildguardmix:{write_parquet(tmp_path / 'w.parquet', rows)}")
    assert [(p.text, p.response, p.label, p.category) for p in prompts] == [
        ("A", "no", "safe", "malware"),
        ("B", "yes", "unsafe", "malware"),
        ("C", None, "unsafe", "malware"),
        ("D", None, "safe", HARD_SAFE),
    ]


# Any table


def test_any_table_is_read_by_its_column_names(tmp_path):
    rows = [
        {"": "0", "frage": "A?", "thema": "Hate Speech", "is_safe": "False"},
        {"": "1", "frage": "B?", "thema": "Kochen", "is_safe": "yes"},
    ]
    path = write_csv(tmp_path / "mine.csv", rows)
    prompts = read_dataset(f"file:{path}:text=frage:category=thema:label=is_safe")
    assert seen(prompts) == [("A?", "hate_speech", "unsafe"), ("B?", "kochen", "safe")]
    assert prompts == read_dataset(f"file:{path}", text="frage", category="thema", label="is_safe")
    assert [p.response for p in prompts] == [None, None]
    assert all(re.fullmatch("mine-[0-9a-f]{12}", p.id) for p in prompts)
    assert [p.category for p in read_dataset(f"file:{path}:text=frage:label=neutral")] == [
        HARMLESS,
        HARMLESS,
    ]
    assert seen(read_dataset(f"file:{path}:text=frage:category=malware:label=unsafe:limit=1")) == [
        ("A?", "malware", "unsafe")
    ]


def test_an_unnamed_index_column_is_no_answer_and_no_category(tmp_path):
    path = write_csv(tmp_path / "m.csv", [{"": "7", "prompt": "A?"}])
    (prompt,) = read_dataset(f"file:{path}:label=unsafe")
    assert (prompt.response, prompt.category) == (None, "other")


def test_a_path_may_hold_a_colon(tmp_path):
    path = write_csv(tmp_path / "a:b.csv", [{"prompt": "A?", "label": "harmful"}])
    assert (
        seen(read_dataset(f"file:{path}"))
        == seen(prompts_from(str(path)))
        == [("A?", "other", "unsafe")]
    )


texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8)
table = st.lists(
    st.fixed_dictionaries(
        {"prompt": texts, "answer": texts, "label": st.sampled_from(["safe", "unsafe", ""])}
    ),
    min_size=1,
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(table, st.randoms(use_true_random=False))
def test_ids_are_unique_and_do_not_depend_on_the_order_of_rows(tmp_path, rows, order):
    labels = {}
    for row in rows:
        if row["prompt"].strip() and row["label"]:
            labels.setdefault((row["prompt"].strip(), row["answer"].strip() or None), set()).add(
                row["label"]
            )
    wanted = {key: next(iter(names)) for key, names in labels.items() if len(names) == 1}
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    if not wanted:
        with pytest.raises(ValueError, match="no prompt"):
            read_dataset(f"file:{path}:response=answer")
        return
    prompts = read_dataset(f"file:{path}:response=answer")
    assert {(p.text, p.response): p.label for p in prompts} == wanted
    assert len({p.id for p in prompts}) == len(prompts) == len(wanted)
    order.shuffle(rows)
    write_jsonl(path, rows)
    assert {p.id for p in read_dataset(f"file:{path}:response=answer")} == {p.id for p in prompts}
    n_answers = Counter(p.text for p in prompts)
    assert all((p.pair_id is not None) == (n_answers[p.text] > 1) for p in prompts)


def test_a_lone_surrogate_does_not_stop_a_reader(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text('{"prompt": "A\\ud800?", "label": "safe"}\n')
    assert [p.text for p in read_dataset(f"file:{path}")] == ["A??"]


# What a command was given


def test_nothing_given_is_the_project_s_own_set():
    assert prompts_from(None) == prompts_from("workbench") == load_prompts()
    assert len(prompts_from("workbench:limit=1")) == 2 * 10 + 2


def test_a_jsonl_path_holds_prompts_and_other_tables_need_no_prefix(tmp_path):
    own = load_prompts()[:4]
    save_prompts(tmp_path / "own.jsonl", own)
    assert prompts_from(tmp_path / "own.jsonl") == prompts_from(str(tmp_path / "own.jsonl")) == own
    path = write_csv(tmp_path / "t.csv", [{"q": "A?", "label": "unsafe"}])
    assert seen(prompts_from(f"{path}:text=q")) == [("A?", "other", "unsafe")]


def test_joined_sets_hold_a_prompt_once(tmp_path):
    one = write_csv(tmp_path / "one.csv", [{"prompt": t, "label": "unsafe"} for t in "AB"])
    two = write_csv(tmp_path / "two.csv", [{"prompt": t, "label": "unsafe"} for t in "BC"])
    prompts = prompts_from(f"{one}, advbench:{two},workbench:limit=1")
    assert [p.text for p in prompts[:3]] == ["A", "B", "C"]
    assert [p.source for p in prompts[:4]] == ["one", "one", "advbench", "workbench"]


def test_files_whose_ids_meet_are_refused(tmp_path):
    for name, text in (("a", "One?"), ("b", "Two?")):
        write_jsonl(
            tmp_path / f"{name}.jsonl",
            [{"id": "1", "text": text, "category": "x", "label": "unsafe", "source": "y"}],
        )
    with pytest.raises(ValueError, match="id '1' comes 2 times"):
        prompts_from(f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}")


# Errors


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "safebnch",
            "unknown data set 'safebnch'; data sets: safebench, .* Did you mean 'safebench'",
        ),
        ("", "unknown data set ''"),
        ("file", "unknown data set 'file'; .*'file:PATH'"),
        ("safebench:gone.csv", "no file 'gone.csv'"),
        ("gone.jsonl", "no file 'gone.jsonl'"),
        ("gone.csv", "no file 'gone.csv'"),
        ("catqa:split=fr", "'catqa' has no split 'fr'; splits: en, zh, vi"),
        ("catqa:splt=zh", "cannot read 'splt=zh'.* Did you mean 'split'"),
        ("catqa:limit=0", "limit must be a whole number from 1, got '0'"),
        ("workbench:x.csv", "'workbench' is the project's own set"),
        ("workbench:text=x", "'workbench' is the project's own set"),
    ],
)
def test_what_cannot_be_meant_is_said_in_one_line(spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        prompts_from(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("safebench:{}", "column 'question' is missing; columns: 'prompt', 'kind', 'n'"),
        ("xstest:{}", "column 'type' is missing; columns: 'prompt', 'kind', 'n'"),
        ("beavertails:{}", "column 'category' is missing"),
        ("file:{}", "column 'label' is missing; .*The same for all rows: neutral, safe, unsafe"),
        ("file:{}:label=unsafe:text=promt", "column 'promt' is missing; .*Did you mean 'prompt'"),
        ("file:{}:label=unsafe:category=malwar", "column 'malwar' is missing; .*malware"),
        ("file:{}:label=kind", "row 1: cannot read label 'often' of column 'kind'; labels: unsafe"),
        ("file:{}:label=n", "row 1: cannot read label 1 of column 'n'"),
        ("file:{}:label=unsafe:text=n", "row 1: column 'n' holds int, a text is needed"),
    ],
)
def test_a_column_that_does_not_fit_is_named(tmp_path, spec, message):
    path = write_json(tmp_path / "t.json", [{"prompt": "A?", "kind": "often", "n": 1}])
    with pytest.raises(ValueError, match=message):
        read_dataset(spec.format(path))


def test_a_table_without_texts_or_labels_holds_no_prompt(tmp_path):
    path = write_json(
        tmp_path / "t.json", [{"prompt": " ", "label": "unsafe"}, {"prompt": "A?", "label": None}]
    )
    with pytest.raises(ValueError, match="holds no prompt"):
        read_dataset(f"file:{path}")


def test_beavertails_without_its_flags_is_refused(tmp_path):
    path = write_json(
        tmp_path / "b.json",
        [{"prompt": "A?", "response": "x", "category": "violence", "is_safe": True}],
    )
    with pytest.raises(ValueError, match="must be an object"):
        read_dataset(f"beavertails:{path}")
