"""ScaleFL: which stage is trained when, from which versions its blocks come, its loss, and what is left at the end."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn.functional import one_hot
from transformers import AutoModelForImageClassification

from methods.scalefl import ScaleFL, version
from testbed.errors import UsageError
from testbed.method import MAPPED, SEQUENCE_CLASSIFICATION, Submodel
from testbed.model import blocks
from testbed.model.dependence import nhsic
from testbed.model.footprint import Baseline, predict
from testbed.model.output_module import OUTPUT_MODULE, last_map, names_behind
from testbed.model.submodel import build
from testbed.model.whole import whole, whole_tensors
from testbed.prepare import RESNET as BUNDLED
from testbed.prepare import VIT, model_folder
from testbed.rounds import federate
from testbed.task import Shard
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import BLOCKS, IMAGES, RESNET, base_model, given, run_of
from tests.model import tiny
from tests.reference import scalefl
from tests.reference.driver import data_of, finished, float64_run, largest_difference, rates_of, started

T = BLOCKS
LAMBDA1, LAMBDA2 = (0.8, 0.5, 0.3, 0.1), (0.1, 0.2, 0.4, 0.6)
SHORT = {"clients": 2, "steps": 1, "evaluate_every": 100}
STAGES = "resnet.encoder.stages"


def shape_of(folder):
    return base_model(folder, task=IMAGES.task).shape


def configure(folder, config):
    """Make this the configuration of the image model in the folder."""
    (folder / "images").mkdir()
    (folder / "images" / "config.json").write_text(json.dumps(config))


# ── against the reference ──────────────────────────────────────────────────────────────────────────────────────────
def as_reference(tensors, stage):
    """A version's tensors under the reference's names, in which stages are counted from 0."""
    named = {}
    for name, tensor in tensors.items():
        own = name.replace(f"{OUTPUT_MODULE}.projection", "output.projection")
        if name.startswith(f"{OUTPUT_MODULE}.stand_ins."):
            own = f"output.convolutions.{int(name.split('.')[2]) - 1}.weight"
        if stage < T:
            own = own.replace("classifier.1.", "output.head.")
        named[own] = tensor
    return named


def versions_of(state):
    """Every stage's version under the reference's names."""
    return {stage - 1: as_reference(version(state.tensors, stage), stage) for stage in range(1, T + 1)}


def output_modules(versions):
    return {
        stage: {name: tensor for name, tensor in tensors.items() if name.startswith("output.")}
        for stage, tensors in versions.items()
    }


def difference(folder, mutation=None):
    """How far every stage's version is from the reference's after a turn and a half, on stages of one and two units."""
    configure(folder, {**RESNET, "depths": [1, 2, 2, 1]})
    method = ScaleFL(lambda1=LAMBDA1, lambda2=LAMBDA2)
    run = float64_run(method, folder, rounds=6)
    begun = versions_of(started(run))
    expected = scalefl.run(
        {name: tensor for name, tensor in begun[T - 1].items() if not name.startswith("output.")},
        output_modules(begun), data_of(run), run.config.rounds, lambdas=list(zip(LAMBDA1, LAMBDA2, strict=True)),
        learning_rates=[method.rate_scale * rate for rate in rates_of(run)], mutation=mutation,
    )  # fmt: skip
    found = versions_of(finished(run))
    return max(largest_difference(found[stage], expected[stage]) for stage in range(T))


def test_six_rounds_give_what_the_reference_gives(tmp_path):
    assert difference(tmp_path) < 1e-5


def test_a_reference_that_seeks_less_dependence_is_told_apart(tmp_path):
    assert difference(tmp_path, mutation="less_dependence") > 1e-3


# ── the loss ───────────────────────────────────────────────────────────────────────────────────────────────────────
def features(rows, width, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_nhsic_of_features_with_themselves_is_one_and_with_others_less():
    x, y = features(12, 30), features(12, 5, seed=1)
    assert nhsic(x, x, 5.0).item() == pytest.approx(1, abs=1e-5)
    assert nhsic(x, 3.0 * x, 5.0).item() > 0.98
    assert 0 < nhsic(x, y, 5.0).item() < 0.9
    assert nhsic(x, y, 5.0).item() == pytest.approx(scalefl.nhsic(x.double(), y.double()).item(), abs=1e-5)


def test_features_that_all_look_alike_have_small_but_true_differences():
    x, y = features(12, 30), features(12, 5, seed=1)
    nearly = 1.0 + 1e-3 * x  # in float32 a kernel of these is 1 to its last digit
    assert nhsic(nearly, y, 5.0).item() == pytest.approx(nhsic(1e-3 * x.double(), y.double(), 5.0).item(), abs=1e-3)


@pytest.mark.parametrize("rows", [1, 6])
def test_nhsic_with_what_does_not_vary_is_zero_and_has_a_gradient(rows):
    x = features(rows, 4).requires_grad_()
    same = one_hot(torch.full((rows,), 2), 3).float()
    value = nhsic(x, same, 5.0)
    value.backward()
    assert value.item() == 0.0
    assert bool((x.grad == 0).all())


def stage_model(run, stage):
    """The model with which a stage begins, ready to train, and its outfit."""
    own = version(started(run).tensors, stage)
    depth = run.method.depths(run.base.shape)[stage - 1]
    built = whole(run.base.config, Submodel.first(depth), run.work, own, lambda _: False)
    outfit = run.method.stage_outfit(stage, built.shape)
    outfit.mount(built)
    built.fill({name: tensor for name, tensor in own.items() if name.startswith(f"{OUTPUT_MODULE}.")})
    return built, outfit


def first_batch(run, rows=8):
    return Shard.open(run.store.path(run.shards[0])).batch(range(rows), run.work.length, 0)


def test_what_is_descended_is_the_task_less_what_feature_and_projection_tell(tmp_path):
    run = run_of(ScaleFL(lambda1=LAMBDA1, lambda2=LAMBDA2), tmp_path, **SHORT)
    (built, outfit), batch = stage_model(run, 3), first_batch(run)
    passed = {}
    built.model.resnet.pooler.register_forward_hook(lambda _, inputs, __: passed.update(feature=inputs[0]))
    projection = built.model.get_submodule(OUTPUT_MODULE).projection
    projection[2].register_forward_hook(lambda _, __, output: passed.update(projected=output))
    value = outfit.loss(built, batch)
    assert passed["feature"].shape == (8, 16, 1, 1)
    about_input = scalefl.nhsic(passed["feature"].flatten(1), batch.pixel_values.flatten(1))
    about_label = scalefl.nhsic(passed["projected"], one_hot(batch.labels, 4).float())
    expected = built.loss(batch) - 0.3 * about_input - 0.4 * about_label
    assert value.item() == pytest.approx(expected.item(), abs=1e-4)


# ── stages ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def home_of(name):
    """The stage to which a tensor of a ResNet belongs; None: to every version its own."""
    if name.startswith("resnet.embedder"):
        return 1
    return int(name.split(".")[3]) + 1 if name.startswith(STAGES) else None


def marked(state, trained):
    """Every version's tensors filled with its stage's number, each last trained in the given round."""
    tensors = {name: torch.full_like(tensor, int(name[5])) for name, tensor in state.tensors.items()}
    return replace(state, tensors=tensors, scalars={**state.scalars, "trained": trained})


def loaded(run, trained, round_index):
    """From which stage's version the parts of a stage come when its round begins; "own" is its output module."""
    begun = run.method.begin(marked(started(run), trained), run.base, round_index)
    found = version(begun.tensors, begun.scalars["stage"])
    sources = {(home_of(name) or "own", tensor.flatten()[0].item()) for name, tensor in found.items()}
    assert len(dict(sources)) == len(sources)  # no part comes from two versions
    return dict(sources)


def test_blocks_come_from_the_versions_that_the_paper_names(tmp_path):
    run = run_of(ScaleFL(), tmp_path, rounds=12, **SHORT)
    assert loaded(run, [4, 5, 6, 7], 8) == {"own": 1, 1: 4}
    assert loaded(run, [8, 5, 6, 7], 9) == {"own": 2, 1: 1, 2: 4}
    assert loaded(run, [8, 9, 6, 7], 10) == {"own": 3, 1: 2, 2: 2, 3: 4}
    assert loaded(run, [8, 9, 10, 7], 11) == {"own": 4, 1: 3, 2: 3, 3: 3, 4: 4}


def test_what_was_never_trained_replaces_nothing_that_was(tmp_path):
    run = run_of(ScaleFL(), tmp_path, rounds=12, **SHORT)
    assert loaded(run, [4, 5, -1, -1], 8) == {"own": 1, 1: 2}
    assert loaded(run, [8, 5, -1, -1], 9) == {"own": 2, 1: 1, 2: 2}
    assert loaded(run, [8, -1, -1, 3], 9) == {"own": 2, 1: 1, 2: 4}


@pytest.mark.parametrize(
    ("growth", "stages"), [("round_robin", [1, 2, 3, 4, 1, 2]), ("progressive", [1, 2, 2, 3, 4, 4])]
)
def test_which_stage_a_round_trains(growth, stages, tmp_path):
    run = run_of(ScaleFL(growth=growth), tmp_path, rounds=6, **SHORT)
    federate(run)
    assert run.engine.phases == [f"stage {stage}" for stage in stages for _ in range(2)]
    assert [len(job.submodel.blocks) for job in run.engine.jobs] == [stage for stage in stages for _ in range(2)]


def test_a_stage_that_goes_on_begins_with_what_it_had(tmp_path):
    run = run_of(ScaleFL(growth="progressive"), tmp_path, rounds=12, **SHORT)
    assert loaded(run, [2, 4, -1, -1], 5) == {"own": 2, 1: 2, 2: 2}


def test_stage_t_trains_its_block_its_output_module_and_the_last_convolution_before(tmp_path):
    run = run_of(ScaleFL(), tmp_path, rounds=4, **SHORT)
    before, after = started(run), federate(run)
    sent = {result.round + 1: {spec.name for spec in result.tensors} for result in run.folder.results()}
    for stage, names in sent.items():
        own = version(before.tensors, stage)
        coupled = f"{STAGES}.{stage - 2}.layers.0.layer.1."
        expected = {
            name for name in own if home_of(name) in {stage, None} or name.startswith(coupled) or ".running_" in name
        }
        assert names == {f"stage{stage}.{name}" for name in expected}
        assert all(not torch.equal(after.tensors[name], before.tensors[name]) for name in names)


def test_blocks_before_are_frozen_but_their_statistics_move(tmp_path):
    run = run_of(ScaleFL(), tmp_path, rounds=3, **SHORT)
    tensors = federate(run).tensors
    frozen = "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"
    running = "resnet.encoder.stages.0.layers.0.layer.0.normalization.running_var"
    assert torch.equal(tensors[f"stage1.{frozen}"], tensors[f"stage3.{frozen}"])
    assert not torch.equal(tensors[f"stage2.{running}"], tensors[f"stage3.{running}"])


def test_a_device_takes_part_in_the_stages_that_it_can_do_and_the_deepest_is_evaluated(tmp_path):
    run = given(run_of(ScaleFL(), tmp_path, rounds=6, **SHORT), [Submodel.first(1), Submodel.first(2)])
    state = federate(run)
    assert [(job.round, job.client) for job in run.engine.jobs] == [(0, 0), (0, 1), (1, 1), (4, 0), (4, 1), (5, 1)]
    assert state.scalars["trained"] == [4, 5, -1, -1]
    [snapshot] = run.method.snapshots(state, run.base)
    assert snapshot.submodel == Submodel.first(2)
    assert f"{OUTPUT_MODULE}.stand_ins.4.weight" in snapshot.tensors


def test_phases_are_the_stages_that_a_choice_can_do(tmp_path):
    shape, method = shape_of(tmp_path), ScaleFL()
    sizes = {len(choice.blocks): method.phases(choice, shape, IMAGES) for choice in method.choices(shape)}
    assert list(sizes) == [4, 3, 2, 1]
    assert [phase.name for phase in sizes[3]] == ["stage 1", "stage 2", "stage 3"]
    assert [phase.writable for phase in sizes[4]] == [(0,), (1,), (2,), (3,)]


def test_what_a_stage_holds_is_predicted(tmp_path):
    shape, method = shape_of(tmp_path), ScaleFL()
    predicted = predict(method.phases(Submodel.first(T), shape, IMAGES), shape, IMAGES, Baseline(0)).phases
    run = run_of(method, tmp_path, **SHORT)
    for stage, phase in enumerate(predicted, start=1):
        built, _ = stage_model(run, stage)
        held = sum(parameter.nbytes for parameter in built.model.parameters())
        trained = sum(parameter.nbytes for parameter in built.trainable().values())
        assert phase.parts["weights"] + phase.parts["outside"] + phase.parts["adapters"] == held
        assert phase.parts["optimizer"] == trained


# ── the result ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_last_stage_is_the_network_itself(tmp_path):
    run = run_of(ScaleFL(), tmp_path, rounds=4, **SHORT)
    state = federate(run)
    [snapshot] = run.method.snapshots(state, run.base)
    assert snapshot.submodel == Submodel.first(T)
    assert not [name for name in snapshot.tensors if "stand_ins" in name]
    run.method.export(state, run.base, run.work, tmp_path / "export")
    exported = AutoModelForImageClassification.from_pretrained(tmp_path / "export").eval()
    assert not [name for name in exported.state_dict() if OUTPUT_MODULE in name]
    built = build(
        run.base.config, run.base.fill_in(snapshot.submodel), run.store.path, run.base.outside, IMAGES, seed=0
    )
    run.method.mount(built, snapshot.tensors)
    pixels = torch.randn(3, 3, 16, 16)
    assert torch.equal(exported(pixel_values=pixels).logits, built.model.eval()(pixel_values=pixels).logits)


def test_before_any_round_it_is_the_base_model(tmp_path):
    run = run_of(ScaleFL(), tmp_path, **SHORT)
    state = started(run)
    [snapshot] = run.method.snapshots(state, run.base)
    expected = whole_tensors(run.base, run.config.seed)
    own = {name: tensor for name, tensor in snapshot.tensors.items() if not name.startswith(OUTPUT_MODULE)}
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in expected.items())


def test_a_network_whose_last_stage_nobody_trained_has_all_that_was_trained(tmp_path):
    run = given(run_of(ScaleFL(), tmp_path, rounds=2, **SHORT), [Submodel.first(2)] * 2)
    state = federate(run)
    run.method.export(state, run.base, run.work, tmp_path / "export")
    exported = AutoModelForImageClassification.from_pretrained(tmp_path / "export").state_dict()
    for name, tensor in version(state.tensors, 2).items():
        if home_of(name) is not None:
            assert torch.equal(exported[name], tensor), name
    last = f"{STAGES}.3.layers.0.layer.1.convolution.weight"
    assert torch.equal(exported[last], state.tensors[f"stage4.{last}"])


# ── transformers ───────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class OfTexts(ScaleFL):
    default_task = SEQUENCE_CLASSIFICATION


@pytest.mark.parametrize(("stages", "depths"), [(1, (4,)), (2, (2, 4)), (3, (2, 3, 4)), (9, (1, 2, 3, 4))])
def test_the_layers_of_a_transformer_are_grouped(stages, depths, tmp_path):
    assert ScaleFL(stages=stages).depths(base_model(tmp_path).shape) == depths


def test_stages_of_a_transformer_train_their_layers(tmp_path):
    run = run_of(OfTexts(stages=2), tmp_path, rounds=2, **SHORT)
    before, after = started(run), federate(run)
    changed = {name for name in after.tensors if not torch.equal(after.tensors[name], before.tensors[name])}
    first = {name for name in changed if name.startswith("stage1.")}
    assert "stage1.model.embed_tokens.weight" in first
    assert f"stage1.{OUTPUT_MODULE}.stand_ins.2.weight" in first
    assert {"model.norm.weight", "score.weight"} <= {name.removeprefix("stage2.") for name in changed - first}
    sent = {spec.name for result in run.folder.results() if result.round == 1 for spec in result.tensors}
    assert {name for name in sent if name.startswith("stage2.model.layers.1.")} == {
        "stage2.model.layers.1.mlp.down_proj.weight"
    }
    assert "stage2.model.embed_tokens.weight" not in sent


def test_what_stands_where_a_text_is_padded_is_not_seen(tmp_path):
    run = run_of(OfTexts(stages=2), tmp_path, **SHORT)
    (built, outfit), batch = stage_model(run, 1), first_batch(run)
    padded = replace(batch, input_ids=batch.input_ids.clone(), attention_mask=batch.attention_mask.clone())
    padded.input_ids[1, 9:] = padded.attention_mask[1, 9:] = 0
    before = outfit.loss(built, padded).item()
    with torch.no_grad():
        built.model.get_input_embeddings().weight[0] += 1.0
    assert outfit.loss(built, padded).item() == pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_that_see_pictures_are_trained_in_stages_too(dtype, tmp_path):
    bundled = json.loads((model_folder(VIT) / "config.json").read_text())
    configure(tmp_path, {**bundled, "image_size": 16, "patch_size": 4})
    run = run_of(ScaleFL(stages=2), tmp_path, rounds=2, **SHORT)
    run.work = replace(run.work, dtype=dtype)
    state = federate(run)
    assert state.scalars["trained"] == [0, 1]
    assert state.tensors[f"stage1.{OUTPUT_MODULE}.stand_ins.2.weight"].shape == (64, 64)
    assert all(bool(tensor.isfinite().all()) for tensor in state.tensors.values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", ["mlp.down_proj.weight"]),
        ("bert", ["output.dense.weight", "output.dense.bias", "output.LayerNorm.weight", "output.LayerNorm.bias"]),
        ("gpt2", ["mlp.c_proj.weight", "mlp.c_proj.bias"]),
    ],
)
def test_the_last_map_of_a_layer(name, expected):
    model = tiny.make(name, SEQUENCE_CLASSIFICATION)
    assert sorted(last_map(blocks.find(model).blocks[0])) == sorted(expected)


def test_the_last_map_of_a_networks_stage():
    config = json.loads((model_folder(BUNDLED) / "config.json").read_text())
    model = blocks.skeleton(config, IMAGES.task, 10, "float32")
    unit = "layers.1.layer.1"
    names = [f"{unit}.convolution.weight", f"{unit}.normalization.weight", f"{unit}.normalization.bias"]
    assert last_map(blocks.find(model).blocks[0]) == names
    assert "classifier.1.weight" in names_behind(model, STAGES)
    assert not [name for name in names_behind(model, STAGES) if "embedder" in name]


# ── settings ───────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": 0}, "stages=0"),
        ({"sigma": 0.0}, r"sigma=0\.0"),
        ({"rate_scale": 0.0}, r"rate_scale=0\.0"),
        ({"lambda1": (1.0, 2.0)}, "lambda1=1,2: expected 4 numbers of at least 0"),
        ({"lambda2": (1.0, 1.0, -1.0, 1.0)}, "lambda2=1,1,-1,1"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_the_plan(settings, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        ScaleFL(**settings).check(shape_of(tmp_path), IMAGES)


def test_weights_that_are_trained_cannot_stay_in_the_file(tmp_path):
    with pytest.raises(UsageError, match="mapped"):
        ScaleFL().check(shape_of(tmp_path), replace(IMAGES, holding=MAPPED))


def test_the_curriculum_goes_from_the_input_to_the_label(tmp_path):
    outfits = [ScaleFL().stage_outfit(stage, shape_of(tmp_path)) for stage in range(1, T + 1)]
    assert [outfit.about_input for outfit in outfits] == [1.0, 0.75, 0.5, 0.25]
    assert [outfit.about_label for outfit in outfits] == [0.25, 0.5, 0.75, 1.0]
