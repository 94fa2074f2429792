"""Promises of tokun/config.py."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import pytest

from tokun.config import Config, from_dict, load_config, to_dict
from tokun.training.run import check_settings

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_empty_file_is_all_defaults(tmp_path):
    assert load_config(write(tmp_path, "# nothing\n")) == Config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_config_of_ours_loads_and_comes_back(path):
    config = load_config(path)
    assert from_dict(to_dict(config)) == config


def test_round_trip_of_values_that_are_not_defaults():
    config = load_config(CONFIGS[0], ["train.lr=7e-4", "image_tokenizer.channels=[8, 16]", "train.task_mix={joint: 1}"])
    assert config.train.lr == 7e-4 and config.image_tokenizer.channels == [8, 16] and config.train.task_mix == {"joint": 1.0}
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  batchsize: 3\n", ["unknown key 'train.batchsize'", "'train.batch_size'"]),
        ("sede: 3\n", ["unknown key 'sede'", "'seed'"]),
        ("3: 3\n", ["unknown key '3'"]),
        ("train:\n  steps: many\n", ["train.steps is 'many' (str)", "must be a int"]),
        ("train:\n  steps: 1.5\n", ["train.steps is 1.5 (float)", "must be a int"]),
        ("train:\n  steps: true\n", ["train.steps is True (bool)"]),
        ("train:\n  lr: fast\n", ["train.lr is 'fast'", "float"]),
        ("train:\n  lr: true\n", ["train.lr is True", "float"]),
        ("train:\n  gradient_checkpointing: 1\n", ["train.gradient_checkpointing is 1", "bool"]),
        ("out: 3\n", ["out is 3 (int)", "str"]),
        ("train:\n  precision: fp8\n", ["train.precision is 'fp8'", "'bf16', 'no'"]),
        ("image_tokenizer:\n  channels: 64\n", ["image_tokenizer.channels is 64", "list"]),
        ("image_tokenizer:\n  channels: [64, wide]\n", ["image_tokenizer.channels[1] is 'wide'", "int"]),
        ("train:\n  task_mix: [joint]\n", ["train.task_mix is ['joint']", "mapping"]),
        ("train:\n  task_mix: {joint: much}\n", ["train.task_mix.joint is 'much'"]),
        ("train: 3\n", ["train is 3", "section"]),
        ("- 3\n", ["holds a list", "not a mapping"]),
        ("a: [\n", ["run.yaml is not readable YAML"]),
    ],
)
def test_a_mistake_in_the_file_is_named_with_the_way_out(tmp_path, text, words):
    with pytest.raises(ValueError) as error:
        load_config(write(tmp_path, text))
    assert all(word in str(error.value) for word in [*words, "run.yaml"]), error.value


def test_a_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"run\.yaml is not readable YAML"):
        load_config(path)


def test_a_missing_file_names_its_nearest_neighbour(tmp_path):
    write(tmp_path, "")
    with pytest.raises(FileNotFoundError, match=r"ran\.yaml does not exist.*Did you mean .*run\.yaml"):
        load_config(tmp_path / "ran.yaml")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_config(tmp_path / "nowhere" / "run.yaml")


def test_overrides_stand_above_the_file_and_the_file_above_defaults(tmp_path):
    path = write(tmp_path, "seed: 1\ntrain:\n  lr: 0.5\n  steps: 7\n")
    config = load_config(path, ["train.lr=1e-3", "train.precision=no", "data.train=a/x-*.tar", "tracking.name=", "sampling.n=2"])
    assert (config.seed, config.train.steps, config.train.lr) == (1, 7, 1e-3)
    assert config.train.precision == "no"
    assert config.data.train == "a/x-*.tar"
    assert config.tracking.name == "" and config.sampling.n == 2
    assert config.train.warmup_steps == Config().train.warmup_steps


def test_it_is_known_which_sampling_settings_were_named_and_only_settings_are_written(tmp_path):
    (tmp_path / "c.yaml").write_text("sampling:\n  top_k: 0\n")
    config = load_config(tmp_path / "c.yaml", ["sampling.guidance_scale=1"])
    assert (
        config.sampling_given == {"top_k", "guidance_scale"}
        and from_dict({"sampling": None}).sampling_given == Config().sampling_given == set()
    )
    assert to_dict(config) == to_dict(Config())


def test_an_integer_will_do_for_a_float(tmp_path):
    lr = load_config(write(tmp_path, "train:\n  lr: 1\n")).train.lr
    assert lr == 1.0 and isinstance(lr, float)


@pytest.mark.parametrize("override", ["train.lr", "=3", "train.lr=[", "train.lr.x=3", "train.leanring_rate=3", "train.lr="])
def test_a_mistake_in_an_override_is_named(tmp_path, override):
    with pytest.raises(ValueError, match=r"train|=3"):
        load_config(write(tmp_path, "train:\n  lr: 0.1\n"), [override])


def test_the_adapter_recipe_needs_no_held_out_pictures(small_shards, tmp_path):
    """README's command without data.val was refused, since the recipe keeps the best."""
    config = load_config("lora", ["start=bundled", f"data.train={small_shards / 'train-*.tar'}", f"out={tmp_path}"])
    assert config.train.keep_best == 1 and not config.data.val
    check_settings(config, 1, False)


@pytest.mark.parametrize("name", ["engraving", "ladder/8m", "ladder/45m", "ladder/120m", "ladder/350m"])
def test_recipes_that_pass_over_few_pictures_many_times_keep_the_best_step(name):
    assert load_config(name).train.keep_best == 1


@pytest.mark.parametrize("name", ["train.loss_chunk", "train.keep_best", "train.passes", "adapter.rank"])
def test_a_number_of_0_or_more_is_refused_below(name, tmp_path):
    for override, wrong in ((f"{name}=0", False), (f"{name}=1", False), (f"{name}=-1", True)):
        with pytest.raises(ValueError, match=rf"{name} is -1(\.0)?; it must be 0 or more") if wrong else nullcontext():
            load_config(write(tmp_path, ""), [override])


@pytest.mark.parametrize("name", ["codes.crop_scale", "image_tokenizer_train.crop_scale", "image_tokenizer_train.betas", "train.betas"])
def test_a_pair_of_numbers_has_two(name, tmp_path):
    load_config(write(tmp_path, ""), [f"{name}=[1, 1]"])
    for wrong in ("[]", "[1]", "[1, 1, 1]"):
        with pytest.raises(ValueError, match=rf"{name} is \[.*\]; it takes two numbers"):
            load_config(write(tmp_path, ""), [f"{name}={wrong}"])


@pytest.mark.parametrize(
    "name", ["train.steps", "image_tokenizer.codebook_size", "codes.views", "data.max_caption_tokens", "generator.head_dim"]
)
def test_a_count_is_at_least_1(name, tmp_path):
    load_config(write(tmp_path, ""), [f"{name}=1"])
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=rf"{name} is {wrong}; it must be at least 1"):
            load_config(write(tmp_path, ""), [f"{name}={wrong}"])


def test_two_configs_share_no_lists():
    a, b = Config(), Config()
    a.image_tokenizer.channels.append(1)
    a.train.task_mix["joint"] = 9.0
    assert b == Config()


def test_every_setting_that_a_message_of_tokun_names_exists():
    import re
    from pathlib import Path

    from tokun import config as configs

    sections = {
        f.name: getattr(configs.Config(), f.name)
        for f in dataclasses.fields(configs.Config)
        if dataclasses.is_dataclass(getattr(configs.Config(), f.name))
    }
    named = re.compile(rf"(?<![\w./])({'|'.join(sections)})\.([a-z_]+)(?:=|: )(?=[A-Z\w'\"])")
    found = []
    for path in sorted(Path(configs.__file__).parent.rglob("*.py")):
        for text in re.findall(r'f?"([^"\n]*)"', path.read_text(encoding="utf-8")):
            for section, key in named.findall(text):
                found.append((section, key))
                assert hasattr(sections[section], key), f"{path.name} names {section}.{key}, which does not exist"
    assert ("image_tokenizer_train", "perceptual") in found
    bare = [
        path.name
        for path in Path(configs.__file__).parent.rglob("*.py")
        if re.search(r"set perceptual\b", path.read_text(encoding="utf-8"))
    ]
    assert not bare, "a key without its section is refused by train.py"


def test_home_is_meant_by_a_tilde_wherever_a_path_is_set(tmp_path, monkeypatch):
    """out=~/runs made a folder called ~ here: behind an = the shell leaves it as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("out: ~/runs/a\ntrain: {deepspeed: ~/zero.json}\n")
    config = load_config(
        tmp_path / "c.yaml", ["start=~/model", "image_tokenizer_train.perceptual_weights=~/w.pth", "generator.pretrained=name/model",
         "grpo.prompts=~/p.txt", "grpo.eval_prompts=~/e.txt", "grpo.features=~/f.pth", "grpo.rewards=[{kind: style, of: ~/s.pth}]",
         "grpo.judges=[{kind: aesthetic, of: ~/head.pth, clip: ~/clip}]"],
    )  # fmt: skip
    grpo = config.grpo
    assert [grpo.prompts, grpo.eval_prompts, grpo.features] == [f"{tmp_path}/{name}" for name in ("p.txt", "e.txt", "f.pth")]
    assert [grpo.rewards[0].of, grpo.judges[0].of, grpo.judges[0].clip] == [f"{tmp_path}/{name}" for name in ("s.pth", "head.pth", "clip")]
    assert config.out == f"{tmp_path}/runs/a" and config.start == f"{tmp_path}/model" and config.train.deepspeed == f"{tmp_path}/zero.json"
    assert config.image_tokenizer_train.perceptual_weights == f"{tmp_path}/w.pth" and config.generator.pretrained == "name/model"


def test_home_is_meant_by_a_tilde_in_every_option_that_takes_a_path():
    """No parser makes a Path of what was typed without looking for ~."""
    root = Path(__file__).resolve().parents[1]
    sources = [*root.glob("tokun/**/*.py"), *root.glob("data_tools/**/*.py"), root / "sample.py", root / "train.py"]
    assert not [path for path in sources if "type=Path" in path.read_text(encoding="utf-8")]


def test_the_recipe_for_going_on_has_the_bundled_models_sizes():
    ours, bundled = (load_config(f"configs/{name}.yaml", []) for name in ("finetune", "engraving-cpu"))
    for section in ("text_tokenizer", "image_tokenizer", "generator", "sampling"):
        assert getattr(ours, section) == getattr(bundled, section), section
    assert ours.data.grids == bundled.data.grids and ours.codes == bundled.codes and ours.start == "bundled"
