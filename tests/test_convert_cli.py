"""convert_checkpoint.py as its user meets it: the same bits under any names, or one line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import convert_checkpoint
from model.families.registry import open_model
from model.families.wan21.folder import CONFIG, ModelFolder
from model.families.wan21.weights import find_weights, load_network
from model.folders.loading import Placement
from model.wan.config import WanConfig, diffusers_config
from model.wan.weights import to_diffusers
from tests.commands import ROOT, own_logging, refusal
from tests.folders import VAE, make_diffusers, make_official
from tests.runs import read_state, run, step_folder, unequal, write_config
from utils.weights import WeightFile

__all__ = ["own_logging"]


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> Path:
    """A diffusion run of two steps, both saved, its average lagging behind."""
    folder = tmp_path_factory.mktemp("convert")
    config = write_config(folder, tiny_root, "diffusion")
    return run(config, folder / "run", "steps=2", "save_every=1", "ema.start_step=0")


@pytest.fixture(scope="module")
def dmd_logdir(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> Path:
    """A distillation run of one step, which has a critic."""
    folder = tmp_path_factory.mktemp("convert_dmd")
    config = write_config(folder, tiny_root, "dmd")
    return run(config, folder / "run", "steps=1", "ema.start_step=0")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """An image-to-video release in the official layout."""
    return make_official(tmp_path_factory.mktemp("release") / "i2v", "i2v")


def words(source: Path, target: Path, *more: str) -> list[str]:
    return ["--input_path", str(source), "--output_path", str(target), *more]


def weights_in(path: Path) -> dict[str, Tensor]:
    """All tensors of a weight file."""
    file = WeightFile(path)
    return {name: file.read(name) for name in file.shapes()}


def saved(logdir: Path, step: int, prefix: str) -> dict[str, Tensor]:
    """The generator's weights, or its average, in a checkpoint."""
    state = read_state(step_folder(logdir, step))
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("flags", "prefix"),
    [((), "roles.generator."), (("--use_ema",), "ema.generator."), (("--ema",), "ema.generator.")],
)
def test_a_converted_file_holds_the_bits_of_the_newest_checkpoint(
    suffix: str, flags: tuple[str, ...], prefix: str, logdir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "new" / f"file{suffix}"
    assert convert_checkpoint.main(words(logdir, target, *flags)) == 0
    expected = saved(logdir, 2, prefix)
    assert len(expected) > 50
    assert unequal(weights_in(target), expected) == []
    cards = ["file.README.md", "file.fewstep.json"]
    assert sorted(path.name for path in target.parent.iterdir()) == sorted([target.name, *cards])


def test_weights_and_average_differ(logdir: Path) -> None:
    regular, average = saved(logdir, 2, "roles.generator."), saved(logdir, 2, "ema.generator.")
    assert regular.keys() == average.keys()
    assert unequal(regular, average) != []


def test_a_step_folder_is_converted_as_that_step(logdir: Path, tmp_path: Path) -> None:
    target = tmp_path / "file.safetensors"
    assert convert_checkpoint.main(words(step_folder(logdir, 1), target)) == 0
    assert unequal(weights_in(target), saved(logdir, 1, "roles.generator.")) == []


def test_a_converted_file_loads_into_the_network_bit_for_bit(
    logdir: Path, tiny_config: WanConfig, tmp_path: Path
) -> None:
    target = tmp_path / "file.safetensors"
    assert convert_checkpoint.main(words(logdir, target)) == 0
    place = Placement(torch.device("cpu"))
    network = load_network(tiny_config, WeightFile(target), place, what="the converted file")
    assert unequal(dict(network.model.state_dict()), saved(logdir, 2, "roles.generator.")) == []


def test_names_are_those_of_the_official_release(
    logdir: Path, tiny_root: Path, tmp_path: Path
) -> None:
    target = tmp_path / "file.safetensors"
    assert convert_checkpoint.main(words(logdir, target)) == 0
    official = find_weights(tiny_root / "wan_models" / "Wan2.1-T2V-Tiny")
    assert WeightFile(target).shapes() == official.shapes()


def test_a_safetensors_file_says_where_it_comes_from(logdir: Path, tmp_path: Path) -> None:
    target = tmp_path / "file.safetensors"
    assert convert_checkpoint.main(words(logdir, target, "--use_ema")) == 0
    with safe_open(target, framework="pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "source": str(step_folder(logdir, 2)),
            "weights": "ema",
        }


def test_a_file_is_converted_to_the_other_kind_and_back_unchanged(
    logdir: Path, tmp_path: Path
) -> None:
    first, second, third = (tmp_path / f"{i}" for i in ("a.safetensors", "b.pt", "c.safetensors"))
    for source, target in ((logdir, first), (first, second), (second, third)):
        assert convert_checkpoint.main(words(source, target)) == 0
    assert unequal(weights_in(third), weights_in(first)) == []


# ---- names of others


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("naming", "suffix"),
    [
        ("official", ".pt"),
        ("diffusers", ".safetensors"),
        ("diffusers", ".pt"),
        ("reference", ".pt"),
    ],
)
def test_a_release_comes_back_from_a_file_of_any_naming_bit_for_bit(
    naming: str, suffix: str, dtype: str, release: ModelFolder, tmp_path: Path
) -> None:
    there, back = tmp_path / f"there{suffix}", tmp_path / "back.safetensors"
    flags = ("--naming", naming, "--dtype", dtype)
    assert convert_checkpoint.main(words(release.path, there, *flags)) == 0
    assert convert_checkpoint.main(words(there, back)) == 0
    source = find_weights(release.path)
    stored = {name: source.read(name).to(getattr(torch, dtype)) for name in source.shapes()}
    assert len(stored) > 80
    assert unequal(weights_in(back), stored) == []


def test_diffusers_naming_is_that_of_its_transformer(release: ModelFolder, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    target = tmp_path / "file.safetensors"
    line = words(release.path, target, "--naming", "diffusers")
    assert convert_checkpoint.main(line) == 0
    theirs = WanTransformer3DModel.from_config(diffusers_config(release.wan_config()))
    found = WeightFile(target).shapes()
    assert found == {name: tuple(v.shape) for name, v in theirs.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "group", "prefix"),
    [
        ("generator", "generator", "roles.generator."),
        ("ema", "generator_ema", "ema.generator."),
        ("critic", "critic", "roles.critic."),
    ],
)
def test_each_network_of_a_run_is_converted_in_reference_naming_and_read_again(
    kind: str, group: str, prefix: str, dmd_logdir: Path, tmp_path: Path
) -> None:
    there, back = tmp_path / "model.pt", tmp_path / "back.safetensors"
    flags = ("--weights", kind)
    assert convert_checkpoint.main(words(dmd_logdir, there, *flags, "--naming", "reference")) == 0
    content = torch.load(there, weights_only=True)
    assert list(content) == [group]
    expected = saved(dmd_logdir, 1, prefix)
    assert unequal(content[group], {f"model.{k}": v for k, v in expected.items()}) == []
    assert convert_checkpoint.main(words(there, back, *flags)) == 0
    assert unequal(weights_in(back), expected) == []


def test_the_words_of_the_references_tool_do_what_they_did(
    dmd_logdir: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "model.pt", tmp_path / "flat.safetensors"
    average = saved(dmd_logdir, 1, "ema.generator.")
    wrapped = {f"model._fsdp_wrapped_module.{name}": value for name, value in average.items()}
    torch.save({"generator": {}, "critic": {}, "generator_ema": wrapped}, source)
    line = ["--input-checkpoint", str(source), "--output-checkpoint", str(target)]
    line += ["--remove-prefix", "model.", "--to-bf16", "--ema"]
    assert convert_checkpoint.main(line) == 0
    assert unequal(weights_in(target), {k: v.bfloat16() for k, v in average.items()}) == []


# ---- folders


def test_a_checkpoint_becomes_a_complete_folder_of_its_model(
    logdir: Path, tiny_root: Path, tmp_path: Path
) -> None:
    model = tiny_root / "wan_models" / "Wan2.1-T2V-Tiny"
    flags = ("--layout", "official", "--model_folder", str(model), "--use_ema")
    assert convert_checkpoint.main(words(logdir, tmp_path / "out", *flags)) == 0
    folder = ModelFolder(tmp_path / "out")
    open_model(folder.path).check()
    assert folder.wan_config() == ModelFolder(model).wan_config()
    stored = find_weights(folder.path)
    found = {name: stored.read(name) for name in stored.shapes()}
    assert unequal(found, saved(logdir, 2, "ema.generator.")) == []


def test_a_weight_file_becomes_a_folder_for_diffusers_with_the_encoders_of_another(
    release: ModelFolder, tmp_path: Path
) -> None:
    other = make_official(tmp_path / "other", "i2v", seed=1)
    weights, target = tmp_path / "student.safetensors", tmp_path / "out"
    assert convert_checkpoint.main(words(other.path, weights)) == 0
    flags = ("--layout", "diffusers", "--model_folder", str(release.path), "--dtype", "bfloat16")
    assert convert_checkpoint.main(words(weights, target, *flags, "--max_shard_gb", "1e-4")) == 0
    stored = weights_in(target / "transformer" / "diffusion_pytorch_model.safetensors.index.json")
    expected = {to_diffusers(k): v.bfloat16() for k, v in weights_in(weights).items()}
    assert unequal(stored, expected) == []
    assert len(list((target / "transformer").glob("*.safetensors"))) > 1
    open_model(target).check()


def test_a_model_folder_is_its_own_source(release: ModelFolder, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert convert_checkpoint.main(words(release.path, one, "--layout", "diffusers")) == 0
    assert convert_checkpoint.main(words(one, two, "--layout", "official")) == 0
    first, last = (find_weights(path) for path in (release.path, two))
    assert unequal(*({k: w.read(k) for k in w.shapes()} for w in (first, last))) == []
    assert (two / CONFIG).read_bytes() == (release.path / CONFIG).read_bytes()


# ---- precision


def test_dtype_rounds_each_weight_once(logdir: Path, tmp_path: Path) -> None:
    target = tmp_path / "file.safetensors"
    assert convert_checkpoint.main(words(logdir, target, "--dtype", "bfloat16")) == 0
    expected = {k: v.bfloat16() for k, v in saved(logdir, 2, "roles.generator.").items()}
    assert unequal(weights_in(target), expected) == []


# ---- what is there already


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_is_there_is_replaced_only_when_asked(
    suffix: str, logdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / f"file{suffix}"
    target.write_bytes(b"mine")
    assert refusal(convert_checkpoint.main, words(logdir, target), capsys) == (
        f"--output_path {target}: is there already; give another name, or add --overwrite to "
        f"replace it"
    )
    assert target.read_bytes() == b"mine"
    assert convert_checkpoint.main(words(logdir, target, "--overwrite")) == 0
    assert unequal(weights_in(target), saved(logdir, 2, "roles.generator.")) == []


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_is_not_replaced_by_its_own_conversion_unless_asked(
    suffix: str, logdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / f"file{suffix}"
    assert convert_checkpoint.main(words(logdir, source)) == 0
    before = weights_in(source)
    line = words(source, source, "--dtype", "bfloat16")
    assert "is there already and the input itself; " in refusal(
        convert_checkpoint.main, line, capsys
    )
    assert convert_checkpoint.main([*line, "--overwrite"]) == 0
    assert unequal(weights_in(source), {k: v.bfloat16() for k, v in before.items()}) == []


def test_a_folder_in_the_place_of_a_file_is_refused(
    logdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.pt").mkdir()
    line = words(logdir, tmp_path / "folder.pt", "--overwrite")
    assert refusal(convert_checkpoint.main, line, capsys) == (
        f"--output_path {tmp_path}/folder.pt: is a folder; give the name of a file in it"
    )


# ---- bad input


@pytest.mark.parametrize("flag", ["--use_ema", "--ema"])
def test_the_average_of_the_critic_is_refused(
    flag: str, dmd_logdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(dmd_logdir, tmp_path / "file.pt", "--weights", "critic", flag)
    assert refusal(convert_checkpoint.main, line, capsys) == (
        "--use_ema: only the generator has an average, and --weights critic asks for the critic; "
        "leave one of them out"
    )


def test_another_suffix_is_refused(
    logdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "file.bin"
    assert refusal(convert_checkpoint.main, words(logdir, target), capsys) == (
        f"--output_path {target}: must end in .safetensors or .pt; for a model folder add "
        "--layout official or --layout diffusers"
    )
    assert not target.exists()


def test_a_missing_source_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "nowhere"
    line = words(source, tmp_path / "file.pt")
    assert refusal(convert_checkpoint.main, line, capsys) == (
        f"{source}: no weights here; give a model folder, a .safetensors or .pt file, a training "
        "checkpoint (checkpoints/step_N), or the log directory of a run"
    )


def test_a_torn_checkpoint_is_refused(
    logdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "step_000002"
    source.mkdir()
    for file in step_folder(logdir, 2).iterdir():
        (source / file.name).write_bytes(file.read_bytes()[:100])
    message = refusal(convert_checkpoint.main, words(source, tmp_path / "file.pt"), capsys)
    assert message.startswith(f"{source}: ")
    assert "manifest" in message


def test_the_average_of_a_file_without_one_is_refused(
    logdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "file.pt"
    assert convert_checkpoint.main(words(logdir, source)) == 0
    line = words(source, tmp_path / "ema.pt", "--use_ema")
    assert refusal(convert_checkpoint.main, line, capsys) == (
        f"{source}: holds no averaged weights beside its own; ask for the regular ones"
    )


@pytest.mark.parametrize(
    ("name", "flags", "reason"),
    [
        ("a.pt", ("--remove-prefix", "net."), "--remove-prefix net.: only 'model.' and the segm"),
        ("a.pt", ("--model_folder", "x"), "--model_folder is for a model folder: add --layout"),
        ("a.safetensors", ("--naming", "reference"), "a .pt file's, whose dictionaries a .saf"),
        ("a.pt", ("--layout", "official"), "a.pt: with --layout, give a folder's name"),
        ("a", ("--layout", "official", "--naming", "diffusers"), "--naming is of a single file"),
        ("a", ("--layout", "official", "--max_shard_gb", "0"), "must be above 0, got 0.0"),
        ("a", ("--layout", "official", "--model_folder", "nowhere"), "nowhere: no such folder"),
        ("a", ("--layout", "official", "--overwrite"), "--overwrite is of a single file; a model"),
        ("a", ("--layout", "official"), "is no model folder; say with --model_folder where the"),
    ],
)
def test_words_that_do_not_go_together_are_refused(
    name: str,
    flags: tuple[str, ...],
    reason: str,
    logdir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = words(logdir, tmp_path / name, *flags)
    assert reason in refusal(convert_checkpoint.main, line, capsys)
    assert list(tmp_path.iterdir()) == []


def test_tiny_models_cannot_become_folders_for_diffusers(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_root / "wan_models" / "Wan2.1-T2V-Tiny"
    line = words(model, tmp_path / "out", "--layout", "diffusers")
    assert "absolute positions" in refusal(convert_checkpoint.main, line, capsys)


def test_a_folder_that_is_there_is_not_written_over(
    release: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "note.txt").write_text("mine", encoding="utf-8")
    line = words(release.path, tmp_path, "--layout", "diffusers")
    assert refusal(convert_checkpoint.main, line, capsys) == (
        f"{tmp_path}: is there already; give a new or an empty folder"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_a_folder_that_is_interrupted_leaves_nothing_and_says_so(
    release: ModelFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stop)  # the first part that is translated
    twin = make_diffusers(tmp_path / "twin", release)
    line = words(twin.path, tmp_path / "out", "--layout", "official")
    assert convert_checkpoint.main(line) == 130
    assert "stopped; nothing was written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["twin"]


def test_a_critic_where_there_is_none_is_refused(
    logdir: Path, release: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source in (logdir, release.path):
        line = words(source, tmp_path / "file.pt", "--weights", "critic")
        assert "critic" in refusal(convert_checkpoint.main, line, capsys)


# ---- the page about it


def test_the_commands_of_the_models_page_run_as_written(
    dmd_logdir: Path, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    models, exported = tmp_path / "wan_models", tmp_path / "runs" / "exported"
    release = make_official(models / "Wan2.1-T2V-1.3B")
    weights = find_weights(release.path)
    state = {f"model.{name}": weights.read(name) for name in weights.shapes()}
    torch.save({"generator": state, "generator_ema": state}, models / "self_forcing_dmd.pt")
    (models / "Wan2.1-T2V-Tiny").symlink_to(tiny_root / "wan_models" / "Wan2.1-T2V-Tiny")
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "student").symlink_to(dmd_logdir)
    monkeypatch.chdir(tmp_path)
    for line in lines:
        python, script, *rest = shlex.split(line)
        assert (python, script) == ("python", "convert_checkpoint.py")
        assert convert_checkpoint.main(rest) == 0, line
    cards = [path for path in exported.iterdir() if path.suffix in (".md", ".json")]
    assert len(list(exported.iterdir())) - len(cards) == len(lines) == 8
    assert len(cards) == 2  # the run's file in safetensors and that in .pt share a name
    for folder in exported.iterdir():
        if folder.is_dir():
            open_model(folder).check()


@pytest.mark.parametrize("part", [VAE, "diffusion_pytorch_model-00001-of-00002.safetensors"])
def test_what_is_no_whole_transformer_is_refused(
    part: str, release: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(release.path / part, tmp_path / "file.safetensors", "--naming", "diffusers")
    message = refusal(convert_checkpoint.main, line, capsys)
    assert message.startswith(f"{release.path / part}: not a whole Wan transformer: lacks ")
    assert not list(tmp_path.iterdir())
