"""Wrong inputs: exit status 2 and one sentence, before any model is loaded."""

from __future__ import annotations

import json
import re

import huggingface_hub.constants
import pytest
from typer.testing import CliRunner

from lesa import LesaForecaster, Schedule
from lesa.cli import app

ALL = "train", "generate", "compare"
OPTIONS = {
    "train": "--prompts {p} --out {out}",
    "generate": "--prompts {p} --out {out}",
    "compare": "--prompts {p} --report {out}",
}
GENERATE = "generate flux --out {out} --prompts {p}"
COMPARE = "compare flux --prompts {p}"
TRAIN = "train flux --out {out} --prompts {p}"

WRONG = [
    # how the pipeline is named
    ("generate --out {out} --prompts {p}", "pipeline=None: none given; give a folder"),
    ("generate flux --pipeline qwen --out {out}", "pipeline='flux': --pipeline names another one"),
    ("demo flux --pipeline qwen", "pipeline='flux': --pipeline names another one"),
    ("demo fluxx --out {out}", "'fluxx': not embedded, did you mean flux; choose from flux,"),
    ("demo testbed:qwenn", "pipeline='qwenn': not embedded, did you mean qwen; choose from"),
    ("demo {folder} --out {out}", "not embedded; choose from flux, schnell"),
    ("generate fluxx --out {out} --prompts {p}", "no such folder, nor embedded, did you mean flux"),
    ("generate {nowhere} --out {out} --prompts {p}", "nowhere': no such folder, nor embedded"),
    ("generate {folder} --out {out} --prompts {p}", "(no model_index.json in it); give a folder"),
    ("generate {p} --out {out} --prompts {p}", "(it is a file, no folder); give a folder"),
    ("generate owner/name --out {out} --prompts {p}", "pipeline='owner/name': no folder here, and"),
    ("generate  --out {out} --prompts {p}", "pipeline='': it is empty; give a value"),
    ("push {trained} ", "repo='': it is empty; give a value"),
    ("push {trained} owner/name --revision a\0b", "revision='a\\x00b': not the name of a branch"),
    ("push  owner/name", "folder='': it is empty; give a value"),
    ("inspect  ", "folder='': it is empty; give a value"),
    ("convert  --out {out}", "file='': it is empty; give a value"),
    ("export {trained} --to  --out {out}", "to='': it is empty; give a value"),
    ("generate flux --pipeline= --out {out}", "pipeline='': it is empty; give a value"),
    ("demo flux ", "argument='': it is empty; leave it out"),
    # prompts
    ("train flux --out {out}", "prompts=None: none given; give --prompts FILE"),
    ("generate flux --out {out}", "prompts=None: none given; give --prompt"),
    ("generate flux --out {out} --prompt ", "prompt='': it is empty; give a value"),
    ("generate flux --out {out} --prompts {folder}", "cannot read it (Is a directory); give a UTF"),
    ("generate flux --out {out} --prompts /dev/zero", "prompts='/dev/zero': it is a device; give"),
    ("generate flux --out {out} --prompts {nowhere}", "the file does not exist; give a UTF-8 text"),
    ("generate flux --out {out} --prompts {empty}", "the file holds no prompt; give a UTF-8 text"),
    ("generate flux --out {out} --prompts {binary}", "cannot read it ('utf-8' codec can't decode"),
    ("generate flux --out {out} --prompts {csv}", "looked for prompt, prompts, text, caption, fo"),
    ("generate flux --out {out} --prompts {half}", "its prompt='a \\ud83d cat': it is no valid"),
    ("generate flux --out {out} --prompt a\ud83db", "prompt='a\\ud83db': it is no valid Unicode"),
    (GENERATE + " --negative-prompt a\ud83db", "negative-prompt='a\\ud83db': it is no valid Uni"),
    (COMPARE + " --calibration {p}", "calibration=", "of its prompts are measured too, e.g."),
    (COMPARE + " --calibration {nowhere}", "calibration=", "nowhere': the file does not"),
    # where results go
    ("generate flux --prompts {p}", "out=None: it is missing; give --out"),
    ("generate flux --prompts {p} --out ", "out='': it is empty; give a value"),
    ("generate flux --prompts {p} --out=", "out='': it is empty; give a value"),
    ("generate flux --prompts {p} --out {p}", "cannot write into the folder (", "another folder"),
    ("train flux --prompts {p} --out {p}/x", "cannot write into the folder (", "another folder"),
    ("demo --out {p}", "cannot write into the folder (", "another folder"),
    (COMPARE + " --report {p}", "report=", "cannot write into the folder ("),
    (GENERATE + " --json {json_folder}", "json=", "it is a folder; give a file name"),
    (GENERATE + " --json {p}", "json='", ".txt': no name of a JSON file; give one that e"),
    (TRAIN + " --json {p}/facts.json", "json=", "cannot write into the folder ("),
    ("inspect {folder} --json {json_folder}", "json=", "it is a folder; give a file name"),
    ("env --json {p}", "json='", ".txt': no name of a JSON file; give one that ends in .json"),
    # what is given twice, or has no effect
    ("generate flux --out {out} --out x --prompts {p}", "out='x': it is given more than once; gi"),
    (GENERATE + " --height 64 --height 64", "height='64': it is given more than once; give it o"),
    (GENERATE + " --config sdxl --config sdxl", "config='sdxl': it is given more than once; giv"),
    ("env --json --json", "json='-': it is given more than once; give it once"),
    ("compare --flops-only --model sdxl --prompts {p}", "prompts='", "measures nothing; leave"),
    ("compare --flops-only --model sdxl --seed 3", "seed=3: --flops-only measures nothing; leave"),
    ("compare --flops-only --model sdxl --report {out}", "report='", "measures nothing; leave"),
    ("compare --flops-only --model sdxl --compile", "compile=True: --flops-only measures nothing"),
    # forecasters and methods
    (GENERATE + " --forecaster taylr-1 --full-steps 9", "'taylr-1': neither a folder", "fora, tay"),
    (GENERATE + " --forecaster {folder} --full-steps 9", "config.json cannot be read (", "; give"),
    (GENERATE + " --forecaster {p}", "forecaster='", ".txt' is a file; give the folder that it is"),
    ("generate flux --prompts {p} --out a\0b", "out='a\\x00b': ", "embedded null ", "; see"),
    (GENERATE + " --set num_images_per_prompt=2", "set='num_images_per_prompt=2': generate makes"),
    (COMPARE + " --set num_images_per_prompt=2", "set='num_images_per_prompt=2': compare makes o"),
    (GENERATE + " --full-steps 9", "full-steps=9: it needs a forecaster; give --forecaster too"),
    (GENERATE + " --interval 5", "interval=5: it needs a forecaster; give --forecaster too"),
    (GENERATE + " --forecaster fora", "give either --full-steps or --interval"),
    (GENERATE + " --forecaster fora --full-steps 9 --interval 5", "give either --full-steps or"),
    (GENERATE + " --forecaster fora --interval 0", "interval=0"),
    (GENERATE + " --forecaster fora --full-steps 51", "full-steps=51: 51 of 50 steps is not"),
    (GENERATE + " --forecaster {trained} --num-inference-steps 3", "either --full-steps or"),
    (GENERATE + " --target-speedup 4", "target-speedup=4.0: it needs a forecaster; give --forec"),
    (GENERATE + " --forecaster fora --quality fast", "quality='fast': fora was not trained on th"),
    (GENERATE + " --forecaster fora --target-psnr 40", "target-psnr=40: fora was no", "full-steps"),
    (GENERATE + " --forecaster fora --target-psnr nan", "target-psnr=nan: not a finite number"),
    (GENERATE + " --forecaster fora --target-speedup 0", "target-speedup=0: slower than plain"),
    (GENERATE + " --forecaster fora --target-speedup 60", "-speedup=60: fora makes 50 steps at m"),
    (GENERATE + " --forecaster fora --target-speedup x", "target-speedup='x': not a number"),
    (GENERATE + " --forecaster {trained} --quality bets", "quality='bets': unknown, did you mean"),
    (GENERATE + " --forecaster {trained} --target-speedup 2", "4 full steps are", "most 1.5, or"),
    (GENERATE + " --forecaster {trained} --target-psnr 9", "does not say what it is worth; give"),
    (GENERATE + " --forecaster {trained} --quality best --interval 5", "give either --full-steps"),
    ("generate sdxl --out {out} --prompts {p} --forecaster {trained}", "trained for model_class="),
    (COMPARE + " --methods fora,tayler-1", "'tayler-1': unknown, did you mean taylor-1", "fora, "),
    (COMPARE + " --methods LESA", "methods='LESA': unknown, did you mean lesa; choose from"),
    (COMPARE + " --methods all,fora", "methods='all,fora': all stands alone; give all, or names"),
    (COMPARE + " --methods fora,deepcache", "'deepcache': it needs a U-Net, FluxPipeline has none"),
    ("compare sdxl --prompts {p} --methods toca", "FluxTransformer2DModel, not UNet2DCondi", "; l"),
    ("compare sdxl --prompts {p} --methods freqca", "UNet2DConditionModel has no layout of", "; l"),
    (COMPARE + " --methods ,", "methods=',': none given; choose"),
    (COMPARE + " --methods lesa", "methods='lesa': it needs a trained forecaster; give"),
    (COMPARE + " --judge beauty", "judge='beauty': unknown; choose"),
    (TRAIN + " --form kubic", "form='kubic': unknown; choose from continuous, disca, paper"),
    (TRAIN + " --form tabel", "form='tabel': unknown, did you mean table; choose"),
    (TRAIN + " --tap hiden", "tap='hiden': unknown, did you mean hidden; choose from hidden, out"),
    (TRAIN + " --form paper --full-steps 13,10", "full-steps='13,10': --form paper takes one num"),
    (TRAIN + " --form paper --num-inference-steps 50,28", "'50,28': --form paper takes one number"),
    (TRAIN + " --polish -1", "polish=-1: below 0; give at least 0"),
    (TRAIN + " --polish 999999", "polish=999999: above 100; give at most 100"),
    (TRAIN + " --form disca --tap hidden", "tap='hidden' does not go with form='disca'"),
    # what training may cost, and is to reach
    (TRAIN + " --validation {nowhere}", "validation='", "nowhere': the file does not exist; give"),
    (TRAIN + " --validation {empty}", "validation='", "the file holds no prompt; give a UTF-8 te"),
    (TRAIN + " --validation {csv}", "validation='", "looked for prompt, prompts, text, caption"),
    (TRAIN + " --validation {p}", "validation='", "2 of its prompts are fitted too, e.g. 'a blue"),
    (TRAIN + " --budget soon", "budget='soon': neither a number of plain generations nor a time"),
    (TRAIN + " --budget " + "9" * 400 + "h", "budget=inf: not a finite number; give one such as"),
    (TRAIN + " --dry-run --step-seconds 1e308", "step-seconds=1e+308: above 86400; give at most"),
    (TRAIN + " --budget 0min", "budget='0min': nothing can be trained for that; give more"),
    (TRAIN + " --budget 2 --full-steps 10", "budget=2: 2 prompts need 2.8 plain", "most 1 prom"),
    (TRAIN + " --budget 3", "budget=3: 2 prompts need 4.5 plain generations, one each and"),
    (TRAIN + " --budget 4 --full-steps 10 --validation {others}", "budget=4: 4 prompts need 5.2 p"),
    (TRAIN + " --target-psnr much", "target-psnr='much': not a number; give one"),
    (TRAIN + " --target-psnr nan", "target-psnr=nan: not a finite number; give one such as"),
    (TRAIN + " --target-psnr 0", "target-psnr=0: no dB that a forecast reaches; give 20 to 100"),
    (TRAIN + " --target-psnr 101", "target-psnr=101: no dB that a forecast reaches; give 20"),
    (TRAIN + " --target-psnr 40 --form paper", "target-psnr=40.0: form='paper' calibrates one nu"),
    (TRAIN + " --target-psnr 40 --form disca", "target-psnr=40.0: form='disca' calibrates one nu"),
    ("inspect {nowhere}", "config.json cannot be read (No such file or directory); give"),
    # numbers of full steps
    (TRAIN + " --full-steps 10,,8", "full-steps='10,,8': not a list of whole numbers; write"),
    (TRAIN + " --full-steps ten", "full-steps='ten': not a list of whole numbers; write"),
    (TRAIN + " --full-steps 10,10", "full-steps='10,10': 10 is there twice; give each number on"),
    (TRAIN + " --full-steps 60", "full-steps=60: 60 of 50 steps is not"),
    (TRAIN + " --full-steps 0", "full-steps=0: 0 of 50 steps is not"),
    (TRAIN + " --full-steps ", "full-steps='': it is empty; give a value"),
    (COMPARE + " --full-steps 10,,8", "full-steps='10,,8': not a list of whole numbers; write"),
    ("compare --flops-only --model flux.1-dev --full-steps 10,10", "10 is there twice; give each"),
    ("compare --flops-only --model sdxl --num-inference-steps 99999999", "=99999999: above 100000"),
    # what the options themselves refuse
    (GENERATE + " --full-steps ten", "full-steps='ten': not a whole number; give one"),
    (GENERATE + " --guidance-scale high", "guidance-scale='high': not a number; give one"),
    (GENERATE + " --heigth 64", "--heigth: no such option, did you mean --height"),
    (GENERATE + " --seed", "--seed: it needs a value; give one"),
    ("generte flux", "No such command 'generte', did you mean 'generate'; see"),
    (GENERATE + " more", "unexpected extra argument", "; see"),
    ("demo --prompts-count 0", "prompts-count=0: below 1; give at least 1"),
    (GENERATE + " --fps 0", "fps=0: below 1; give at least 1"),
    (GENERATE + " --fps 99999", "fps=99999: above 1000; give at most 1000"),
    ("demo --prompts-count 100000000", "prompts-count=100000000: above 10000; give at most 100"),
    ("compare --flops-only --model sdxl --height 99999999", "height=99999999: above 65536; give"),
    (GENERATE + " --num-inference-steps 0", "num-inference-steps=0: below 1; give at least 1"),
    # --set
    (GENERATE + " --set guidance", "set='guidance': not a key and a value; write --set"),
    (GENERATE + " --set height=64", "set='height=64': it has an option of its own; give --height"),
    (GENERATE + " --set output_type=pil", "set='output_type=pil': lesa needs output_type itself"),
    (GENERATE + " --set true_cfg=2", "set='true_cfg=2': FluxPipeline takes no true_cfg, did you"),
    (GENERATE + " --set eta=1 --set eta=2", "set='eta=2': eta is there twice; give it once"),
]  # fmt: skip

EVERYWHERE = [  # in every command that runs a pipeline
    ("--seed -1", "seed=-1: out of range; give 0 to"),
    ("--seed 1e3", "seed='1e3': not a whole number; give one"),
    ("--batch-size 0", "batch-size=0: below 1; give at least 1"),
    ("--guidance-scale nan", "guidance-scale=nan: not a finite number; give"),
    ("--guidance-scale inf", "guidance-scale=inf: not a finite number; give"),
    ("--height 0", "height=0: below 1; give at least 1"),
    ("--height 60", "height=60: flux takes multiples of 8; give 56 or 64"),
    ("--width 3", "width=3: flux takes multiples of 8; give 8"),
    ("--frames 9", "frames=9: FluxPipeline makes no video; leave it out"),
    ("--frames 0", "frames=0: below 1; give at least 1"),
    ("--num-inference-steps 2000", "num-inference-steps=2000: the pipeline's scheduler has 1000"),
    ("--dtype bflot16", "dtype='bflot16': unknown, did you mean bfloat16", "choose from bf16,"),
    ("--dtype int8", "dtype='int8': unknown", "choose from bf16, fp16, fp32"),
    ("--device cudda", "device='cudda': unknown, did you mean cuda; give one of: cpu"),
    ("--device cuda:77", "device='cuda:77': not usable here (", "give one of: cpu"),
    ("--attention-backend flosh", "attention-backend='flosh': unknown", "choose from"),
    ("--scheduler dimm", "scheduler='dimm': unknown, did you mean ddim; choose from ddim, euler"),
    ("--scheduler ddim", "one of flow matching, which ddim does not follow; choose from flow"),
    ("--set max_sequence=9", "takes no max_sequence, did you mean max_sequence_length"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    """A pipeline that is loaded fails the test; the hub is not asked."""

    def load(*_, **__):
        pytest.fail("a pipeline was loaded")

    monkeypatch.setattr("lesa.testbed.load", load)
    monkeypatch.setattr("lesa.cli.inputs.load_pipeline", load)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", load)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """Files and folders that the cases name."""
    root = tmp_path_factory.mktemp("wrong")
    forecaster = LesaForecaster("table", uses_latent=False)
    forecaster.metadata = {"model_class": "FluxTransformer2DModel"}
    schedule = Schedule.explicit((0, 2, 4, 5), 6)
    forecaster.recommend(schedule, tuple(1 - i / 6 for i in range(7)))
    forecaster.save_pretrained(root / "trained")
    contents = {
        "p": b"a red circle\na blue square\n",
        "others": b"a green square\na grey cat\n",
        "empty": b"\n  \n",
        "binary": b"\xff\xfe\x00\x81",
        "csv": b"name,label\na,b\n",
        "half": b'["a \\ud83d cat"]',
    }
    endings = {"csv": ".csv", "half": ".json"}
    found = {name: root / f"{name}{endings.get(name, '.txt')}" for name in contents}
    for name, path in found.items():
        path.write_bytes(contents[name])
    found["folder"], found["json_folder"] = root / "folder", root / "folder.json"
    for name in ("folder", "json_folder"):
        found[name].mkdir()
    found |= {name: root / name for name in ("nowhere", "out", "trained")}
    return {name: str(path) for name, path in found.items()}


def refused(line: str, places: dict[str, str]) -> str:
    """What a command line (words at single spaces, so that two hold an empty one) gets told."""
    result = CliRunner().invoke(app, [word.format(**places) for word in line.split(" ")])
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (told,) = result.stderr.splitlines()
    return told


def check(told: str, words: tuple[str, ...]) -> None:
    """One sentence with its field, the words in order, and a remedy."""
    assert re.match(r"lesa: \S", told) and not re.search(r"\.$|\. [A-Z]|Traceback", told), told
    assert all(word in told for word in words), told
    assert re.search(r"; |\(see ", told), told


@pytest.mark.parametrize("case", WRONG, ids=lambda case: re.sub(r"[^\w -]", "", ascii(case[0])))
def test_one_sentence_before_anything_is_loaded(case, places):
    line, *words = case
    check(refused(line, places), tuple(words))


@pytest.mark.parametrize("command", ALL)
@pytest.mark.parametrize("case", EVERYWHERE, ids=lambda case: case[0])
def test_in_every_command_that_runs_a_pipeline(command, case, places):
    options, *words = case
    line = f"{command} flux {OPTIONS[command]} {options}"
    check(refused(line, places), tuple(words))


@pytest.mark.parametrize("line", ["demo --out {out}", COMPARE + " --report {out}", COMPARE])
def test_what_measuring_needs_is_told_first(line, places, monkeypatch):
    missing = "torchmetrics" if line == COMPARE else "jinja2"
    monkeypatch.setattr("lesa.cli.checks.find_spec", lambda name: None if name == missing else 1)
    told = refused(line, places)
    check(told, (f"it needs {missing}, not installed here; run `pip install {missing}`",))


def test_a_saved_pipeline_is_looked_at_before_it_is_loaded(tmp_path, places):
    """The class is read from the folder, and what its scheduler is."""
    (tmp_path / "scheduler").mkdir()
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    config = {"_class_name": "PNDMScheduler", "num_train_timesteps": 500}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    line = f"generate {tmp_path} --prompts {{p}} --out {{out}} "
    for options, words in {
        "--scheduler flow-euler": "PNDMScheduler is one of noise prediction, which flow-euler",
        "--num-inference-steps 501": "the pipeline's scheduler has 500 at most; give 1 to 500",
        "--set guidance=3": "takes no guidance, did you mean guidance_scale",
        "--frames 3": "StableDiffusionPipeline makes no video; leave it out",
    }.items():
        check(refused(line + options, places), (words,))
    config["_class_name"] = "CogVideoXDDIMScheduler"
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    told = refused(line + "--scheduler euler", places)
    check(told, ("a CogVideoXDDIMScheduler cannot be replaced by another sampler; leave",))


def test_a_pipeline_of_the_hub_is_looked_at_too(tmp_path, places, monkeypatch):
    """Its two small files; one without a scheduler, as a pipeline of another kind."""
    from huggingface_hub.errors import EntryNotFoundError

    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))

    def download(repo: str, file: str, **_) -> str:
        assert repo == "owner/name"
        if not (tmp_path / file).exists():
            raise EntryNotFoundError(f"404: {file}")
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    line = "generate owner/name --prompts {p} --out {out} "
    check(refused(line + "--frames 3", places), ("FluxPipeline makes no video; leave it out",))
    (tmp_path / "model_index.json").unlink()
    check(
        refused(line.strip(), places), ("not to be had from the hub (404: model_index.json); give",)
    )
