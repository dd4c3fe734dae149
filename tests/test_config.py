"""The configuration: defaults, YAML, overrides, and the sentences about mistakes."""

from __future__ import annotations

import pytest

from kinml_fast.errors import InputError
from kinml_fast.train import config


def load(tmp_path, text, *overrides):
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return config.load(path, overrides)


MINIMAL = "data: {files: [a.db]}\n"


def test_every_key_is_documented():
    assert len(config.keys()) > 40
    assert [key for key, text in config.keys().items() if not text] == []


def test_defaults(tmp_path):
    c = load(tmp_path, MINIMAL)
    assert c.run == "runs/c"
    assert c.network.layers == [48, 24, 12, 1]
    assert c.network.layer_activations == ["gaussian", "gaussian", "gaussian", "identity"]
    assert c.training.optimizer.learning_rate == 1e-3
    assert (c.training.scheduler.name, c.training.scheduler.patience) == ("rop", 25)


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("d.xyz", ["d.xyz"]),
        ("*.xyz", ["*.xyz"]),
        ("[*.xyz, b/*.db ]", ["*.xyz", "b/*.db"]),
        ("[a.db,*.xyz]", ["a.db", "*.xyz"]),
        ("['*.xyz', \"**/*.db\"]", ["*.xyz", "**/*.db"]),
    ],
)
def test_files_on_the_command_line(tmp_path, text, files):
    assert load(tmp_path, MINIMAL, f"data.files={text}").data.files == files
    assert load(tmp_path, MINIMAL, "start.freeze=[*.0]").start.freeze == ["*.0"]


def test_a_pattern_that_yaml_takes_for_an_alias(tmp_path):
    with pytest.raises(InputError, match=r'put it into quotes, like "\*\.xyz"'):
        load(tmp_path, "data: {files: [*.xyz]}\n")


def test_what_is_written_is_read_back(tmp_path):
    c = load(
        tmp_path,
        MINIMAL,
        "data.sae={C: -1035.3, No: 1}",
        "data.names=['%red%', 'no']",
        "training.optimizer.eps=1e-08",
        "data.split=[100, 20, 0]",
    )
    config.save(c, tmp_path / "again.yaml")
    assert config.load(tmp_path / "again.yaml") == c
    assert "epochs: 100" in (tmp_path / "again.yaml").read_text()


def test_the_example_is_valid():
    assert config.load("example", ["training.epochs=3"]).training.epochs == 3


def test_overrides_are_yaml(tmp_path):
    c = load(
        tmp_path,
        MINIMAL + "training: {epochs: 7}\n",
        "training.optimizer.learning_rate=1e-4",
        "network.layers=[64, 1]",
        "training.shuffle=false",
        "training.threads=null",
        "data.temperature=300",
        "run=elsewhere",
    )
    assert c.training.optimizer.learning_rate == 1e-4
    assert c.network.layers == [64, 1]
    assert not c.training.shuffle
    assert c.data.temperature == 300.0
    assert (c.run, c.training.epochs) == ("elsewhere", 7)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("010", 10),
        ("no", "no"),
        ("on", "on"),
        ("True", True),
        ("~", None),
        ("", None),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
    ],
)
def test_plain_scalars_are_those_of_yaml_1_2(text, value):
    (found,) = config.parse_overrides([f"a={text}"]).values()
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("training.learning_rate", "did you mean training.optimizer.learning_rate?"),
        ("training.epoch", "did you mean training.epochs?"),
        ("training.optimiser.name", "did you mean training.optimizer?"),
        ("trainig", "did you mean training?"),
        ("network.xyz", "the keys there are activations, biases, dispersion, layers, repulsion, seed"),
        ("training.epochs.more", "training.epochs"),
    ],
)
def test_unknown_keys_name_the_nearest(tmp_path, key, hint):
    with pytest.raises(InputError) as caught:
        load(tmp_path, MINIMAL, f"{key}=1")
    assert str(caught.value).startswith("command line: ")
    assert hint in str(caught.value)


def test_unknown_key_in_a_file_names_the_file(tmp_path):
    with pytest.raises(
        InputError, match=r"c\.yaml: unknown key training\.batchsize: did you mean training\.batch_size"
    ):
        load(tmp_path, MINIMAL + "training: {batchsize: 3}\n")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.epochs=-1", ["training.epochs = -1", "greater than or equal to 0"]),
        ("training.epochs=2.5", ["training.epochs = 2.5", "integer"]),
        ("training.epochs=many", ["training.epochs = 'many'", "integer"]),
        ("training.epochs=true", ["training.epochs = True", "integer"]),
        ("training.batch_size=0", ["training.batch_size = 0", "greater than 0"]),
        ("training.shuffle=yes", ["training.shuffle = 'yes'", "boolean"]),
        ("training.dtype=float16", ["training.dtype = 'float16'", "'float64' or 'float32'"]),
        ("training.optimizer.learning_rate=0", ["training.optimizer.learning_rate = 0", "greater than 0"]),
        ("training.optimizer.learning_rate=.nan", ["training.optimizer.learning_rate = nan", "finite"]),
        ("training.optimizer.learning_rate=.inf", ["training.optimizer.learning_rate = inf", "finite"]),
        ("training.optimizer.name=lion", ["'lion'", "'adam', 'adamw' or 'sgd'"]),
        ("training.optimizer.betas=[0.9]", ["training.optimizer.betas = [0.9]", "at least 2 items"]),
        ("training.optimizer.betas=[0.9, 1]", ["training.optimizer.betas", "less than 1"]),
        ("training.optimizer.nesterov=true", ["training.optimizer", "momentum above 0"]),
        ("training.optimizer=adam", ["training.optimizer = 'adam'", "a section with keys (name, learning_rate"]),
        ("training.scheduler.factor=1", ["training.scheduler.factor = 1", "less than 1"]),
        ("training.loss.forces=yes", ["training.loss.forces = 'yes'", "boolean"]),
        ("training.loss.force_weight=1.1", ["training.loss.force_weight = 1.1", "less than or equal to 1"]),
        ("training.loss.weighting=fixed", ["'fixed'", "'static' or 'learned'"]),
        ("training.loss.forces_until=0", ["training.loss.forces_until = 0", "greater than 0"]),
        ("training.loss={forces_from: 5, forces_until: 5}", ["training.loss", "later than forces_from, which is 5"]),
        ("training.loss.extra_weights={dipole: -1}", ["training.loss.extra_weights", "greater than or equal to 0"]),
        ("training.score.energy=0", ["training is not allowed", "score.energy is 0 and nothing else is judged"]),
        ("training.jacobian=none", ["'none'", "'recompute' or 'stored'"]),
        ("data.weights={C5H5/1: -1}", ["data.weights", "a number that is not negative for each label"]),
        ("data.weights=2", ["data.weights = 2", "it must be a file, or a number"]),
        ("training.ema_decay=1.5", ["training.ema_decay = 1.5", "less than 1"]),
        ("network.layers=[]", ["network.layers = []", "the last layer must be 1"]),
        ("network.layers=[48, 2]", ["network.layers = [48, 2]", "the last layer must be 1"]),
        ("network.layers=[48, 0, 1]", ["network.layers", "greater than 0"]),
        ("network.layers=48", ["network.layers = 48", "list"]),
        ("network.activations=[gaussian, identity]", ["4 entries", "has 2", "one activation for each layer"]),
        ("network.activations=[gauss, tanh, tanh, identity]", ["'gauss'", "identity, gaussian, tanh", "silu"]),
        ("descriptor.cutoffs=[5.2]", ["descriptor.cutoffs = [5.2]", "at least 2"]),
        ("descriptor.beta=1.2", ["descriptor.beta = 1.2", "less than or equal to 1"]),
        ("data.files=3", ["data.files = 3", "list"]),
        ("data.files=[]", ["data.files = []", "at least 1"]),
        ("data.split=[1, 2]", ["data.split = [1, 2]", "three numbers"]),
        ("data.split=[0.5, -0.1, 0.1]", ["data.split", "not negative"]),
        ("data.sae=fitted", ["data.sae = 'fitted'", "fit, none, or an energy"]),
        ("data.sae={C: x}", ["data.sae", "fit, none, or an energy"]),
        ("data=null", ["data = None", "a section with keys (files, fidelity"]),
    ],
)
def test_values_that_are_not_allowed(tmp_path, override, parts):
    with pytest.raises(InputError) as caught:
        load(tmp_path, MINIMAL, override)
    message = str(caught.value)
    assert message.startswith("command line: ")
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_epochs_with_forces(tmp_path):
    def phases(*overrides):
        loss = load(tmp_path, MINIMAL, *(f"training.loss.{override}" for override in overrides)).training.loss
        return [loss.has_forces(epoch) for epoch in range(4)]

    assert phases() == [False] * 4
    assert phases("forces=true") == [True] * 4
    assert phases("forces=true", "forces_from=1") == [False, True, True, True]
    assert phases("forces=true", "forces_from=1", "forces_until=3") == [False, True, True, False]
    assert phases("forces_from=1") == [False] * 4


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("training: {epochs: 3}\n", ["c.yaml: data is missing"]),
        ("data: {fidelity: 1}\n", ["c.yaml: data.files is missing", "glob patterns"]),
        (MINIMAL + "training: [\n", ["c.yaml line 3", "YAML"]),
        (MINIMAL + "data: {files: [b.db]}\n", ["c.yaml line 2", "the key data twice"]),
        ("- 1\n", ["c.yaml", "must hold sections"]),
        ("", ["c.yaml", "must hold sections"]),
        (MINIMAL + "training: {epochs: 0.5}\n", ["c.yaml: training.epochs = 0.5"]),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, parts):
    with pytest.raises(InputError) as caught:
        load(tmp_path, text)
    for part in parts:
        assert part in str(caught.value)


def test_missing_binary_and_malformed_input(tmp_path):
    with pytest.raises(InputError, match="no such file; give a configuration file, or example or forces"):
        config.load(tmp_path / "nothing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as a configuration"):
        config.load(tmp_path / "binary.yaml")
    with pytest.raises(InputError, match=r"'training\.epochs' on the command line: expected key=value"):
        config.parse_overrides(["training.epochs"])
    with pytest.raises(InputError, match=r"network\.layers on the command line.*YAML"):
        config.parse_overrides(["network.layers=[1"])


def test_options_without_effect_are_named(tmp_path):
    c = load(tmp_path, MINIMAL, "training.optimizer.momentum=0.9", "training.scheduler.gamma=0.5")
    assert c.training.ignored() == [
        "training.optimizer.momentum has no effect with training.optimizer.name = adam",
        "training.scheduler.gamma has no effect with training.scheduler.name = rop",
    ]
    forces = ["training.loss.forces_from=3", "training.score.forces=2"]
    assert load(tmp_path, MINIMAL, *forces).training.ignored() == [
        f"training.{key} has no effect with training.loss.forces = false"
        for key in ("loss.forces_from", "score.forces")
    ]
    with pytest.raises(InputError, match=r"which computes only what is stored: set training\.jacobian=stored too"):
        load(tmp_path, MINIMAL, "descriptor.backend=aevmod")
    assert load(tmp_path, MINIMAL, "descriptor.backend=aevmod", "training.jacobian=stored").training.ignored() == []
    learned = ["training.loss.forces=true", "training.loss.weighting=learned", "training.loss.force_weight=0.5"]
    assert load(tmp_path, MINIMAL, *learned).training.ignored() == [
        "training.loss.force_weight has no effect with training.loss.weighting = learned"
    ]
    assert load(tmp_path, MINIMAL, *forces, "training.loss.forces=true").training.ignored() == []
    sgd = ["training.optimizer.momentum=0.9", "training.optimizer.name=sgd"]
    assert load(tmp_path, MINIMAL, *sgd).training.ignored() == []
