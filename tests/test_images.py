"""Images as data: what is read, held out, resized, scaled and written, and what is told when it cannot be."""

import json
from collections import Counter

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import save_file

from testbed import prepare
from testbed.baselines import BAG_OF_WORDS, MAJORITY_CLASS, baselines
from testbed.commands._options import learning_options
from testbed.data import DataSpec, PartitionSpec, check_same, load_data, load_images, split
from testbed.errors import DataError, ModelError, WireError
from testbed.method import CAUSAL_LM, IMAGE_CLASSIFICATION, SEQUENCE_CLASSIFICATION, Submodel, Workload
from testbed.model.checkpoint import BaseModel, ContentStore
from testbed.model.submodel import build
from testbed.options import data_settings
from testbed.prepare import RESNET, VIT, model_folder
from testbed.run import RunConfig
from testbed.task import Example, Scale, Shard, batch_indices, blank_batch, evaluate_batches, loss, write_shard

SHAPE = (3, 8, 8)


def spec(name="digits", **more):
    return DataSpec(str(name), IMAGE_CLASSIFICATION, **more)


@pytest.fixture(scope="module")
def digits():
    return load_images(spec(), SHAPE)


def write(path, *colour, size=(6, 4), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour if len(colour) > 1 else colour[0]).save(path)


@pytest.fixture
def folder(tmp_path):
    """Ten red and ten blue images, each a little different, in every format."""
    for index in range(10):
        write(tmp_path / "own" / "red" / f"{index}.png", 250, index, 0)
        write(tmp_path / "own" / "blue" / f"{index}.JPG", 0, index, 250)
    (tmp_path / "own" / "red" / "notes.txt").write_text("no image")
    (tmp_path / "own" / ".cache").mkdir()
    return tmp_path / "own"


# ── digits ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_digits_are_as_they_come_with_their_grey_in_every_channel(digits):
    from sklearn.datasets import load_digits

    assert digits.classes == tuple("0123456789")
    assert (len(digits.train), len(digits.held_out)) == (1617, 180)
    theirs = load_digits().images
    for row, example in list(zip(digits.train_rows, digits.train, strict=True))[::400]:
        wanted = np.round(theirs[int(row.id)] * 255 / 16)
        assert all(np.array_equal(channel, wanted) for channel in example.pixels)
        assert row.label == digits.classes[example.label]


def test_digits_become_as_large_as_the_model_asks(digits):
    large = load_images(spec(), (1, 32, 32))
    assert {example.pixels.shape for example in large.train} == {(1, 32, 32)}
    # The mean of each digit stays: between the pixels the grey is linear.
    small_means = [example.pixels[0].mean() for example in digits.train]
    assert [example.pixels.mean() for example in large.train] == pytest.approx(small_means, abs=8)
    assert large.sha256 == digits.sha256


def test_what_is_held_out_and_chosen_does_not_change(digits):
    assert load_images(spec(), SHAPE).sha256 == digits.sha256
    few = load_images(spec(per_class=5, held_out_limit=20), SHAPE)
    assert Counter(row.label for row in few.train_rows) == dict.fromkeys(digits.classes, 5)
    assert len(few.held_out) == 20
    assert {row.id for row in few.held_out_rows} < {row.id for row in digits.held_out_rows}
    check_same(few, few.sha256)
    with pytest.raises(DataError, match="has changed since the run began"):
        check_same(few, digits.sha256)


def test_the_scale_is_that_of_the_training_images_and_recorded(digits):
    stacked = np.stack([example.pixels for example in digits.train]) / 255
    assert digits.record["mean"] == pytest.approx(stacked.mean((0, 2, 3)).tolist())
    assert digits.record["std"] == pytest.approx(stacked.std((0, 2, 3)).tolist())
    assert digits.record["image_shape"] == [3, 8, 8]
    assert json.loads(json.dumps(digits.record))["held_out_images_also_in_train"] == 0
    shard = digits.shard(range(len(digits.train)))
    whole = shard.batch(range(len(shard)), 1, 0).pixel_values
    assert whole.mean().item() == pytest.approx(0, abs=1e-4)
    assert whole.std().item() == pytest.approx(1, abs=1e-4)
    assert np.array_equal(digits.held_out_shard().mean, shard.mean)


@pytest.mark.parametrize("partition", [PartitionSpec("iid"), PartitionSpec("dirichlet", 0.3), PartitionSpec("label")])
def test_images_are_divided_as_texts_are(digits, partition):
    parts = split(digits, partition, 5, seed=3)
    shards = [digits.shard(part) for part in parts.shards]
    assert sum(map(len, shards)) == len(digits.train) - parts.record["unused_examples"]
    assert split(digits, partition, 5, seed=3).shards == parts.shards
    if partition.kind == "label":
        assert [sum(count > 0 for count in shard.label_counts) for shard in shards] == [2] * 5


def test_images_have_no_users_to_be_divided_by(digits):
    with pytest.raises(DataError, match="use iid, dirichlet or label"):
        split(digits, PartitionSpec("natural"), 4, seed=0)


def test_the_majority_class_is_the_only_baseline(digits, tmp_path):
    known = {baseline.name: baseline for baseline in baselines(digits, 0, tmp_path)}
    assert BAG_OF_WORDS not in known
    assert 0.05 < known[MAJORITY_CLASS].accuracy < 0.15


# ── a folder ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_folder_has_a_class_for_each_of_its_folders(folder):
    found = load_images(spec(folder), SHAPE)
    assert found.classes == ("blue", "red")
    assert (len(found.train), len(found.held_out)) == (18, 2)
    for row, example in zip(found.train_rows, found.train, strict=True):
        red, _, blue = example.pixels.mean((1, 2))
        assert (row.label == "red") == (red > 200 > blue)
        assert (folder / row.id).is_file()


def test_another_folder_may_be_held_out_and_copies_are_told(folder, tmp_path):
    write(tmp_path / "judged" / "red" / "new.png", 255, 99, 0)
    (tmp_path / "judged" / "blue").mkdir()
    (tmp_path / "judged" / "blue" / "same.jpg").write_bytes((folder / "blue" / "3.JPG").read_bytes())
    said = []
    found = load_images(spec(folder, held_out=str(tmp_path / "judged")), SHAPE, said.append)
    assert (len(found.train), len(found.held_out)) == (20, 2)
    assert found.record["held_out_images_also_in_train"] == 1
    assert said == ["1 of 2 held-out images stand in the training data too, byte for byte"]


def test_colours_and_sides_are_what_the_model_asks_for(folder):
    write(folder / "red" / "grey.png", 100, mode="L")
    write(folder / "blue" / "palette.png", 3, mode="P")
    write(folder / "blue" / "clear.png", 0, 0, 250, 10, mode="RGBA")
    for channels in (1, 3, 4):
        found = load_images(spec(folder), (channels, 5, 7))
        assert {example.pixels.shape for example in found.train} == {(channels, 5, 7)}
    with pytest.raises(DataError, match="images of 2 channels"):
        load_images(spec(folder), (2, 5, 7))


def test_an_image_is_turned_as_its_camera_says(folder):
    image = Image.new("RGB", (8, 4), (250, 0, 0))
    image.paste((0, 0, 250), (0, 0, 4, 4))
    turned = Image.Exif()
    turned[274] = 6  # orientation: to be turned by 90° clockwise
    for name in ("red/0.png", "red/1.png"):
        image.save(folder / name, exif=turned)
    found = load_images(spec(folder), (3, 8, 4))
    at = next(i for i, row in enumerate(found.train_rows) if row.id in {"red/0.png", "red/1.png"})
    assert found.train[at].pixels[2, 0].min() > 200
    assert found.train[at].pixels[2, -1].max() < 50


def break_one(folder):
    (folder / "red" / "broken.png").write_bytes((folder / "red" / "1.png").read_bytes()[:40])


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (break_one, {"held_out": 0.01}, r"broken\.png': not a readable image"),
        (lambda f: write(f / "red" / "deep.png", 60000, mode="I;16"), {"held_out": 0.01}, "mode I.*expected 8 bits"),
        (
            lambda f: f.joinpath("red").rename(f.parent / "gone"),
            {},
            r"two classes or more.*\['blue'\]; check the folders",
        ),
        (lambda f: None, {"columns": {"text": "body"}}, "columns and template are for texts"),
        (lambda f: None, {"held_out": "nowhere"}, "'nowhere': .*one folder of images for each class"),
        (lambda f: None, {"limit": 0}, "limit: expected 1 or more"),
    ],
)
def test_a_folder_that_cannot_serve_is_told(folder, change, settings, message):
    change(folder)
    with pytest.raises(DataError, match=message):
        load_images(spec(folder, **settings), SHAPE)


def test_a_folder_without_class_folders_and_classes_unknown_to_training_are_told(folder, tmp_path):
    with pytest.raises(DataError, match="FOLDER/CLASS/IMAGE"):
        load_images(spec(folder / "red"), SHAPE)
    write(tmp_path / "judged" / "green" / "1.png", 0, 250, 0)
    with pytest.raises(DataError, match=r"held-out classes \['green'\] do not occur in the training images"):
        load_images(spec(folder, held_out=str(tmp_path / "judged")), SHAPE)


# ── texts and images do not mix ────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", ["docstrings", "texts.jsonl", "hf:someone/something"])
def test_texts_are_no_images(name):
    with pytest.raises(DataError, match="needs 'digits', or a folder"):
        load_images(spec(name), SHAPE)


def test_images_are_no_texts(folder, tmp_path):
    for name in ("digits", str(folder)):
        with pytest.raises(DataError, match="--task image_classification"):
            load_data(DataSpec(name), None, tmp_path)


class Images:
    default_task = IMAGE_CLASSIFICATION


class Texts:
    default_task = SEQUENCE_CLASSIFICATION


@pytest.mark.parametrize(
    ("method", "given", "task", "model", "data"),
    [
        (Texts, {}, SEQUENCE_CLASSIFICATION, "quickstart", "docstrings"),
        (Texts, {"task": CAUSAL_LM}, CAUSAL_LM, "quickstart", "docstrings"),
        (Images, {}, IMAGE_CLASSIFICATION, "resnet", "digits"),
        (Images, {"model": "vit", "data": {"name": "photos", "limit": 3}}, IMAGE_CLASSIFICATION, "vit", "photos"),
        (Texts, {"task": IMAGE_CLASSIFICATION}, IMAGE_CLASSIFICATION, "resnet", "digits"),
        (Images, {"task": SEQUENCE_CLASSIFICATION}, SEQUENCE_CLASSIFICATION, "quickstart", "docstrings"),
    ],
)
def test_what_is_left_open_is_the_methods_and_the_tasks_own(method, given, task, model, data):
    settled, own_task, folder = prepare._settled(RunConfig("some", **given), method())
    assert (settled.task, settled.model, settled.data["name"]) == (task, model, data)
    assert own_task == task
    assert (folder / "config.json").is_file()
    assert {**given.get("data", {}), "name": data} == settled.data


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        ("quickstart", IMAGE_CLASSIFICATION, "no image_classification model for type 'llama'"),
        (VIT, SEQUENCE_CLASSIFICATION, "no sequence_classification model for type 'vit'"),
        (RESNET, CAUSAL_LM, "no causal_lm model for type 'resnet'"),
    ],
)
def test_a_model_is_for_its_own_task_and_that_is_told_before_data_are_read(model, task, message):
    with pytest.raises(ModelError, match=message):
        prepare._load(RunConfig("some", data={"name": "nowhere"}), task, model_folder(model), lambda _: None)


def test_data_come_as_the_model_takes_them():
    found = prepare._load(
        RunConfig("some", data=data_settings("digits", ["per_class=2"])),
        IMAGE_CLASSIFICATION,
        model_folder(RESNET),
        lambda _: None,
    )
    assert found.train[0].pixels.shape == (3, 32, 32)
    assert len(found.train) == 20


def test_options_leave_to_the_method_what_nobody_says():
    @click.command()
    @learning_options
    def command(**given):
        print(json.dumps(given))

    run = CliRunner().invoke
    assert json.loads(run(command, []).output) == {"model": None, "task": None, "data_name": None}
    given = run(command, ["--task", IMAGE_CLASSIFICATION, "--data", "digits", "--model", "vit"])
    assert json.loads(given.output) == {"model": "vit", "task": IMAGE_CLASSIFICATION, "data_name": "digits"}
    assert "name" not in data_settings(None, ["limit=3"])


# ── shards and batches ─────────────────────────────────────────────────────────────────────────────────────────────
def examples(count=3, shape=(2, 4, 5)):
    draw = np.random.default_rng(0)
    return [Example(label=index % 2, pixels=draw.integers(0, 256, shape, np.uint8)) for index in range(count)]


def test_a_shard_of_images_comes_back_as_it_was_written(tmp_path):
    images = examples()
    digest = write_shard(tmp_path / "shard", images, IMAGE_CLASSIFICATION, 2)
    shard = Shard.open(tmp_path / "shard")
    assert (len(shard), shard.task, shard.labels, shard.label_counts) == (3, IMAGE_CLASSIFICATION, 2, (2, 1))
    assert (shard.tokens, shard.lengths) == (3, [1, 1, 1])
    assert np.array_equal(shard.pixel_values, np.stack([image.pixels for image in images]))
    assert write_shard(tmp_path / "again", images, IMAGE_CLASSIFICATION, 2) == digest
    (tmp_path / "shard").write_bytes(b"\0" * 10)
    assert shard.pixel_values.any()  # private memory


def test_a_batch_is_scaled_and_goes_to_a_device_whole():
    images, scale = examples(), Scale((0.5, 0.25), (2.0, 0.5))
    batch = Shard.of(images, IMAGE_CLASSIFICATION, 2, scale).batch([2, 0], 128, 0)
    for found, image in zip(batch.pixel_values, (images[2], images[0]), strict=True):
        bright = torch.from_numpy(image.pixels).double() / 255
        wanted = torch.stack([(bright[0] - 0.5) / 2, (bright[1] - 0.25) / 0.5])
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    assert batch.pixel_values.dtype == torch.float32
    assert (batch.labels.tolist(), batch.tokens) == ([0, 0], 2)
    moved = batch.to("meta")
    assert moved.pixel_values.is_meta
    assert moved.labels.is_meta
    assert moved.input_ids is None


def test_a_channel_that_never_changes_is_not_divided_by_zero():
    black = np.zeros((1, 2, 2), np.uint8)
    assert Scale.of([black, black]) == Scale((0.0,), (1.0,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "at least one example"),
        ([Example(label=0)], "example 0 has no pixels"),
        ([*examples(1), Example(label=0, pixels=np.zeros((2, 5, 4), np.uint8))], "example 1 has the shape"),
        ([Example(label=2, pixels=np.zeros((2, 5, 4), np.uint8))], "label 2 is not one of the 2 classes"),
    ],
)
def test_what_is_no_shard_of_images_is_not_written(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        write_shard(tmp_path / "shard", changes, IMAGE_CLASSIFICATION, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": np.zeros((2, 1, 3, 3), np.float32)}, "uint8 images"),
        ({"pixel_values": np.zeros((2, 3, 3), np.uint8)}, "uint8 images"),
        ({"pixel_values": np.zeros((0, 1, 3, 3), np.uint8)}, "uint8 images"),
        ({"mean": np.zeros(2, np.float32)}, "1 channels"),
        ({"mean": np.full(1, np.nan, np.float32)}, "1 channels"),
        ({"std": np.zeros(1, np.float32)}, "1 channels"),
        ({"std": None}, "missing or wrong"),
        ({"labels": np.zeros(3, np.int64)}, "2 examples, but 3 labels"),
        ({"labels": np.array([0, 2], np.int64)}, "out of range"),
    ],
)
def test_a_file_whose_arrays_do_not_belong_together_is_refused(tmp_path, changes, message):
    whole = {
        "pixel_values": np.zeros((2, 1, 3, 3), np.uint8),
        "labels": np.array([0, 1], np.int64),
        "mean": np.zeros(1, np.float32),
        "std": np.ones(1, np.float32),
    }
    about = {"shard": json.dumps({"format": 1, "task": IMAGE_CLASSIFICATION, "labels": 2})}
    kept = {name: array for name, array in {**whole, **changes}.items() if array is not None}
    save_file(kept, tmp_path / "shard", metadata=about)
    with pytest.raises(WireError, match=message):
        Shard.open(tmp_path / "shard")


def test_a_blank_batch_has_the_form_of_a_real_one(digits):
    real = digits.shard(range(4)).batch(range(4), 1, 0)
    blank = blank_batch(IMAGE_CLASSIFICATION, 4, 1, SHAPE)
    assert (blank.pixel_values.shape, blank.pixel_values.dtype) == (real.pixel_values.shape, real.pixel_values.dtype)
    assert (blank.labels.shape, blank.labels.dtype) == (real.labels.shape, real.labels.dtype)
    assert blank_batch(SEQUENCE_CLASSIFICATION, 2, 5).attention_mask.shape == (2, 5)
    assert blank_batch(SEQUENCE_CLASSIFICATION, 1, 5).attention_mask is None
    assert blank_batch(CAUSAL_LM, 2, 5).labels.shape == (2, 5)


# ── learning ───────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def one_thread():
    """Models this small lose more by waiting for threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "side", "rate", "steps"), [(RESNET, 32, 3e-3, 60), (VIT, 8, 1e-3, 110)])
def test_digits_are_learned_from_scratch(tmp_path, one_thread, name, side, rate, steps):
    data = load_images(spec(), (3, side, side))
    base = BaseModel.open(model_folder(name), ContentStore(tmp_path), IMAGE_CLASSIFICATION, 10)
    work = Workload(IMAGE_CLASSIFICATION, 10)
    built = build(base.config, base.fill_in(Submodel.first(4)), base.store.path, base.outside, work, seed=0)
    parameters = list(built.model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    descent = torch.optim.AdamW(parameters, lr=rate)
    shard = data.shard(range(len(data.train)))
    for step in range(steps):
        rows = batch_indices(len(shard), 32, 0, 0, 0, step)
        loss(built.model, shard.batch(rows, 1, 0), IMAGE_CLASSIFICATION).backward()
        descent.step()
        descent.zero_grad()
    assert evaluate_batches(built.model, data.held_out_shard(), 64, 1, 0).accuracy > 0.7
