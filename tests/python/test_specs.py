"""Specifications: defaults, what cannot be, JSON, and which quantizer gets which."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asymq import PerChannel, PerGroup, PerTensor, PerToken, QuantConfig, QuantSpec
from asymq.quantizers import LINKS


def test_defaults():
    assert dataclasses.asdict(QuantSpec()) == {
        "bits": 8,
        "symmetric": False,
        "granularity": {},
        "parameterization": "beta_gamma",
        "sigmoid": False,
        "dynamic": False,
        "fix_min": False,
        "eps": 1e-8,
        "full_range": False,
        "learn": True,
        "link": "identity",
        "gradient_scale": None,
    }
    assert QuantSpec().granularity == PerTensor()
    assert PerChannel().axis is None and PerGroup(4).axis is None
    config = QuantConfig(None, None, None)
    assert (config.overrides, config.skip) == ({}, ())


IMPOSSIBLE = [
    ({"full_range": True}, "full_range belongs to symmetric quantizers"),
    ({"learn": 1}, "learn must be True or False, got 1"),
    (
        {"granularity": PerToken(), "parameterization": "min_max"},
        r"PerToken\(\) belongs to beta_gamma, got parameterization 'min_max'",
    ),
    ({"granularity": PerToken(), "fix_min": True}, r"PerToken\(\) .* fix_min must be False"),
    ({"bits": 1}, "bits must be an integer from 2 to 16, got 1"),
    ({"bits": 17}, "bits must be an integer from 2 to 16, got 17"),
    ({"bits": 8.0}, r"bits .* got 8\.0"),
    ({"bits": "8"}, "bits .* got '8'"),
    ({"granularity": "tensor"}, "granularity must be .* got 'tensor'"),
    ({"granularity": PerTensor}, "granularity must be"),
    ({"parameterization": "minmax"}, "parameterization must be one of .*, got 'minmax'"),
    ({"parameterization": "beta_gamma_sigmoid"}, "parameterization must be one of"),
    ({"link": "tanh"}, "link must be one of identity, sigmoid, exp, softplus, clamp, got 'tanh'"),
    ({"sigmoid": True, "link": "exp"}, "sigmoid=True is link=\"sigmoid\": leave it or .*'exp'"),
    ({"parameterization": "min_max", "link": "exp"}, "link exp belongs to beta_gamma"),
    *(
        ({"gradient_scale": scale}, f'gradient_scale must be None, "lsq" or positive .*{scale}')
        for scale in (0, -1.0, True, "LSQ", float("inf"))
    ),
    ({"parameterization": "kscale_koffset", "symmetric": True}, "kscale_koffset has no symmetric"),
    *(
        ({"parameterization": name, option: True}, f"{message} belongs to beta_gamma, got .*{name}")
        for name in ("scale_offset", "min_max", "kscale_koffset")
        for option, message in {"sigmoid": "link sigmoid", "dynamic": "dynamic"}.items()
    ),
    *(
        ({"parameterization": name, "fix_min": True}, f"fix_min belongs to .* got .*{name}")
        for name in ("scale_offset", "kscale_koffset")
    ),
    *(
        ({"parameterization": name, "fix_min": True, "symmetric": True}, "fix_min .* symmetric")
        for name in ("min_max", "beta_gamma")
    ),
    ({"eps": True}, "eps must be positive and finite, got True"),
    ({"eps": 0.0}, r"eps must be positive.* got 0\.0"),
    ({"eps": -1e-8}, "eps must be positive and finite"),
    ({"eps": float("nan")}, "eps must be positive and finite"),
    ({"eps": float("inf")}, "eps must be positive and finite"),
]


@pytest.mark.parametrize("arguments, message", IMPOSSIBLE, ids=str)
def test_a_spec_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=f"QuantSpec: {message}"):
        QuantSpec(**arguments)


@pytest.mark.parametrize("size", [0, -4])
def test_a_group_without_elements(size):
    with pytest.raises(
        ValueError, match=f"PerGroup: size must be an integer of at least 1, got {size}"
    ):
        PerGroup(size)


def test_a_config_of_something_else():
    with pytest.raises(ValueError, match="activation must be a QuantSpec or None, got 8"):
        QuantConfig(None, 8, None)
    with pytest.raises(ValueError, match=r"overrides\['lm_head\*'\] must be a QuantSpec"):
        QuantConfig(None, None, None, overrides={"lm_head*": "min_max"})


@pytest.mark.parametrize(
    "name, base, weight, sigmoid",
    [
        ("scale_offset", "scale_offset", "scale_offset", False),
        ("min_max", "min_max", "min_max", False),
        ("beta_gamma", "beta_gamma", "beta_gamma", False),
        ("beta_gamma_sigmoid", "beta_gamma", "beta_gamma", True),
        ("kscale_koffset", "kscale_koffset", "scale_offset", False),
    ],
)
def test_table2(name, base, weight, sigmoid):
    activation = QuantSpec(bits=12, parameterization=base, sigmoid=sigmoid)
    assert QuantConfig.table2(name) == QuantConfig(
        weight=QuantSpec(4, True, PerChannel(), weight, sigmoid),
        activation=activation,
        norm_weight=activation,
    )


def test_table2_of_an_unknown_name():
    with pytest.raises(ValueError, match="unknown parameterization 'lsq'; there are scale_offset"):
        QuantConfig.table2("lsq")


RECIPES = ("w4a16", "w4a8", "w8a8", "w4a4", "npu")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_go_to_json_and_back(name):
    config = getattr(QuantConfig, name)()
    assert QuantConfig.from_json(config.to_json()) == config


def test_what_recipes_say():
    by_row, groups = QuantSpec(8, True, PerChannel()), QuantSpec(4, True, PerGroup(64))
    tokens = QuantSpec(8, granularity=PerToken())
    assert QuantConfig.w4a16(group=64) == QuantConfig(groups, embedding=None, head=None)
    assert QuantConfig.w4a8(group=64, cache=8) == QuantConfig(
        groups, input=tokens, cache=tokens, embedding=by_row, head=by_row
    )
    assert QuantConfig.w8a8(cache=4) == QuantConfig(
        by_row,
        input=tokens.replace(symmetric=True),
        cache=tokens.replace(symmetric=True, bits=4),
        embedding=None,
        head=None,
    )
    w4a4 = QuantConfig.w4a4(group=64)
    assert w4a4.weight == groups.replace(full_range=True)
    assert w4a4.input == QuantSpec(4, granularity=PerToken(64))
    assert QuantConfig.w4a4().weight == QuantSpec(4, True, PerChannel(), full_range=True)
    npu = QuantConfig.npu(head=4)
    assert (npu.activation, npu.norm_weight, npu.cache) == (
        QuantSpec(16),
        QuantSpec(16),
        QuantSpec(8),
    )
    assert npu.embedding == npu.head == QuantSpec(4, True, PerChannel())


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_refuse_bits_that_cannot_be(name):
    option = {"w4a16": "group", "npu": "weight"}.get(name, "cache")
    with pytest.raises(ValueError, match=r"(bits|size) must be"):
        getattr(QuantConfig, name)(**{option: 0 if option == "group" else 17})


def test_a_range_of_each_token():
    spec = QuantSpec(granularity=PerToken(32))
    assert spec.dynamic and spec == QuantSpec(granularity=PerToken(32), dynamic=True)
    # It is dynamic for its tokens' sake.
    assert not spec.replace(granularity=PerTensor()).dynamic
    assert spec.replace(bits=4).dynamic
    assert QuantSpec(dynamic=True).replace(granularity=PerChannel()).dynamic


def test_json_of_what_version_0_1_knows_has_no_more_fields():
    assert not {"full_range", "learn"} & QuantSpec().to_dict().keys()
    assert QuantSpec(symmetric=True, full_range=True).to_dict()["full_range"] is True


CONFIGS_THAT_CANNOT_BE = [
    ({"weight": QuantSpec(granularity=PerToken())}, "weight: a weight has no tokens"),
    ({"norm_weight": QuantSpec(granularity=PerToken())}, "norm_weight: a weight has no tokens"),
    ({"head": QuantSpec(granularity=PerToken(4))}, "head: a weight has no tokens"),
    (
        {"overrides": {"weight:*": QuantSpec(granularity=PerToken())}},
        r"overrides\['weight:\*'\]: a weight has no tokens",
    ),
    ({"activation": QuantSpec(), "input": QuantSpec()}, "activation and input exclude each other"),
    ({"embedding": "float"}, "embedding must be a QuantSpec, None or \"weight\", got 'float'"),
    ({"cache": "weight"}, "cache must be a QuantSpec or None, got 'weight'"),
    ({"skip": "inputs:*"}, "'inputs:\\*' matches nothing.*weight, activation, norm_weight, input"),
    ({"overrides": {"kv:*": None}}, "'kv:\\*' matches nothing"),
]


@pytest.mark.parametrize("fields, message", CONFIGS_THAT_CANNOT_BE)
def test_a_config_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=f"QuantConfig: {message}"):
        QuantConfig(**fields)


def _possible(**arguments):
    if arguments["granularity"].of_tokens:
        arguments |= {"parameterization": "beta_gamma", "fix_min": False}
    arguments["full_range"] &= arguments["symmetric"]
    try:
        return QuantSpec(**arguments)
    except ValueError:
        return None


AXES = st.none() | st.integers(-4, 4)
SPECS = st.builds(
    _possible,
    bits=st.integers(2, 16),
    symmetric=st.booleans(),
    granularity=st.one_of(
        st.just(PerTensor()),
        st.builds(PerChannel, axis=AXES),
        st.builds(PerGroup, size=st.integers(1, 4096), axis=AXES),
        st.builds(PerToken, group=st.none() | st.integers(1, 4096)),
    ),
    parameterization=st.sampled_from(["scale_offset", "min_max", "beta_gamma", "kscale_koffset"]),
    sigmoid=st.booleans(),
    dynamic=st.booleans(),
    fix_min=st.booleans(),
    eps=st.floats(1e-30, 1.0),
    full_range=st.booleans(),
    learn=st.booleans(),
    link=st.sampled_from(LINKS),
    gradient_scale=st.none() | st.just("lsq") | st.floats(1e-6, 1e3),
).filter(lambda spec: spec is not None)
OPTIONAL = st.none() | SPECS
OF_WEIGHT = st.none() | SPECS.filter(lambda spec: not spec.granularity.of_tokens)
# A colon stands between a kind and a name.
NAMES = st.text(max_size=5).filter(lambda name: ":" not in name)
CONFIGS = st.builds(
    QuantConfig,
    weight=OF_WEIGHT,
    activation=OPTIONAL,
    norm_weight=OF_WEIGHT,
    cache=OPTIONAL,
    embedding=OF_WEIGHT | st.just("weight"),
    head=OF_WEIGHT | st.just("weight"),
    overrides=st.dictionaries(NAMES, OPTIONAL, max_size=3),
    skip=st.lists(NAMES, max_size=3),
)


@given(SPECS)
def test_spec_json_round_trip(spec):
    text = spec.to_json()
    again = QuantSpec.from_json(text)
    assert again == spec and hash(again) == hash(spec)
    assert json.loads(text)["bits"] == spec.bits


@given(CONFIGS)
def test_config_json_round_trip(config):
    again = QuantConfig.from_json(config.to_json())
    assert again == config
    # The last match decides, so their order matters too.
    assert list(again.overrides) == list(config.overrides)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"bit": 4}, r"QuantSpec: unknown fields \['bit'\]"),
        ({"bits": 1}, "QuantSpec: bits"),
        ({"granularity": {"per": "row"}}, "granularity must be per tensor, channel, group.*row"),
        ({"granularity": {}}, "granularity must be per tensor, channel, group.*None"),
        ({"granularity": {"per": "channel", "size": 4}}, "size"),
        ({"granularity": {"per": "group"}}, "size"),
        ({"granularity": {"per": "group", "size": 0}}, "size must be an integer of at least 1"),
        ({"granularity": {"per": "group", "size": 2.5}}, "size must be an integer of at least 1"),
    ],
)
def test_json_that_says_something_else(values, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec.from_dict(values)
    with pytest.raises(ValueError, match=message):
        QuantConfig.from_dict({"weight": values})


def test_config_json_with_an_unknown_field():
    with pytest.raises(ValueError, match=r"QuantConfig: unknown fields \['weights'\]"):
        QuantConfig.from_dict({"weights": None})


def test_the_last_matching_override_decides_and_skip_wins():
    wide, narrow, narrower = QuantSpec(bits=16), QuantSpec(bits=4), QuantSpec(bits=2)
    config = QuantConfig(
        weight=None,
        activation=QuantSpec(),
        norm_weight=None,
        overrides={"h.*": wide, "h.1.*": narrow, "h.1.mlp*": None, "*.scores": narrower},
        skip=("h.2.*",),
    )
    for name, expected in {
        "h.0.ln": wide,
        "h.1.ln": narrow,
        "h.1.mlp.act": None,
        "h.1.scores": narrower,
        "h.2.ln": None,
        "h.2.scores": None,
        "lm_head": QuantSpec(),
        "H.0.ln": QuantSpec(),
    }.items():
        assert config.spec_of(name, "activation") == expected, name
    assert config.spec_of("lm_head", "weight") is None
    assert config.spec_of("h.0.ln", "weight") == wide


def test_names_that_match_nothing():
    config = QuantConfig(
        None,
        None,
        None,
        overrides={"a.*": None, "b*": QuantSpec()},
        skip=("*.c", "d"),
    )
    assert config.unmatched(dict.fromkeys(["a.x", "e.c"], "weight")) == ["b*", "d"]


def test_skip_may_be_one_name():
    assert QuantConfig(None, None, None, skip="lm_head*").skip == ("lm_head*",)


def test_specs_are_values():
    spec = QuantSpec(bits=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.bits = 5
    overrides = {"a": spec}
    config = QuantConfig(None, None, None, overrides=overrides)
    overrides["b"] = spec
    assert list(config.overrides) == ["a"]


def test_with_parameterization():
    weight = QuantSpec(4, True, PerGroup(8), "beta_gamma", sigmoid=True, eps=1e-6)
    for name, base in {"min_max": "min_max", "kscale_koffset": "scale_offset"}.items():
        assert weight.with_parameterization(name) == QuantSpec(4, True, PerGroup(8), base, eps=1e-6)
    with pytest.raises(ValueError, match="dynamic"):
        QuantSpec(dynamic=True).with_parameterization("min_max")
    with pytest.raises(ValueError, match="unknown parameterization 'gamma'"):
        QuantSpec().with_parameterization("gamma")


def test_sigmoid_is_a_link():
    """One spec whichever of the two says so, as version 0.1 wrote it."""
    spec = QuantSpec(sigmoid=True)
    assert spec == QuantSpec(link="sigmoid") == QuantSpec(sigmoid=True, link="sigmoid")
    assert spec.link == "sigmoid" and QuantSpec(link="sigmoid").sigmoid
    values = spec.to_dict()
    assert QuantSpec(link="sigmoid").to_json() == spec.to_json()
    assert values["sigmoid"] is True and not {"link", "gradient_scale"} & set(values)
    assert QuantSpec.from_dict(values) == spec
    assert spec.replace(sigmoid=False).link == "identity" and spec.replace(bits=4).sigmoid
    exp = spec.replace(link="exp")
    assert (exp.link, exp.sigmoid, exp.to_dict()["link"]) == ("exp", False, "exp")
    assert exp.replace(sigmoid=False) == exp and exp.replace(sigmoid=True) == spec


def test_names_of_links():
    for link in LINKS[1:]:
        spec = QuantSpec(4, True).with_parameterization(f"beta_gamma_{link}")
        assert spec == QuantSpec(4, True, link=link)
        assert spec.with_parameterization("min_max").link == "identity"


def test_scale_of_gradient():
    assert QuantSpec(4).scale_of_gradient(100) == 1
    assert QuantSpec(4, gradient_scale=0.5).scale_of_gradient(100) == 0.5
    assert QuantSpec(4, gradient_scale="lsq").scale_of_gradient(100) == (100 * 15) ** -0.5
    assert QuantSpec(4, True, gradient_scale="lsq").scale_of_gradient(100) == (100 * 7) ** -0.5


# ---- saying the same with other bits -------------------------------------------------------------


def test_replace():
    spec = QuantSpec(4, True, PerChannel())
    assert spec.replace(bits=3) == QuantSpec(3, True, PerChannel())
    with pytest.raises(ValueError, match=r"unknown fields \['bit'\]; it has bits, symmetric"):
        spec.replace(bit=3)
    config = QuantConfig.table2("min_max", weight_bits=3, activation_bits=8)
    assert (config.weight.bits, config.activation.bits, config.norm_weight.bits) == (3, 8, 8)
    assert config.replace(norm_weight=None).norm_weight is None
    assert config.replace(norm_weight=None).weight == config.weight


def test_numpy_integers():
    numpy = pytest.importorskip("numpy")
    spec = QuantSpec(numpy.int64(4), granularity=PerGroup(numpy.int32(8)))
    assert spec == QuantSpec(4, granularity=PerGroup(8)) and type(spec.bits) is int
    spec.to_json()
    for bits in (True, 4.0, "4", None):
        with pytest.raises(ValueError, match="bits must be an integer from 2 to 16, got"):
            QuantSpec(bits)


@pytest.mark.parametrize("option", ["symmetric", "sigmoid", "dynamic", "fix_min"])
def test_options_are_true_or_false(option):
    with pytest.raises(ValueError, match=f"{option} must be True or False, got 'yes'"):
        QuantSpec(**{option: "yes"})


def test_a_parameterization_that_is_an_option():
    with pytest.raises(ValueError, match=r"that is beta_gamma with link='sigmoid'"):
        QuantSpec(parameterization="beta_gamma_sigmoid")


def test_kinds_in_wildcards():
    spec = QuantSpec()
    config = QuantConfig(spec, spec, spec, {"weight:*h.0.*": None}, ("activation:*",))
    assert config.spec_of("h.0.c_fc.weight_quantizer", "weight") is None
    assert config.spec_of("h.0.ln_1.weight_quantizer", "norm_weight") == spec
    assert config.spec_of("h.1.c_fc.weight_quantizer", "weight") == spec
    assert config.spec_of("h.0.ln_1.output_quantizer", "activation") is None
    unmatched = config.unmatched({"h.0.ln_1.weight_quantizer": "norm_weight"})
    assert unmatched == ["weight:*h.0.*", "activation:*"]
    assert QuantConfig.from_json(config.to_json()) == config


def test_a_configuration_of_nothing_but_what_is_named():
    assert QuantConfig(weight=QuantSpec()) == QuantConfig(QuantSpec(), None, None)
    with pytest.raises(ValueError, match=r"overrides must map wildcard names to QuantSpecs"):
        QuantConfig(overrides=["*"])
    with pytest.raises(ValueError, match="QuantConfig: needs an object of named fields, got"):
        QuantConfig.from_json("[]")
    with pytest.raises(ValueError, match="QuantSpec: not JSON"):
        QuantSpec.from_json("{")
