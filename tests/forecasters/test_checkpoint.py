"""Forecasters as folders: what is read back, and what is refused in one sentence."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from shaken_forecasters import GATES, PLAN, SIGMAS, levels, random_rows, shaken

from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.forecasters import LesaForecaster
from lesa.forecasters.named import named


@pytest.fixture
def saved(tmp_path):
    forecaster = shaken(branches=("cond", "uncond"), metadata={"model_class": "M", "seed": 3})
    rows = random_rows(forecaster)
    forecaster.correct(PLAN, SIGMAS, "cond", rows, split=torch.stack([rows, -rows], -1))
    forecaster.recommend(Schedule.every(4, 28), levels(28))
    forecaster.save_pretrained(tmp_path / "made" / "folder")
    return forecaster, tmp_path / "made" / "folder"


@pytest.mark.parametrize(
    "fields",
    [{"form": "continuous"}, {"form": "table"}, *({"form": "paper", **g} for g in GATES.values())],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_roundtrip_is_bit_exact(tmp_path, fields, dtype):
    forecaster = shaken(nodes=8, **fields).to(dtype)
    forecaster.save_pretrained(tmp_path)
    back = LesaForecaster.from_pretrained(tmp_path)
    assert back.settings == forecaster.settings
    assert back.state_dict().keys() == forecaster.state_dict().keys()
    for name, value in forecaster.state_dict().items():
        assert back.state_dict()[name].dtype == value.dtype
        assert torch.equal(back.state_dict()[name], value)
    table, again = (f.table(PLAN, SIGMAS) for f in (forecaster, back))
    assert torch.equal(table.coefficients, again.coefficients)


def test_roundtrip_keeps_rows_schedules_and_metadata(saved):
    forecaster, folder = saved
    back = LesaForecaster.from_pretrained(str(folder))
    assert back.metadata == forecaster.metadata
    assert back.calibrated == forecaster.calibrated
    for a, b in zip(back.calibrations, forecaster.calibrations, strict=True):
        assert a.sigmas == b.sigmas and a.rows.keys() == b.rows.keys()
    for branch in ("cond", "uncond"):
        table, again = (f.table(PLAN, SIGMAS, branch) for f in (forecaster, back))
        assert torch.equal(table.coefficients, again.coefficients)
        assert (table.parts, again.parts) == ((2, 2) if branch == "cond" else (1, 1))
    assert torch.equal(back.table(PLAN, SIGMAS).split, forecaster.table(PLAN, SIGMAS).split)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_saving_over_a_folder_replaces_it(saved):
    _, folder = saved
    LesaForecaster(history=2).save_pretrained(folder)
    assert LesaForecaster.from_pretrained(folder).settings.history == 2


def test_truncated_weights(saved):
    _, folder = saved
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(LesaError, match=r"model\.safetensors.*truncated.*copy"):
        LesaForecaster.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(saved, name):
    _, folder = saved
    (folder / name).unlink()
    with pytest.raises(LesaError, match=f"{name}.*No such file.*save_pretrained"):
        LesaForecaster.from_pretrained(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(LesaError, match="nowhere.config.json cannot be read"):
        LesaForecaster.from_pretrained(tmp_path / "nowhere")


def edit(**changes):
    def change(config):
        return {**config, **changes}

    return change


def settings_with(**changes):
    return lambda config: {**config, "settings": {**config["settings"], **changes}}


def entry_with(**changes):
    def change(config):
        first, *others = config["calibrated"]
        return {**config, "calibrated": [{**first, **changes}, *others]}

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (edit(format_version=2), "format_version=2, this lesa reads 1"),
        (settings_with(form="fancy"), "config.json: config.settings.form='fancy': not one of"),
        (settings_with(history=5), "do not fit each other"),
        (settings_with(colour="red"), "config.settings has an unknown field 'colour'"),
        (settings_with(history=10**9), "settings.history=1000000000: not a whole number of 1"),
        (settings_with(hidden=[10**6, 10**6]), r"settings.hidden\[0\]=1000000"),
        (settings_with(intervals=10**9), "settings.intervals=1000000000"),
        (settings_with(seed="x"), "settings.seed='x': not a whole number"),
        (edit(settings="kan"), "config.settings='kan': not an object"),
        (edit(calibrated={}), "config.calibrated={}: not a list"),
        (edit(calibrated=[3]), r"calibrated\[0\]=3: not an object"),
        (edit(calibrated=[{"schedule": {"rule": "every", "value": 7}}]), "has no sigmas"),
        (entry_with(sigmas=[None] * 51), r"sigmas\[0\]=None: not a finite number"),
        (entry_with(sigmas=[1.0, 0.5]), "sigmas=2 values"),
        (entry_with(branches=[["cond"]]), "not a text"),
        (entry_with(branches=["nobody"]), "do not fit each other.*nobody"),
        (entry_with(schedule={"rule": "every", "value": None, "num_steps": 50}), "interval=None"),
        (edit(metadata="abc"), "config.metadata='abc': not an object"),
        (edit(metadata={"model_hash": 3}), "metadata.model_hash=3: not a text"),
        (edit(metadata={"prompts": "many"}), "metadata.prompts='many': not a whole number"),
        (edit(dtype="bfloat16"), "bfloat16"),
        (edit(dtype=[]), "config.dtype="),
        (lambda config: {"format_version": 1}, "weights_sha256"),
        (lambda config: [], "not the config"),
    ],
)
def test_wrong_config(saved, change, told):
    _, folder = saved
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(LesaError, match=told) as caught:
        LesaForecaster.from_pretrained(folder)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e30, -1e5])
@pytest.mark.parametrize("kind", ["rows", "split"])
def test_coefficients_that_no_training_gives(saved, wrong, kind):
    """They are valid files with a valid hash, and would make noise of every picture."""
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{kind}.0.cond"][PLAN.skipped_steps[3], 0] = wrong
    save_file(tensors, folder / "model.safetensors")
    path = folder / "config.json"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    path.write_text(json.dumps({**json.loads(path.read_text()), "weights_sha256": digest}))
    with pytest.raises(LesaError, match="not finite|trained ones stay below 1000"):
        LesaForecaster.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "\x00\xff", "[" * 100_000])
def test_config_that_is_no_json(saved, text):
    _, folder = saved
    (folder / "config.json").write_text(text)
    with pytest.raises(LesaError, match="config.json is not the config"):
        LesaForecaster.from_pretrained(folder)


def test_a_text_of_the_metadata_stays_as_it_is(tmp_path):
    """Lists of numbers go on one line; what looks like one inside a text does not."""
    told = {"call": {"negative_prompt": "[1,   2]"}}
    LesaForecaster(metadata=told).save_pretrained(tmp_path)
    assert LesaForecaster.from_pretrained(tmp_path).metadata == told
    assert '"stages": [ 0.9, 0.5 ]' in (tmp_path / "config.json").read_text()


def test_unwritable_folder_and_metadata(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LesaError, match="folder='.*file.*': it cannot be written"):
        LesaForecaster().save_pretrained(tmp_path / "file" / "inner")
    with pytest.raises(LesaError, match="metadata: they cannot be written as JSON"):
        LesaForecaster(metadata={"model": object()}).save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_interrupted_saving_leaves_the_old_checkpoint(saved, monkeypatch):
    forecaster, folder = saved

    def interrupt(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("lesa.forecasters.checkpoint.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        LesaForecaster(history=2).save_pretrained(folder)
    assert LesaForecaster.from_pretrained(folder).settings == forecaster.settings
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.fixture
def hub(saved, monkeypatch, tmp_path):
    """A Hub that holds the saved forecaster under any name; what was asked of it is listed."""
    _, folder = saved
    asked = []

    def download(repo, name, revision=None, **_):
        asked.append((repo, name, revision))
        return shutil.copy(folder / name, tmp_path / name)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


@pytest.mark.parametrize("revision", [None, "v2"])
def test_hub_id_downloads_the_two_files(hub, revision):
    found = LesaForecaster.from_pretrained("owner/forecaster", revision=revision)
    assert found.calibrated[0] == PLAN
    assert hub == [
        ("owner/forecaster", "config.json", revision),
        ("owner/forecaster", "model.safetensors", revision),
    ]


def test_hub_failure_is_one_sentence(monkeypatch):
    def download(repo, name, revision=None, **_):
        raise OSError("Offline mode is on.\nmore lines")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(LesaError, match="'owner/none' is not a folder here.*Offline mode is on"):
        LesaForecaster.from_pretrained("owner/none")
    with pytest.raises(LesaError, match="revision 'v2'.*Offline mode is on"):
        LesaForecaster.from_pretrained("owner/none", revision="v2")


def test_a_revision_belongs_to_a_hub_id(saved):
    for source in (saved[1], str(saved[1])):
        with pytest.raises(LesaError, match="revision='v2'.*leave it out"):
            LesaForecaster.from_pretrained(source, revision="v2")
    with pytest.raises(LesaError, match="revision=2: not a text"):
        LesaForecaster.from_pretrained("owner/name", revision=2)


@pytest.mark.parametrize("source", ["", None, 3, "a" * 300, "null\0byte", "a/b/c"], ids=repr)
def test_what_is_no_source_is_one_sentence(source):
    with pytest.raises(LesaError) as caught:
        LesaForecaster.from_pretrained(source)
    assert "\n" not in str(caught.value)


def test_forecasters_by_name(saved, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named(saved[1]).calibrated == named(str(saved[1])).calibrated == saved[0].calibrated
    for name, own in (("taylor-1", "taylor-1"), ("taylorseer-1", "taylor-1"), ("reuse", "fora")):
        assert named(name).name == own
    assert named("owner/name", "v2").calibrated[0] == PLAN and hub[-1][2] == "v2"
    shutil.copytree(saved[1], tmp_path / "fora")  # a folder comes before the method of its name
    assert named("fora").calibrated[0] == PLAN
    for wrong, told in (
        ("tailor-1", "did you mean 'taylor-1'.*fora, taylor-0"),
        ("my-lesa", "neither a folder nor a known method.*spectrum"),
        ("some/where/else", "config.json cannot be read"),
    ):
        with pytest.raises(LesaError, match=told):
            named(wrong)
    with pytest.raises(LesaError, match="revision='v2'"):
        named("taylor-1", "v2")
