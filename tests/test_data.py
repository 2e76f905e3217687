"""Data sets: what is read, chosen, held out, tokenised and divided, and what is told when it cannot be."""

import csv
import json
import subprocess
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from testbed import data_sources
from testbed.data import DataSpec, PartitionSpec, check_same, load_data, split
from testbed.data_sources import DOCSTRING_CLASSES, alpaca_prompt
from testbed.docstrings import Docstring
from testbed.errors import DataError
from testbed.method import CAUSAL_LM

PAD, UNK, EOS = 0, 1, 2
COLOURS = ("red", "green", "blue", "grey")


def make_tokenizer(**special):
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<pad>", "<unk>", "<eos>", "<first>", "<last>"]
    trainer = trainers.BpeTrainer(
        special_tokens=specials, initial_alphabet=alphabet, vocab_size=300, show_progress=False
    )
    bpe.train_from_iterator(["the colour of the sky is blue"] * 4, trainer)
    if special.get("template"):
        bpe.post_processor = TemplateProcessing(
            single="<first> $A <last>", special_tokens=[("<first>", 3), ("<last>", 4)]
        )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": special.get("eos", "<eos>")}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=512, **names)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def rows(count=40):
    return [
        {
            "text": f"number {number} has the colour {COLOURS[number % 4]}",
            "label": COLOURS[number % 4],
            "id": f"u{number % 7}",
        }
        for number in range(count)
    ]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def write_csv(path, records):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return str(path)


def write_parquet(path, records):
    pq.write_table(pa.Table.from_pylist(records), path)
    return str(path)


@pytest.fixture
def colours(tmp_path, tokenizer):
    """40 texts in 4 classes from 7 users, 4 of them held out."""
    return load_data(DataSpec(write_jsonl(tmp_path / "colours.jsonl", rows())), tokenizer, tmp_path)


@pytest.fixture
def own_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hub-cache"))


# ── reading ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_every_format_gives_the_same_data(tmp_path, tokenizer, colours, own_hub_cache):
    names = [write_csv(tmp_path / "c.csv", rows()), write_parquet(tmp_path / "c.parquet", rows())]
    (tmp_path / "hub").mkdir()
    write_parquet(tmp_path / "hub" / "train.parquet", rows())
    names.append(f"hf:{tmp_path}/hub")  # the hub's own loader, on a folder
    for name in names:
        other = load_data(DataSpec(name), tokenizer, tmp_path)
        assert (other.sha256, other.train, other.held_out) == (colours.sha256, colours.train, colours.held_out)


def test_class_names_and_splits_of_the_hub_are_used(tmp_path, tokenizer, own_hub_cache):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    half = {"text": [f"text {number}" for number in range(6)], "label": [0, 1] * 3}
    test = {"text": ["other 1", "other 2"], "label": [1, 1]}
    sides = {"train": Dataset.from_dict(half, features), "test": Dataset.from_dict(test, features)}
    (tmp_path / "hub").mkdir()
    for side, table in sides.items():
        table.to_parquet(tmp_path / "hub" / f"{side}-00000-of-00001.parquet")
    dataset = load_data(DataSpec(f"hf:{tmp_path}/hub", held_out="test"), tokenizer, tmp_path)
    assert dataset.classes == ("no", "yes")
    assert [example.label for example in dataset.held_out] == [1, 1]


def test_columns_can_have_other_names(tmp_path, tokenizer, colours):
    renamed = [{"body": row["text"], "kind": row["label"], "user": row["id"]} for row in rows()]
    columns = {"text": "body", "label": "kind", "id": "user"}
    other = load_data(DataSpec(write_jsonl(tmp_path / "r.jsonl", renamed), columns=columns), tokenizer, tmp_path)
    assert other.sha256 == colours.sha256


def test_numbers_are_classes_in_their_order(tmp_path, tokenizer):
    records = [{"text": f"text {number}", "label": number % 12} for number in range(60)]
    dataset = load_data(DataSpec(write_jsonl(tmp_path / "n.jsonl", records)), tokenizer, tmp_path)
    assert dataset.classes == tuple(map(str, range(12)))


def test_alpacas_own_columns_need_no_mapping(tmp_path, tokenizer):
    """The data set that the template is named after calls the response `output`."""
    records = [{"instruction": f"say {i}", "input": "", "output": f"it is {i}"} for i in range(12)]
    own = write_jsonl(tmp_path / "own.jsonl", records)
    renamed = write_jsonl(
        tmp_path / "ours.jsonl", [{**each, "response": each["output"], "output": "not this"} for each in records]
    )
    ours, theirs = (
        load_data(DataSpec(path, CAUSAL_LM, template="alpaca", length=200), tokenizer, tmp_path)
        for path in (renamed, own)
    )
    assert [list(each.ids) for each in theirs.train] == [list(each.ids) for each in ours.train]


BAD = [
    ("nowhere.jsonl", None, {}, "there is no such file"),
    ("docstring", None, {}, "cannot be read: expected 'docstrings', a file"),
    ("notes.txt", "text", {}, "cannot be read: expected"),
    ("empty.jsonl", "", {}, "it holds no rows"),
    ("empty.csv", "text,label\n", {}, "it holds no rows"),
    ("one.jsonl", '{"text": "a", "label": "x"}\n', {}, "0 texts to train on"),
    ("broken.jsonl", '{"text": "a", "label": "x"}\n{"text": "b\n', {}, "line 2: not valid JSON"),
    ("list.jsonl", "[1]\n", {}, "line 1: expected an object"),
    ("latin.jsonl", b'{"text": "\xe9"}\n', {}, "UTF-8"),
    ("ragged.csv", "text,label\na,x\nb,y,z\n", {}, "line 3: expected 2 columns"),
    ("short.csv", "text,label\na\n", {}, "line 2: expected 2 columns"),
    ("no.parquet", "PAR1", {}, "not a Parquet file"),
    ("c.jsonl", '{"txt": "a", "label": "x"}\n', {}, "did you mean .txt.*name it with --data-set text=COLUMN"),
    ("c.jsonl", '{"text": "a", "label": "x"}\n', {"columns": {"text": "body"}}, "no column 'body' for 'text'"),
    ("c.jsonl", '{"text": "a", "label": "x"}\n', {"columns": {"txt": "text"}}, "'txt' is no column of data.*; did"),
    ("c.jsonl", '{"text": "a"}\n', {}, "no column 'label'"),
    ("c.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": null}\n', {}, "line 2: there is no label"),
    ("c.jsonl", '{"text": "a", "label": "x"}\n{"label": "x"}\n', {}, "line 2: expected text for 'text', got None"),
    ("c.jsonl", '{"text": 7, "label": "x"}\n', {}, "line 1: expected text for 'text', got 7"),
    ("c.jsonl", '{"text": "a", "label": "x"}\n' * 5, {}, "two classes or more"),
    ("c.jsonl", '{"text": "a"}\n', {"task": "translation"}, "task 'translation' does not exist"),
    ("c.jsonl", '{"text": "a"}\n', {"template": "alpaca"}, "a template needs the task 'causal_lm'"),
    ("c.jsonl", '{"text": "a"}\n', {"template": "alpacca", "task": CAUSAL_LM}, 'did you mean "alpaca"'),
    ("c.jsonl", '{"text": "a"}\n', {"held_out": 1.5}, "held_out: expected a share"),
    ("c.jsonl", '{"text": "a"}\n', {"length": 1}, "length: expected 2 or more, got 1"),
    ("c.jsonl", '{"text": "a"}\n', {"per_class": 0}, "per_class: expected 1 or more"),
    ("docstrings", None, {"columns": {"text": "body"}}, "for your own data"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "settings", "message"), BAD)
def test_bad_data_is_told_in_one_message(tmp_path, monkeypatch, tokenizer, name, content, settings, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        load_data(DataSpec(name, **settings), tokenizer, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_told_with_the_way_out(tmp_path):
    code = (
        "import testbed.data_sources as s\n"
        "try: s.read_rows(s.DataSpec('hf:owner/name'), None, print)\n"
        "except s.DataError as error: print(error)"
    )
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "the Hugging Face hub could not give it" in done.stdout
    assert "save it as a .jsonl" in done.stdout
    assert not done.stderr


# ── choosing ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_limits_and_shares_are_kept(tmp_path, tokenizer):
    name = write_jsonl(tmp_path / "c.jsonl", rows(80))
    dataset = load_data(DataSpec(name, held_out=0.25, per_class=3, held_out_limit=5), tokenizer, tmp_path)
    assert set(Counter(row.label for row in dataset.train_rows).values()) == {3}
    assert len(dataset.held_out) == 5
    assert len(load_data(DataSpec(name, limit=7), tokenizer, tmp_path).train) == 7


def test_held_out_comes_from_its_own_file_where_one_is_named(tmp_path, tokenizer):
    train, held_out = write_jsonl(tmp_path / "t.jsonl", rows(8)), write_jsonl(tmp_path / "h.jsonl", rows(4)[:3])
    said = []
    dataset = load_data(DataSpec(train, held_out=held_out), tokenizer, tmp_path, said.append)
    assert (len(dataset.train), len(dataset.held_out)) == (8, 3)
    assert dataset.record["held_out_texts_also_in_train"] == 3
    assert "3 of 3 held-out texts stand in the training data too" in said[-1]


def test_a_held_out_class_that_is_never_trained_is_refused(tmp_path, tokenizer):
    train = write_jsonl(tmp_path / "t.jsonl", rows(8))
    held_out = write_jsonl(tmp_path / "h.jsonl", [{"text": "odd", "label": "pink"}])
    with pytest.raises(DataError, match=r"\['pink'\] do not occur"):
        load_data(DataSpec(train, held_out=held_out), tokenizer, tmp_path)


def test_a_change_of_the_content_is_told(tmp_path, tokenizer, colours):
    check_same(colours, colours.sha256)
    changed = rows()
    changed[3]["text"] += "!"
    other = load_data(DataSpec(write_jsonl(tmp_path / "colours.jsonl", changed)), tokenizer, tmp_path)
    with pytest.raises(DataError, match="has changed since the run began"):
        check_same(other, colours.sha256)


def test_the_default_data_is_eight_packages_held_out_by_module(tmp_path, tokenizer, monkeypatch):
    texts = tuple(
        Docstring(package, f"m{number % 5}.py", number % 5 == 0, f"text {number} of {package}")
        for package in (*DOCSTRING_CLASSES, "numpy")
        for number in range(1500)
    )
    monkeypatch.setattr(data_sources, "load_docstrings", lambda _cache, _say: texts)
    for task in ("sequence_classification", CAUSAL_LM):
        dataset = load_data(DataSpec(task=task), tokenizer, tmp_path)
        train, held_out = Counter(r.label for r in dataset.train_rows), Counter(r.label for r in dataset.held_out_rows)
        assert train == dict.fromkeys(DOCSTRING_CLASSES, 1000)
        assert held_out == dict.fromkeys(DOCSTRING_CLASSES, 100)
        assert all("m0.py" not in row.id for row in dataset.train_rows)
    assert len(load_data(DataSpec(per_class=10), tokenizer, tmp_path).train) == 80


# ── tokens ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_texts_end_with_the_closing_token_also_when_cut(tmp_path, tokenizer, colours):
    assert all(example.ids[-1] == EOS for example in colours.train)
    short = load_data(DataSpec(write_jsonl(tmp_path / "s.jsonl", rows()), length=8), tokenizer, tmp_path)
    assert {len(example.ids) for example in short.train} == {8}
    assert all(example.ids[-1] == EOS for example in short.train)
    assert short.train[0].ids[:7] == colours.train[0].ids[:7]


def test_a_tokenizer_with_its_own_frame_is_left_alone(tmp_path):
    framed = make_tokenizer(template=True, eos=None)
    dataset = load_data(DataSpec(write_jsonl(tmp_path / "f.jsonl", rows()), length=8), framed, tmp_path)
    assert all((example.ids[0], example.ids[-1], len(example.ids)) == (3, 4, 8) for example in dataset.train)
    closing = make_tokenizer(template=True, eos="<last>")
    dataset = load_data(DataSpec(write_jsonl(tmp_path / "f.jsonl", rows())), closing, tmp_path)
    assert all(list(example.ids).count(4) == 1 for example in dataset.train)


def test_special_tokens_in_a_text_are_text(tmp_path, tokenizer):
    records = [{"text": f"<eos> and <pad> {number}", "label": str(number % 2)} for number in range(20)]
    dataset = load_data(DataSpec(write_jsonl(tmp_path / "s.jsonl", records)), tokenizer, tmp_path)
    assert all(PAD not in example.ids and list(example.ids).count(EOS) == 1 for example in dataset.train)


def test_instructions_take_loss_on_the_response_only(tmp_path, tokenizer):
    records = [{"instruction": f"Name {n}", "input": "x" if n % 2 else "", "response": f"It is {n}"} for n in range(20)]
    spec = DataSpec(write_jsonl(tmp_path / "i.jsonl", records), CAUSAL_LM, template="alpaca", length=512)
    dataset = load_data(spec, tokenizer, tmp_path)
    for row, example in zip(dataset.train_rows, dataset.train, strict=True):
        assert tokenizer.decode(example.ids[: example.loss_from]) == row.prompt
        assert tokenizer.decode(example.ids[example.loss_from :]) == f"{row.text}<eos>"
    assert {row.prompt for row in dataset.train_rows} <= {
        alpaca_prompt(record["instruction"], record["input"]) for record in records
    }
    shard = dataset.held_out_shard()
    assert (shard.batch([0], 512, PAD).labels != -100).sum() == shard.lengths[0] - dataset.held_out[0].loss_from


def test_instructions_longer_than_the_length_are_left_out_and_told(tmp_path, tokenizer):
    records = [{"instruction": "long " * (60 if n == 3 else 1), "response": f"It is {n}"} for n in range(40)]
    said = []
    spec = DataSpec(write_jsonl(tmp_path / "i.jsonl", records), CAUSAL_LM, template="alpaca", length=300)
    dataset = load_data(spec, tokenizer, tmp_path, said.append)
    assert len(dataset.train) + len(dataset.held_out) == 39
    assert "left out: nothing to learn within 300 tokens" in said[0]
    spec = DataSpec(spec.name, CAUSAL_LM, template="alpaca", length=20)
    with pytest.raises(DataError, match="within length 20; raise the length"):
        load_data(spec, tokenizer, tmp_path)


# ── division ───────────────────────────────────────────────────────────────────────────────────────────────────────
KINDS = [
    PartitionSpec("iid"),
    PartitionSpec("dirichlet", alpha=0.5),
    PartitionSpec("label", classes_per_client=2),
    PartitionSpec("natural"),
]


@pytest.mark.parametrize("partition", KINDS, ids=lambda spec: spec.kind)
def test_a_division_is_one_and_the_same_for_a_seed(colours, partition, capfd):
    divided = split(colours, partition, 4, seed=1)
    assert split(colours, partition, 4, seed=1) == divided
    assert split(colours, partition, 4, seed=2).shards != divided.shards
    places = [place for shard in divided.shards for place in shard]
    assert len(places) == len(set(places))
    assert len(places) + divided.record["unused_examples"] == len(colours.train)
    assert divided.record["examples"] == [len(shard) for shard in divided.shards]
    assert min(divided.record["examples"]) > 0
    json.dumps(divided.record)
    assert capfd.readouterr() == ("", "")


def test_shards_are_what_their_kind_says(colours):
    iid = split(colours, PartitionSpec("iid"), 4, 0)
    assert sorted(iid.record["examples"]) == [9, 9, 9, 9]
    by_label = split(colours, PartitionSpec("label", classes_per_client=1), 4, 0)
    assert [len(labels) for labels in by_label.record["labels"]] == [1, 1, 1, 1]
    natural = split(colours, PartitionSpec("natural"), 3, 0)
    owners = [{colours.train_rows[place].id for place in shard} for shard in natural.shards]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 7
    even, uneven = (split(colours, PartitionSpec("dirichlet", alpha), 2, 0).record for alpha in (1000.0, 0.1))
    assert max(even["examples"]) < max(uneven["examples"])


def test_unused_classes_stand_in_the_record(colours):
    record = split(colours, PartitionSpec("label", classes_per_client=1), 2, 0).record
    assert len(record["unused_labels"]) == 2
    assert record["unused_examples"] > 0


@pytest.mark.parametrize(
    ("partition", "clients", "message"),
    [
        (PartitionSpec("iid"), 37, "36 training examples cannot be divided among 37 clients; use fewer clients"),
        (PartitionSpec("iid"), 0, "at least one client"),
        (PartitionSpec("even"), 4, "partition 'even' does not exist"),
        (PartitionSpec("dirichlet", alpha=0.0), 4, "an alpha above 0"),
        (PartitionSpec("dirichlet", alpha=0.01), 30, "fewer clients, a larger alpha"),
        (PartitionSpec("label", classes_per_client=5), 4, "5 classes per client were asked for, the data has 4"),
        (PartitionSpec("label", classes_per_client=4), 20, "fewer clients"),
        (PartitionSpec("natural"), 8, "7 different ids for 8 clients"),
    ],
)
def test_a_division_that_cannot_be_is_refused_with_the_way_out(colours, partition, clients, message):
    with pytest.raises(DataError, match=message):
        split(colours, partition, clients, 0)


@pytest.mark.parametrize(("kind", "word"), [("dirichlet", "label"), ("label", "label"), ("natural", "id")])
def test_what_a_division_needs_is_named(tmp_path, tokenizer, kind, word):
    texts = [{"text": f"text {number}"} for number in range(20)]
    dataset = load_data(DataSpec(write_jsonl(tmp_path / "t.jsonl", texts), CAUSAL_LM), tokenizer, tmp_path)
    with pytest.raises(DataError, match=f"--data-set {word}=COLUMN"):
        split(dataset, PartitionSpec(kind), 2, 0)


def test_a_client_gets_its_own_examples(colours):
    divided = split(colours, PartitionSpec("dirichlet"), 3, 0)
    shards = [colours.shard(indices) for indices in divided.shards]
    assert [sum(shard.label_counts) for shard in shards] == divided.record["examples"]
    held = colours.only(divided.shards[0] + divided.shards[1])
    assert len(held.train) == len(shards[0]) + len(shards[1])
    assert held.held_out == colours.held_out
    assert held.sha256 != colours.sha256


def test_dividing_reaches_for_no_network():
    code = """
import sys
from testbed.data_sources import Row
from testbed.partition import PARTITIONS, PartitionSpec, divide
reached = []
sys.addaudithook(lambda event, args: event in ("socket.connect", "socket.getaddrinfo") and reached.append(args))
rows = [Row(f"text {n}", label=str(n % 4), id=str(n % 5)) for n in range(40)]
for kind in PARTITIONS:
    divide(rows, PartitionSpec(kind), 4, 0)
import flwr_datasets.common.telemetry as telemetry
print(reached, telemetry.FLWR_TELEMETRY_ENABLED)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] 0"


def test_a_limit_beside_a_share_per_class_leaves_every_class_its_part():
    from testbed.data import _choose
    from testbed.data_sources import Row

    rows = [Row(f"text {index}", label="common" if index % 10 else "rare") for index in range(2000)]
    chosen = _choose(rows, 100, 100)
    counts = {label: sum(row.label == label for row in chosen) for label in ("common", "rare")}
    assert sum(counts.values()) == 100
    assert min(counts.values()) >= 30
