"""The networks: published outputs, parameters and FLOPs; checkpoints in every form; the plain twins; errors."""

from __future__ import annotations

import copy
import functools
import json
import logging
import pickle
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import esr_kernels
import python_models
from esr_kernels.checkpoint import CheckpointError, load_state_dict
from esr_kernels.modules import ESA, BSConvS, LayerNorm2d, ModulatingConv1x1, PixelNorm
from esr_kernels.reparam import Reparameterized, deploy

MODELS = python_models.list_models()
BACKENDS = [b.name for b in esr_kernels.list_backends() if b.available]
# Without a GPU its backends are emulated, a hundred times slower than the others.
EMULATED = set() if torch.cuda.is_available() else {"native-cuda", "triton"}
EMULATED_MODELS = ("span", "span_tiny", "rlfn")
# Those with pooled branches and resized gates.
POOLED = ("egfmn", "gfmn", "smfan", "safmn_pp", "pfdn_lite")
# No weights were published: the golden outputs were made with synthetic ones.
SYNTHETIC = ("efficient_srgan", "magicsr")
# Enough of a network where its outputs are not compared with published ones.
SMALLER: dict[str, dict[str, Any]] = {
    "efficient_srgan": {"num_blocks": 1},
    "agdn": {"num_blocks": 1},
    "msn": {"num_blocks": 1},
    "craft": {"num_layers": 1, "channels": 32},
    "dvmsr": {"num_layers": 1},
    "magicsr": {"channels": 16},
}
# What `optimize` makes one operator of.
WHOLE = {"span", "span_tiny", "rlfn", "r2net", "rden", "slim_rlfn", "rfdn", "eern", "dipnet"}
WHOLE |= {"smrn", "ifadnet", "lsanet", "rlfn_bn", "light_rlfn", "depth_rlfn", "errn", "safmn_pp", "rlff", "rcn"}
WHOLE |= {"egfmn", "gfmn", "asr_prune", "emaxgman"}
# Those with a training form of their own.
FORMS = ("span", "rden", "rcn", "ifadnet", "lsanet", "r2net", "errn", "smrn", "pfdn_lite")
# What is in a checkpoint and never runs: no gradients.
UNUSED: dict[str, tuple[str, ...]] = {"dirn": ("block_5.", "block_6."), "craft": (".pos.",)}
# What fvcore does not see beside convolutions with padding "same": inside a function of the published network's own.
HIDDEN = {"dvmsr": ("conv1d", "x_proj", "dt_proj", "out_proj")}
# Scans of 16 states: channels of all. Before each is a convolution of four taps that also computes three tokens behind
# the last; the fused one has three taps of zeros instead.
SCANNED = {"dvmsr": 8 * 120}
# Channels of all maps that `modulate` enlarges bilinearly.
RESIZED = {"pfdn_lite": 4 * 48, "safmn_pp": 6 * 12}
# Sides of smaller images, for networks whose FLOPs are proportional to the pixels and whose trace is long.
PROPORTIONAL = {"dvmsr": 16, "magicsr": 64, "craft": 64}


def on_backends(names: Sequence[str] = MODELS) -> Any:
    """Parametrises `name` and `backend`: every model, on an emulated backend a few."""
    runs = [(n, b) for n in names for b in BACKENDS if b not in EMULATED or n in EMULATED_MODELS]
    return pytest.mark.parametrize(("name", "backend"), runs, indirect=["backend"])


def weights_file(shared_models: Path, name: str) -> Path:
    """The published checkpoint; of two the one that was ranked."""
    return min((shared_models / "weights").glob(f"team{python_models.card(name).team_id:02d}_*"))


def synthetic(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights drawn by name, as the README beside the golden outputs says."""
    result = {}
    for key, like in state.items():
        a = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(tuple(like.shape)).astype(np.float32)
        if like.dim() > 1:
            a = a / np.float32(np.sqrt(np.prod(like.shape[1:])))
        else:
            a = 1 + np.float32(0.1) * a if key.endswith("weight") else np.float32(0.01) * a
        result[key] = torch.from_numpy(a) if like.is_floating_point() else like
    return result


def published(shared_models: Path, name: str) -> Any:
    """The network with its published weights."""
    if name not in SYNTHETIC:
        return python_models.create(name, weights_file(shared_models, name), entry=python_models.card(name).entry)
    model = python_models.create(name)
    model.load_state_dict(synthetic(model.state_dict()), strict=True)
    return model


@pytest.fixture(scope="module")
def networks(shared_models: Path) -> Any:
    """Published networks by name, read once for all the tests that only run them."""
    return functools.cache(lambda name: published(shared_models, name))


@pytest.fixture(scope="module")
def optimized(shared_models: Path) -> Any:
    """`optimize` of a published network, which takes longer to trace than to run: once for all its tests."""
    return functools.cache(lambda name: esr_kernels.optimize(published(shared_models, name)))


def golden(shared_models: Path, name: str, case: str, suffix: str = "") -> tuple[Tensor, Tensor]:
    """Input and output of the published network."""
    number = python_models.card(name).team_id
    data = np.load(shared_models / "golden" / f"team{number:02d}{suffix}.npz")
    return torch.from_numpy(data[f"input{case}"]), torch.from_numpy(data[f"output{case}"])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a.detach().double() - b.detach().double()).abs().max() / b.detach().double().abs().max())


def image(model: Any, height: int, width: int, batch: int = 1) -> Tensor:
    return torch.rand(batch, model.in_channels, height, width) * model.data_range


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


# --- what was published -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["A", "B"])
@on_backends()
def test_golden(shared_models: Path, networks: Any, optimized: Any, name: str, case: str, backend: str) -> None:
    x, expected = golden(shared_models, name, case)
    model = networks(name)
    allowed = 1e-4 * model.data_range
    with torch.no_grad():
        if name in WHOLE:
            fast = optimized(name)
            assert fast.plan is not None, str(fast.report())
            assert float((fast(x) - expected).abs().max()) <= allowed
        if backend == "triton" and backend in EMULATED:
            return  # in the interpreter one run takes a quarter of a minute
        assert float((model(x) - expected).abs().max()) <= allowed
        if name in EMULATED_MODELS and (case == "B" or backend not in EMULATED):
            x = x.contiguous(memory_format=torch.channels_last)
            assert float((model(x) - expected).abs().max()) <= allowed


@pytest.mark.skipif(not EMULATED, reason="a GPU runs every network on every backend")
@pytest.mark.parametrize("name", POOLED)
def test_golden_of_pooled_branches_in_the_emulator(shared_models: Path, networks: Any, name: str) -> None:
    if "native-cuda" not in BACKENDS:
        pytest.skip("native-cuda is not available here")
    x, expected = golden(shared_models, name, "B")
    model = networks(name)
    with torch.no_grad(), esr_kernels.use_backend("native-cuda"):
        assert float((model(x) - expected).abs().max()) <= 1e-4 * model.data_range


@pytest.mark.parametrize("name", ["efficient_srgan", "egfmn", "msn"])
def test_optimize_of_a_smaller_network(name: str) -> None:
    model = python_models.create(name, **SMALLER.get(name, {}))
    fast = esr_kernels.optimize(model)
    x = image(model, model.minimum_size + 8, model.minimum_size + 7)
    with torch.no_grad():
        assert relative(fast(x), model(x)) <= 1e-5
    assert fast.plan is not None or "has no fused form" in str(fast.report())


@pytest.mark.parametrize(
    ("name", "weights", "suffix", "case"),
    [
        ("agdn", None, "_multiwin", "C"),
        ("slim_rlfn", "team21_slimrlfn_prune.pth", "_prune", "A"),
        ("slim_rlfn", "team21_slimrlfn_prune.pth", "_prune", "B"),
    ],
)
def test_golden_of_other_inputs_and_weights(
    shared_models: Path, name: str, weights: str | None, suffix: str, case: str
) -> None:
    path = shared_models / "weights" / weights if weights else weights_file(shared_models, name)
    model = python_models.create(name, path)
    if weights:
        assert model.options["mid_channels"] == (28, 28, 28, 28, 28, 30)
        assert sum(p.numel() for p in model.parameters()) == 197_134
    x, expected = golden(shared_models, name, case, suffix)
    with torch.no_grad():
        assert float((model(x) - expected).abs().max()) <= 1e-4 * model.data_range


@pytest.mark.parametrize("case", ["A", "B"])
def test_golden_of_another_range(shared_models: Path, case: str) -> None:
    model = python_models.create("craft", weights_file(shared_models, "craft"), data_range=1.0)
    x, expected = golden(shared_models, "craft", case, "_range1")
    with torch.no_grad():
        assert float((model(x) - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize("name", ["rcn", "ifadnet", "lsanet"])
def test_training_form_in_files(shared_models: Path, name: str) -> None:
    folder = shared_models / "fold"
    data = {k: torch.from_numpy(v) for k, v in np.load(folder / f"{name}_trainform_RANDOM.npz").items()}
    with torch.no_grad():
        for file, options, key in (
            ("trainform", {"deploy": False}, "y_train"),
            ("trainform", {}, "y_deploy"),
            ("deployform", {}, "y_deploy"),
        ):
            model = python_models.create(name, folder / f"{name}_{file}_RANDOM.pth", **options)
            assert relative(model(data["x"]), data[key]) <= 1e-4
    with pytest.raises(CheckpointError, match="slim form"):
        python_models.create(name, folder / f"{name}_deployform_RANDOM.pth", deploy=False)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in SYNTHETIC])
def test_strict_in_the_published_form(shared_models: Path, name: str) -> None:
    path = weights_file(shared_models, name)
    state = load_state_dict(path, entry=python_models.card(name).entry)
    python_models.create(name).load_state_dict(state, strict=True)
    plain = python_models.plain(name, path, entry=python_models.card(name).entry).state_dict()
    assert plain.keys() == state.keys()
    assert all(torch.equal(plain[k], v) for k, v in state.items())


@pytest.mark.parametrize("name", MODELS)
def test_cards_agree_with_table_1(shared_models: Path, name: str) -> None:
    rows = {r["id"]: r for r in json.loads((shared_models / "table1.json").read_text())}
    card = python_models.card(name)
    row = rows[card.team_id]
    assert card.team == row["team"]
    assert card.title == row["model"]
    assert (card.section or "-") == row["section"]
    assert card.parameters == row["params"]
    assert round(card.flops / 1e9, 2) == row["flops_g"]
    if row["flops_fvcore_g"] is not None:
        assert card.flops == round(row["flops_fvcore_g"] * 1e9)
    assert card.data_range == row["data_range"]
    assert card.table1 is not None
    assert all(row.get(k) == (None if v is None else pytest.approx(v, rel=1e-9)) for k, v in card.table1.items())


def fvcore_flops(name: str) -> int:
    """For an image of 256 x 256 or PROPORTIONAL's side."""
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)

    def count(side: int, **options: Any) -> int:
        model = python_models.create(name, **options).requires_grad_(False)
        return FlopCountAnalysis(model, torch.rand(1, 3, side, side)).unsupported_ops_warnings(False).total()

    if name != "efficient_srgan":
        return count(PROPORTIONAL.get(name, 256))
    # Too large to run: it grows with the area, and by the same for each of its 23 blocks.
    one, two = count(8, num_blocks=1), count(8, num_blocks=2)
    return (256 // 8) ** 2 * (one + 22 * (two - one))


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_flops(name: str) -> None:
    card = python_models.card(name)
    published = fvcore_flops(name)
    side = PROPORTIONAL.get(name, 256)

    # On the meta device nothing is computed.
    with torch.device("meta"):
        model, twin, x = python_models.create(name), python_models.plain(name), torch.rand(1, 3, side, side)
    assert sum(p.numel() for p in model.parameters()) == card.parameters
    hidden = left_out = constant = 0

    def hide(module: Any, _inputs: Any, out: Tensor) -> None:
        nonlocal hidden
        hidden += out.numel() * module.weight[0].numel()

    def leave_out(module: Any, _inputs: Any, out: Tensor) -> None:
        nonlocal left_out, constant
        products = out.numel() * module.weight[0].numel() if isinstance(module, torch.nn.Linear) else 0
        left_out += 2 * products
        constant += products + 5 * out.numel() * isinstance(module, torch.nn.LayerNorm)

    for key, module in twin.named_modules():
        # fvcore does not see convolutions whose padding is written as "same".
        if getattr(module, "padding", None) == "same" or key.endswith(HIDDEN.get(name, ("\0",))):
            module.register_forward_hook(hide)
        if any(part in key for part in UNUSED.get(name, ())):
            module.register_forward_hook(leave_out)
    with FlopCounterMode(display=False) as plain:
        twin(x)
    scanned = SCANNED.get(name, 0)
    zeros = scanned * (3 * side**2 - 4 * 3)
    assert published == (card.flops - constant) * side**2 // 256**2 + constant + hidden + zeros
    normalised = 0

    def count_normalised(_module: Any, _inputs: Any, out: Tensor) -> None:
        nonlocal normalised
        normalised += out.numel()

    spared = 0

    def count_spared(module: Any, inputs: Any, out: Tensor) -> None:
        """What the 1x1 convolution of small maps does not do at the full size."""
        nonlocal spared
        for t in inputs[0]:
            spared += 2 * t.shape[1] * module.out_channels * (out[:, 0].numel() - t[:, 0].numel())

    products = 0

    def count_products(_module: Any, _inputs: Any, out: Tensor) -> None:
        """Nine taps of the product instead of three and three."""
        nonlocal products
        products += 2 * 3 * out.numel()

    for module in model.modules():
        if isinstance(module, BSConvS) and module.stride == 1:
            module.register_forward_hook(count_products)
        elif isinstance(module, LayerNorm2d | PixelNorm):
            module.register_forward_hook(count_normalised)
        elif isinstance(module, ModulatingConv1x1):
            module.register_forward_hook(count_spared)
    with FlopCounterMode(display=False) as fused:
        model(x)
    # More than products is counted of values that are resized bilinearly, four multiply-adds, or normalised, seven.
    channels = sum(m.conv1.out_channels for m in model.modules() if isinstance(m, ESA)) + RESIZED.get(name, 0)
    more = 2 * 4 * channels * x[0, 0].numel() + 7 * normalised + products
    more += 2 * zeros + scanned * side**2 * (6 * 16 + 4)
    assert fused.get_total_flops() == plain.get_total_flops() - left_out - spared + more


# --- the registry -------------------------------------------------------------------------------------------------


def test_registry() -> None:
    assert MODELS[:2] == ["span", "span_tiny"]
    for name in MODELS:
        card = python_models.card(name)
        assert card.name == name
        model = python_models.create(name)
        assert (model.name, model.scale, model.data_range) == (name, card.scale, card.data_range)
        assert not model.training
        twin = python_models.plain(name)
        assert not twin.training
        for attribute in ("name", "scale", "data_range", "receptive_radius", "minimum_size", "in_channels"):
            assert getattr(twin, attribute) == getattr(model, attribute)
        shapes = {k: v.shape for k, v in model.state_dict().items()}
        assert {k: v.shape for k, v in twin.state_dict().items()} == shapes
    assert python_models.create("span").receptive_radius == 21
    assert python_models.create("rlfn").receptive_radius is None
    assert python_models.create("rlfn").minimum_size == 15


@pytest.mark.parametrize("function", [python_models.create, python_models.plain, python_models.card])
def test_unknown_name(function: Any) -> None:
    with pytest.raises(ValueError, match=r"name: unknown model 'rlnf', did you mean 'rlfn'\? known: span, span_tiny"):
        function("rlnf")
    with pytest.raises(ValueError, match="name: unknown model 'xyzzy', known: span"):
        function("xyzzy")


def test_bad_options() -> None:
    with pytest.raises(TypeError, match=r"feature_channel: span has no such option, did you mean 'feature_channels'\?"):
        python_models.create("span", feature_channel=28)
    with pytest.raises(TypeError, match="norm: rlfn has no such option"):
        python_models.plain("rlfn", norm=False)
    with pytest.raises(ValueError, match="upscale: must be at least 1, got 0"):
        python_models.create("span", upscale=0)
    with pytest.raises(ValueError, match="num_blocks: must be at least 1, got 0"):
        python_models.create("rlfn", num_blocks=0)
    with pytest.raises(ValueError, match="norm: the mean has 3 values for 1 input channels; use norm=False"):
        python_models.create("span", in_channels=1)
    with pytest.raises(ValueError, match="entry: chooses inside a checkpoint"):
        python_models.create("span", entry="params")


@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_deploy(name: str) -> None:
    model = python_models.create(name, deploy=False)
    assert deploy(model).state_dict().keys() == python_models.plain(name, deploy=False).state_dict().keys()


def test_seedable() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(python_models.create("span").state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


# --- training form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"feature_channels": 12, "upscale": 2}], ids=["published", "small"])
@pytest.mark.parametrize("name", FORMS)
def test_training_form_is_the_deploy_form(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """In float64, on images so small that every pixel is near a border; state dicts enter where they can."""
    trained = python_models.create(name, deploy=False, **options)
    assert not any(m.deployed for m in trained.modules() if isinstance(m, Reparameterized))
    with torch.no_grad():
        for p in trained.parameters():  # initial biases are too small to show
            p.add_(0.02 * torch.randn_like(p))
    path = saved(tmp_path / "trained.pth", trained.state_dict())
    folded, slim = deploy(trained), python_models.create(name, **options)
    assert folded.state_dict().keys() == slim.state_dict().keys() != trained.state_dict().keys()
    exact, x = copy.deepcopy(trained).double(), image(trained, trained.minimum_size, trained.minimum_size + 2).double()
    with torch.no_grad():
        expected = exact(x)
        assert relative(deploy(exact)(x), expected) < 1e-12
        slim.double().load_state_dict(exact.state_dict(), strict=True)
        assert relative(slim(x), expected) < 1e-12
        for form in (True, False):
            model = python_models.create(name, path, deploy=form, **options)
            assert any(m.deployed == form for m in model.modules() if isinstance(m, Reparameterized))
            assert relative(model.double()(x), expected) < 1e-5
    with pytest.raises(RuntimeError, match="slim form"):
        trained.load_state_dict(folded.state_dict())
    with pytest.raises(CheckpointError, match="slim form"):
        python_models.create(name, saved(tmp_path / "slim.pth", folded.state_dict()), deploy=False, **options)


@pytest.mark.parametrize("name", FORMS)
def test_every_branch_learns(name: str) -> None:
    """Every weight; the biases before edge kernels, whose sum is zero, have nothing to learn."""
    model = python_models.create(name, deploy=False).train()
    x = image(model, 20, 18, batch=2)
    model(x).sub(model.data_range / 2).square().mean().backward()
    for module in model.modules():
        if isinstance(module, Reparameterized):
            for key, p in module.named_parameters():
                assert p.grad is not None and (p.dim() == 1 or float(p.grad.abs().max()) > 0), key


# --- fused against plain ------------------------------------------------------------------------------------------

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("span", {"feature_channels": 48, "upscale": 2, "norm": False}),
    ("span", {"feature_channels": 52, "num_blocks": 2}),
    ("span", {"feature_channels": 9, "upscale": 3, "in_channels": 1, "out_channels": 1, "norm": False, "bias": False}),
    ("span", {"feature_channels": 10, "deploy": False, "gain": 3}),
    ("rlfn", {"feature_channels": 20, "mid_channels": 12, "num_blocks": 2, "esa_channels": 8, "upscale": 2}),
]


def twins(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    model = python_models.create(name, **options)
    twin = python_models.plain(name, **model.options)
    twin.load_state_dict(deploy(model).state_dict())
    return model, twin


def equal_to_the_plain_twin(name: str, options: dict[str, Any], sizes: set[tuple[int, int]]) -> None:
    model, twin = twins(name, options)
    exact = copy.deepcopy(twin).double()
    with torch.no_grad():
        for size in sorted(sizes):
            x = image(model, *size)
            y, expected = model(x), exact(x.double())
            assert y.shape[2:] == (size[0] * model.scale, size[1] * model.scale)
            # Numbers of +-127 go through float32 convolutions here: plain PyTorch's own error counts too.
            assert relative(y, expected) <= max(1e-4, 3 * relative(twin(x), expected))


@on_backends()
def test_equal_to_the_plain_twin(name: str, backend: str) -> None:
    options = SMALLER.get(name, {})
    smallest = python_models.create(name, **options).minimum_size
    equal_to_the_plain_twin(name, options, {(smallest, smallest), (smallest + 1, smallest + 4)})


@pytest.mark.skipif(not EMULATED, reason="a GPU runs every network on every backend")
@pytest.mark.parametrize(
    ("name", "backend"),
    [("r2net", "native-cuda"), ("rfdn", "native-cuda"), ("lsanet", "native-cuda")],
    indirect=["backend"],
)
def test_smallest_image_on_an_emulated_backend(name: str, backend: str) -> None:
    """Between them: no biases, residuals before the activation, reflection padding, every ESA."""
    if backend not in BACKENDS:
        pytest.skip(f"{backend} is not available here")
    smallest = python_models.create(name).minimum_size
    equal_to_the_plain_twin(name, {}, {(smallest, smallest)})


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_options_equal_to_the_plain_twin(name: str, options: dict[str, Any], backend: str) -> None:
    equal_to_the_plain_twin(name, options, {(15, 15), (16, 19)})


@pytest.mark.parametrize("name", MODELS)
def test_batch(name: str) -> None:
    model = python_models.create(name, **SMALLER.get(name, {}))
    x = image(model, max(16, model.minimum_size), model.minimum_size + 3, batch=3)
    with torch.no_grad():
        together, apart = model(x), torch.cat([model(x[i : i + 1]) for i in range(3)])
        assert relative(together, apart) <= 1e-5
        assert model(x[:0]).shape == (0, *together.shape[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@on_backends()
def test_half_types(name: str, dtype: torch.dtype, backend: str) -> None:
    model, twin = twins(name, SMALLER.get(name, {}))
    x = image(model, max(24, model.minimum_size), max(21, model.minimum_size)).to(dtype)
    model, twin = model.to(dtype), twin.to(dtype)
    with torch.no_grad():
        exact = copy.deepcopy(twin).double()(x.double())
        y = model(x)
        assert y.dtype == dtype
        assert relative(y, exact) <= max(2 * relative(twin(x), exact), torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("span", {"feature_channels": 4}),
        ("span", {"feature_channels": 4, "num_blocks": 2}),
        ("errn", {"feature_channels": 4}),
        ("efqn", {"feature_channels": 4}),
        ("efficient_srgan", {"feature_channels": 3, "growth_channels": 2, "num_blocks": 1}),
    ],
)
def test_receptive_radius(name: str, options: dict[str, Any]) -> None:
    model = python_models.create(name, **options).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 if name in ("span", "efqn") else 6)  # the influence of the furthest pixel would vanish in rounding
    radius = model.receptive_radius
    assert radius is not None
    x = image(model, 2 * radius + 5, 3).double()
    y = x.clone()
    y[:, :, 0] += 0.5
    with torch.no_grad():
        changed = (model(x) - model(y)).abs().amax((0, 1, 3)).view(-1, model.scale).amax(1) > 0
    assert changed[radius] or name == "efqn"  # whose features may all be at their bounds
    assert not changed[radius + 1 :].any()


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_round_trip(name: str) -> None:
    model = python_models.create(name, **SMALLER.get(name, {}))
    x = image(model, model.minimum_size + 1, model.minimum_size)
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), expected)
            assert other.options == model.options
        other = python_models.create(name, **model.options)
        assert not torch.equal(other(x), expected)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {"deploy": False}) for name in FORMS), *((name, SMALLER.get(name, {})) for name in MODELS)],
)
def test_one_step_trains(name: str, options: dict[str, Any]) -> None:
    model = python_models.create(name, **options).train()
    x = image(model, max(16, model.minimum_size), max(18, model.minimum_size), batch=2)
    target = torch.rand(2, 3, 4 * x.shape[2], 4 * x.shape[3]) * model.data_range
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = (model(x) - target).abs().mean()
        loss.backward()
        for key, p in model.named_parameters():
            if any(part in key for part in UNUSED.get(name, ())):
                assert p.grad is None
            else:
                assert p.grad is not None and bool(torch.isfinite(p.grad).all()), key
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_mean_is_not_saved_and_moves_with_the_model() -> None:
    model = python_models.create("span")
    assert not any("mean" in k for k in model.state_dict())
    assert model.to(torch.float64).mean.dtype == torch.float64


# --- inputs -------------------------------------------------------------------------------------------------------


def test_bad_images() -> None:
    span, rlfn = python_models.create("span"), python_models.create("rlfn")
    with pytest.raises(ValueError, match="x: rlfn needs images of at least 15 x 15 pixels, got 14 x 40"):
        rlfn(torch.rand(1, 3, 14, 40))
    for shape in ((3, 20, 20), (1, 1, 20, 20), (1, 4, 20, 20), (1, 3, 0, 20)):
        with pytest.raises(ValueError, match=r"x: span (takes|needs) images"):
            span(torch.rand(shape))
    with pytest.raises(TypeError, match=r"x: span takes floating-point images in \[0, 1\], got torch.uint8"):
        span(torch.zeros(1, 3, 20, 20, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"x: expected a torch\.Tensor, got ndarray"):
        span(np.zeros((1, 3, 20, 20)))
    with pytest.raises(TypeError, match="float16"):
        span(torch.rand(1, 3, 20, 20).half())
    assert span(torch.rand(0, 3, 20, 20)).shape == (0, 3, 80, 80)


# --- checkpoints --------------------------------------------------------------------------------------------------


def loads(path: Path, source: Any, name: str = "span", **options: Any) -> Any:
    """The model made from the file; asserts that it computes what `source` does."""
    model = python_models.create(name, path, **options)
    assert not model.training
    x = image(model, 16, 15)
    with torch.no_grad():
        assert relative(model(x), source(x)) < 1e-4
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"params": s},
        lambda s: {"params_ema": s, "params": {k: v * 0 for k, v in s.items()}},
        lambda s: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
    ],
    ids=["bare", "params", "params_ema", "state_dict+module", "module"],
)
@pytest.mark.parametrize("form", ["slim", "training"])
def test_forms_and_wrappers(tmp_path: Path, wrap: Any, form: str) -> None:
    source = python_models.create("span", feature_channels=12, deploy=form == "slim")
    state = dict(source.state_dict())
    if form == "training":
        for k, v in deploy(source).state_dict().items():
            state.setdefault(k, v + 1)  # eval_conv beside its branches, stale
    path = saved(tmp_path / "w.pth", wrap(state))
    model = loads(path, source)
    assert set(model.state_dict()) == set(deploy(source).state_dict())
    assert model.options["feature_channels"] == 12
    plain = python_models.plain("span", path)
    assert all(torch.equal(plain.state_dict()[k], v) for k, v in model.state_dict().items())


def test_training_form_for_training(tmp_path: Path) -> None:
    source = python_models.create("span", feature_channels=8, deploy=False, gain=3)
    model = loads(saved(tmp_path / "w.pth", source.state_dict()), source, deploy=False)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in source.state_dict().items())
    slim = saved(tmp_path / "slim.pth", deploy(source).state_dict())
    with pytest.raises(CheckpointError, match=r"slim\.pth: the state dict is in slim form.*deploy=True"):
        python_models.create("span", slim, deploy=False)


def test_entry(tmp_path: Path) -> None:
    a, b = python_models.create("span", feature_channels=8), python_models.create("span", feature_channels=8)
    path = saved(tmp_path / "w.pth", {"params": a.state_dict(), "params_ema": b.state_dict()})
    loads(path, b)
    loads(path, a, entry="params")


def test_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = python_models.create("rlfn")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    loads(tmp_path / "w.safetensors", source, "rlfn")


@pytest.mark.parametrize(
    "options",
    [
        {"feature_channels": 48, "norm": False},
        {"feature_channels": 52, "upscale": 2},
        {"feature_channels": 8, "upscale": 1, "num_blocks": 3},
        {"feature_channels": 8, "in_channels": 1, "out_channels": 1, "norm": False},
        {"feature_channels": 8, "in_channels": 1, "out_channels": 3, "norm": False},
        {"feature_channels": 8, "bias": False},
    ],
)
def test_span_options_come_from_the_file(tmp_path: Path, options: dict[str, Any]) -> None:
    source = python_models.create("span", **options)
    assert ("no_norm" in source.state_dict()) == (not options.get("norm", True))
    model = loads(saved(tmp_path / "w.pth", source.state_dict()), source)
    assert {k: model.options[k] for k in options} == options
    assert model.scale == options.get("upscale", 4)


def test_no_norm_feeds_the_image_as_it_is(tmp_path: Path) -> None:
    # spandrel, neosr and traiNNer mark networks without normalisation by this entry.
    plain = python_models.plain("span")
    path = saved(tmp_path / "w.pth", {**plain.state_dict(), "no_norm": torch.zeros(1)})
    model = python_models.create("span", path)
    x = image(model, 9, 8)
    shifted = (x / 255) + plain.mean  # what the normalisation turns into x
    with torch.no_grad():
        assert relative(model(x), plain(shifted)) < 1e-4


def test_half_precision_file(tmp_path: Path) -> None:
    source = python_models.create("span", feature_channels=8)
    half = {k: v.half() for k, v in source.state_dict().items()}
    model = python_models.create("span", saved(tmp_path / "w.pth", half))
    assert all(v.dtype == torch.float32 and torch.equal(v, half[k].float()) for k, v in model.state_dict().items())


def refused(path: Path, match: str, name: str = "span", **options: Any) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        python_models.create(name, path, **options)
    assert str(caught.value).startswith(str(path))


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    span = saved(tmp_path / "span.pth", python_models.create("span").state_dict())
    tiny = saved(tmp_path / "tiny.pth", python_models.create("span_tiny").state_dict())
    trained = saved(tmp_path / "trained.pth", python_models.create("span_tiny", deploy=False).state_dict())
    rlfn = saved(tmp_path / "rlfn.pth", python_models.create("rlfn").state_dict())
    refused(
        rlfn,
        r"not a checkpoint of 'span': 42 missing: conv_1\.eval_conv\.weight, .*, \.\.\.; 76 unexpected: "
        r"conv_1\.weight, .*; it looks like a checkpoint of 'rlfn'",
    )
    for path, looks in ((span, "span"), (tiny, "span_tiny"), (trained, "span_tiny")):
        refused(path, f"not a checkpoint of 'rlfn': .*it looks like a checkpoint of '{looks}'$", "rlfn")
    refused(
        span,
        r"not a checkpoint of 'span_tiny': 43 of another shape: conv_1\.eval_conv\.weight \[28, 3, 3, 3\] instead of "
        r"\[26, 3, 3, 3\], .*looks like a checkpoint of 'span'$",
        "span_tiny",
    )
    python_models.create("span", tiny)
    other = saved(tmp_path / "other.pth", {"a.weight": torch.zeros(2, 2)})
    refused(other, r"1 unexpected: a\.weight$")


@pytest.mark.parametrize("name", MODELS)
def test_published_checkpoint_of_another_model(shared_models: Path, name: str) -> None:
    others = [other for other in MODELS if other not in (name, *SYNTHETIC)]
    other = others[(MODELS.index(name) + 1) % len(others)]
    refused(weights_file(shared_models, other), f"not a checkpoint of '{name}'", name)


def test_differences_inside_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    state = python_models.create("rlfn").state_dict()
    refused(saved(path, {k: v for k, v in state.items() if k != "conv_2.bias"}), r"1 missing: conv_2\.bias$", "rlfn")
    refused(saved(path, {**state, "extra": torch.zeros(1)}), "1 unexpected: extra$", "rlfn")
    wide = {**state, "conv_2.bias": torch.zeros(47)}
    refused(saved(path, wide), r"1 of another shape: conv_2\.bias \[47\] instead of \[46\]$", "rlfn")
    whole = {**state, "conv_2.bias": torch.zeros(46, dtype=torch.int64)}
    refused(saved(path, whole), r"1 of another type: conv_2\.bias torch\.int64$", "rlfn")
    broken = {**state, "conv_2.bias": torch.full((46,), float("nan"))}
    refused(saved(path, broken), r"1 tensors hold values that are not finite: conv_2\.bias$", "rlfn")


def test_differences_inside_a_span_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    slim = python_models.create("span", feature_channels=8).state_dict()
    refused(saved(path, slim), r"conv_1\.eval_conv\.weight \[8, .* instead of \[9, 3, 3, 3\]", feature_channels=9)
    refused(saved(path, slim), r"2 of another shape: upsampler", upscale=2)
    tail = {**slim, "upsampler.0.weight": torch.zeros(2, 8, 3, 3)}
    refused(saved(path, tail), "not a checkpoint of 'span'")
    grey = {**slim, "conv_1.eval_conv.weight": torch.zeros(8, 1, 3, 3)}
    refused(saved(path, grey), "not a checkpoint of 'span': norm: the mean has 3 values for 1 input channels")
    trained = python_models.create("span", feature_channels=8, deploy=False).state_dict()
    del trained["block_1.c1_r.conv.1.bias"]
    refused(saved(path, trained), r"block_1\.c1_r: the branches do not fit together: conv\.1\.bias missing")
    del trained["block_1.c1_r.conv.1.weight"]
    for form in (True, False):
        refused(saved(path, trained), r"1 missing|missing: block_1\.c1_r\.eval_conv", deploy=form)


def test_an_option_at_fault_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", python_models.create("span").state_dict())
    with pytest.raises(ValueError, match=r"^upscale: must be at least 1"):
        python_models.create("span", path, upscale=0)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint file: .*none\.pth"):
        python_models.create("span", tmp_path / "none.pth")
